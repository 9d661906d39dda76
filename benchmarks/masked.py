"""Masked sums against a trusted server: same task, same epsilon, 30 % of the clients falling silent. MovieLens-100K."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, claim, progress, run
from fedrec.client.app import client_app
from fedrec.client.pool import LogPool
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.slices import LastWindow
from fedrec.data.sources import load_dataset
from fedrec.evaluation.asked import cooccurrence_shapes
from fedrec.grid.in_process import InProcessGrid
from fedrec.privacy.settings import SecureSum
from fedrec.privacy.terms import agree_on, degree
from fedrec.protocol.identities import SIMULATION
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.secure import layout_of
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import CooccurrenceTask, CountTask
from fedrec.server.app import GridLink, server_app
from fedrec.server.registry import Registry
from fedrec.server.run import RunFolder, run_experiment
from fedrec.server.secure import upload_bytes

SEEDS = (1, 2, 3, 4, 5)
EPSILONS = (8.0, 2.0)
STUDENT = 2.776
"""97.5 % quantile of Student's t with four degrees of freedom, for five pairs."""
SILENT = 0.3
"""Half before their contribution, half after it."""
EVERYBODY, SAME, MASKED = "central, everybody", "central, as many silent", "distributed"
MOST_BYTES = 2_000_000


def measure(quick: bool) -> list[Row]:
    """Run both modes with the same seeds and budgets."""
    experiment = Experiment.find("ml100k_masked")
    dataset = load_dataset(experiment.data.source, say=lambda note: print(note, file=sys.stderr))
    rows = _traffic(experiment, len(dataset.catalog), dataset.log.n_users)
    for epsilon in EPSILONS[:1] if quick else EPSILONS:
        found: dict[str, list[float]] = {name: [] for name in (EVERYBODY, SAME, MASKED)}
        seconds: dict[str, list[float]] = {name: [] for name in found}
        for seed in progress(SEEDS[:1] if quick else SEEDS, f"epsilon {epsilon:g}"):
            for name, scores in found.items():
                began = time.perf_counter()
                mode = "distributed" if name == MASKED else "central"
                pool = (Forgetful if name == SAME else LogPool)(dataset.log, dataset.catalog)
                scores.append(_score(_in_mode(experiment, mode, epsilon, seed), dataset, pool))
                seconds[name].append(time.perf_counter() - began)
        rows += _compared(epsilon, found, seconds)
    return rows


def _in_mode(experiment: Experiment, mode: str, epsilon: float, seed: int) -> Experiment:
    privacy = experiment.privacy.model_dump(mode="json") | {"mode": mode, "epsilon": epsilon}
    if mode == "central":
        privacy = {name: value for name, value in privacy.items() if name not in ("secure_sum", "against")}
    else:
        privacy["secure_sum"] = {"simulated_dropouts": SILENT}
    evaluation = {"replicates": 0, "local_only": {"people": 0}}
    return Experiment.parse(
        {**experiment.model_dump(mode="json", exclude_unset=True), "seed": seed, "privacy": privacy}
        | {"evaluation": evaluation}
    )


class Forgetful(LogPool):
    """Loses the contributions that a masked sum with the same share of silent clients loses."""

    def run(self, plan: RoundPlan) -> Tally:
        """Leave out who fell silent; everybody is evaluated."""
        if isinstance(plan.task, CountTask | CooccurrenceTask):
            drawn = plan.key.child("silent").uniforms(plan.slots, 1)[:, 0]
            plan = replace(plan, slots=plan.slots[drawn >= SILENT / 2])
        return super().run(plan)


def _score(experiment: Experiment, dataset: Dataset, pool: LogPool) -> float:
    documents: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store, chosen = Registry(root / "registry"), RunFolder.new(root, experiment)
        store.prepare()

        def main(link: GridLink, context: Any) -> None:
            documents.append(run_experiment(experiment, dataset, link, chosen, store, command="benchmarks.masked"))

        grid = InProcessGrid(client_app(lambda context: pool, lambda context: SIMULATION), [{}], {})
        server_app(main)(grid, grid.server_context())
    return float(documents[0]["releases"][0]["rows"]["release"]["all"]["metrics"]["ndcg@10"]["value"])


def _compared(epsilon: float, found: Mapping[str, list[float]], seconds: Mapping[str, list[float]]) -> list[Row]:
    head, unit = f"epsilon {epsilon:g}", "NDCG@10"
    n = len(found[MASKED])
    rows = [Row(f"{head}: {name}, mean of {n}", float(np.mean(scores)), unit) for name, scores in found.items()]
    rows += [Row(f"{head}: {name}, a whole run", float(np.median(spent)), "s") for name, spent in seconds.items()]
    for name in (SAME, EVERYBODY):
        lost = np.subtract(found[name], found[MASKED])
        what = f"{head}: {name} minus distributed"
        rows.append(Row(f"{what}, mean", float(lost.mean()), unit))
        if n == len(SEEDS):
            half = STUDENT * float(lost.std(ddof=1)) / math.sqrt(n)
            low = f"{what}, low end of Student's interval"
            rows.append(
                claim(low, float(lost.mean()) - half, unit, "<=", 0.0)
                if name == SAME
                else Row(low, float(lost.mean()) - half, unit)
            )
            rows.append(Row(f"{what}, high end", float(lost.mean()) + half, unit))
    return rows


def _traffic(experiment: Experiment, n_items: int, n_people: int) -> list[Row]:
    """Return what a client sends that is alone on its node, in each of the two masked sums of a slice."""
    statistics = experiment.training.statistics
    assert statistics is not None
    counts = {"counts": ((n_items,), np.dtype(np.float32))}
    asked = cooccurrence_shapes(statistics.task(LastWindow(skip=1)), n_items, statistics.features.rank)
    rows = []
    for name, shapes in (("statistic", asked), ("popularity counts", counts)):
        layout = layout_of({key: tuple(shape) for key, (shape, _) in shapes.items()})
        terms = agree_on("0" * 32, 0, 0, SecureSum(), n_people, layout, 1.0, 1.0, "system")
        sent = upload_bytes(terms, degree(n_people, SecureSum()))
        rows.append(claim(f"upload of a client alone on its node: {name}", sent, "bytes", "<=", MOST_BYTES))
    for silent in (0.0, SILENT / 2, SILENT):
        found = terms.noise_excess(n_people, n_people - round(silent * n_people))
        what = f"variance of the noise over what was charged, {silent:.0%} silent before contributing"
        rows += [claim(what, found, "x", "<=", 1.01), claim(f"{what}: never below", found, "x", ">=", 1.0)]
    return rows


if __name__ == "__main__":
    sys.exit(run("masked", __doc__ or "", measure))
