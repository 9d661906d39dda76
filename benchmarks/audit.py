"""Claimed against audited epsilon, and membership inference against released models, on MovieLens."""

from __future__ import annotations

import math
import sys

import numpy as np
import torch

from benchmarks.harness import Row, claim, progress, run
from fedrec.audit.membership import Membership, attack
from fedrec.audit.one_run import canary_bound, measured_epsilon, record
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.sources import load_dataset
from fedrec.errors import DataError
from fedrec.random import Key
from fedrec.server.run import cut

DELTA, CONFIDENCE, CANARIES = 1e-5, 0.95, 1000
SEEDS = 10


def measure(quick: bool) -> list[Row]:
    """Audit the private experiment at several budgets, and two runs without privacy."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    try:
        small = load_dataset("ml-100k", say=lambda note: print(note, file=sys.stderr))
        large = small if quick else load_dataset("ml-1m", say=lambda note: print(note, file=sys.stderr))
    except DataError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return rows
    seeds = 2 if quick else SEEDS
    rows += _audited("ml-100k statistic, not private", statistic(None), small, seeds)
    for epsilon in (8.0,) if quick else (8.0, 1.0, 0.1):
        rows += _audited(f"ml-100k statistic, epsilon {epsilon:g}", statistic(epsilon), small, seeds)
    if not quick:
        rows += _audited("ml-1m statistic, epsilon 8", statistic(8.0), large, 2)
        rows += _audited("ml-100k transformer, not private", Experiment.find("ml100k_leave_one_out"), small, 2)
    return rows


def statistic(epsilon: float | None) -> Experiment:
    """Return the bundled private experiment at another budget, or without privacy."""
    document = Experiment.find("ml100k_private").model_dump(mode="json", exclude_unset=True)
    if epsilon is None:
        del document["privacy"]
    else:
        document["privacy"]["epsilon"] = epsilon
    return Experiment.parse(document)


def _audited(name: str, experiment: Experiment, dataset: Dataset, seeds: int) -> list[Row]:
    slices = cut(experiment, dataset)
    found = record(experiment, dataset, slices, CANARIES, Key.from_seed(0).child("canaries"))
    bound = canary_bound(found.heard, found.included, DELTA, CONFIDENCE)
    measured = measured_epsilon(found.heard, found.included, DELTA, CONFIDENCE)
    rows: list[Row] = []
    if found.life.ledger is None:
        rows.append(Row(f"{name}: bound by canaries (ceiling {bound.ceiling:.2f})", bound.epsilon, "epsilon"))
    else:
        spent = found.life.ledger.spent()
        rows.append(claim(f"{name}: bound by canaries", bound.epsilon, "epsilon", "<=", spent))
        rows.append(claim(f"{name}: bound by measured noise", measured or math.nan, "epsilon", "<=", spent))
    return rows + _members(name, [_attacked(experiment, dataset, seed) for seed in progress(range(seeds), name)])


def _attacked(experiment: Experiment, dataset: Dataset, seed: int) -> Membership:
    again = experiment.model_copy(update={"seed": seed + 1})
    return attack(again, dataset, cut(again, dataset), DELTA, CONFIDENCE, Key.from_seed(seed).child("membership"))


def _members(name: str, found: list[Membership]) -> list[Row]:
    """Return means over seeds; the standard error says how far from one half a mean of chance may be."""
    people, interactions = (np.array([getattr(one, part).auc for one in found]) for part in ("person", "interaction"))
    error = float(people.std(ddof=1)) / math.sqrt(len(found))
    head = f"{name}, mean of {len(found)}"
    return [
        Row(f"{head}: membership of people (standard error {error:.3f})", float(people.mean()), "AUC"),
        Row(f"{head}: people found at 1 % false alarms", float(np.mean([m.person.detected for m in found])), "share"),
        Row(f"{head}: membership of interactions", float(interactions.mean()), "AUC"),
        Row(f"{head}: bound by membership, largest", max(m.bound.epsilon for m in found), "epsilon"),
    ]


if __name__ == "__main__":
    sys.exit(run("audit", __doc__ or "", measure))
