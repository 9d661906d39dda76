"""A life in four blocks (ML-100K as F3CRec cuts it, everything known masked): what is learnt and what is retained.

The blocks are read from ``f3crec-ml-100k/TASK_0.json`` to ``TASK_3.json`` below ``$FEDREC_DATA``: ``{"train": {user:
[items]}, "valid": ..., "test": ...}``. Settings were chosen with ``--validation``, never on the tests.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.harness import Row, claim, progress, run, unclaimed
from fedrec.config import Experiment
from fedrec.data.blocks import TEST, TRAIN, VALIDATION, lay_out
from fedrec.data.cleaning import Dataset, RawRows
from fedrec.errors import DataError
from fedrec.evaluation.continual import Life, matrix, measure
from fedrec.grid.simulate import simulate

SEEDS = (1, 2)
METRIC = "ndcg@20"
PARTS = {"train": TRAIN, "valid": VALIDATION, "test": TEST}
SPECTRAL: dict[str, Any] = {
    "model": {
        "kind": "spectral", "item_rank": 60, "feature_rank": 0, "item_power": 0.35, "decay": 0.88,
        "popularity_weight": 0.15,
    },
    "training": {
        "statistics": {"item_share": 1.0, "feature_share": 0.0},
        "base": {"rounds": 0}, "later": {"rounds": 0},
    },
}  # fmt: skip
FITTED: dict[str, Any] = {
    "model": {"kind": "transformer", "dim": 64, "softmax": {"kind": "sampled", "negatives": 256}},
    "training": {
        "average": 0.99, "cohort": {"kind": "poisson", "expected": 64},
        "server": {"kind": "adam", "learning_rate": 2e-3},
        "base": {"rounds": 300, "warmup": 15, "final": 0.05},
        "later": {"rounds": 50, "warmup": 5, "final": 0.1, "speed": 0.5},
    },
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "frozen base": {"later": {"rounds": 0}},
    "fine-tune, old likes as negatives": {"local": {"history_negatives": False}},
    "fine-tune, history-aware negatives": {},
    "+ replay": {"local": {"replay": 0.5}},
    "+ L2 anchor": {"anchor": 0.1},
    "+ item-wise temporal mean": {"item_mean": 0.01},
}


def f3crec_blocks(folder: Path, hold: Literal["test", "validation"]) -> Dataset:
    """Return the published blocks as a data set.

    Raises:
        DataError: the files are not there.
    """
    users: list[str] = []
    items: list[str] = []
    block: list[int] = []
    part: list[int] = []
    for number in range(4):
        path = folder / f"TASK_{number}.json"
        if not path.is_file():
            raise DataError(f"'{path}' is missing; set FEDREC_DATA to a folder that holds f3crec-ml-100k.")
        parts = json.loads(path.read_text("utf-8"))
        for name, code in PARTS.items():
            for user, taken in parts[name].items():
                users += [user] * len(taken)
                items += map(str, taken)
                block += [number] * len(taken)
                part += [code] * len(taken)
    rows = RawRows(np.asarray(users, object), np.asarray(items, object), np.zeros(len(users)))
    return lay_out(rows, np.asarray(block), np.asarray(part), name="f3crec-ml-100k", hold=hold)


def experiment_of(base: dict[str, Any], training: dict[str, Any], seed: int, refit: bool = False) -> Experiment:
    """Return an experiment over the blocks; ``training`` replaces keys of the base, table by table."""
    merged = {
        name: {**base["training"].get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in training.items()
    }
    return Experiment.parse(
        {
            "name": "lifelong", "seed": seed, "data": {"source": "f3crec-ml-100k"},
            "split": {"kind": "blocks", "later": 3, "refit": refit},
            "model": base["model"], "training": {**base["training"], **merged},
            "evaluation": {"ks": [10, 20], "replicates": 0, "local_only": {"people": 0}},
            "runtime": {"checkpoint_every": 1000},
        }
    )  # fmt: skip


def live(experiment: Experiment, dataset: Dataset) -> tuple[Life, float]:
    """Run a life and return its measures, and the seconds of its training."""
    with tempfile.TemporaryDirectory() as folder:
        document, _ = simulate(experiment, runs=Path(folder), registry=Path(folder) / "registry", dataset=dataset)
    return measure(matrix(document["releases"], METRIC)), sum(r["seconds"] for r in document["releases"])


def row_of(what: str, lives: list[Life]) -> list[Row]:
    """Return the rows of a recommender: means over seeds, and the spread of the harmonic mean."""
    means = [float(np.mean([getattr(one, name) for one in lives])) for name in ("learning", "retained", "forgetting")]
    spread = float(np.std([one.harmonic for one in lives], ddof=1)) if len(lives) > 1 else 0.0
    learning, retained, forgetting = means
    return [
        Row(f"{what}, learning average", learning, "NDCG@20"),
        Row(f"{what}, retained average", retained, "NDCG@20"),
        Row(f"{what}, forgetting", forgetting, "NDCG@20"),
        Row(f"{what}, standard deviation of the harmonic mean over seeds", spread, "NDCG@20"),
    ]


def measure_all(quick: bool, hold: Literal["test", "validation"] = "test") -> list[Row]:
    """Live every life of the table; the statistic has no randomness, so one seed is all."""
    dataset = f3crec_blocks(Path(os.environ.get("FEDREC_DATA", "data")) / "f3crec-ml-100k", hold)
    statistic, _ = live(experiment_of(SPECTRAL, {}, 1), dataset)
    judge = unclaimed if hold == "validation" else claim
    rows = [
        judge("cumulative statistic (spectral), harmonic mean", statistic.harmonic, "NDCG@20", ">=", 0.165),
        *row_of("cumulative statistic (spectral)", [statistic]),
    ]
    seeds = SEEDS[: 1 if quick else None]
    short: dict[str, Any] = {"base": {"rounds": 30}, "later": {"rounds": 10}} if quick else {}
    for what, changes in VARIANTS.items():
        merged = {**short, **changes}
        lives = [live(experiment_of(FITTED, merged, s), dataset) for s in progress(seeds, what)]
        rows += [Row(f"{what}, harmonic mean", float(np.mean([one.harmonic for one, _ in lives])), "NDCG@20")]
        rows += row_of(what, [one for one, _ in lives])
        rows += [Row(f"{what}, training", float(np.mean([seconds for _, seconds in lives])), "s")]
    lives = [live(experiment_of(FITTED, short, s, refit=True), dataset) for s in progress(seeds, "refit")]
    rows += [
        Row("warm refit on all blocks so far, harmonic mean", float(np.mean([o.harmonic for o, _ in lives])), "NDCG@20")
    ]
    rows += row_of("warm refit on all blocks so far", [one for one, _ in lives])
    return rows


if __name__ == "__main__":
    hold: Literal["test", "validation"] = "validation" if "--validation" in sys.argv else "test"
    arguments = [argument for argument in sys.argv[1:] if argument != "--validation"]
    raise SystemExit(run("lifelong", (__doc__ or "").split("\n")[0], lambda quick: measure_all(quick, hold), arguments))
