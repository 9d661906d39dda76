"""What is left of recommendations where nobody is trusted and each client adds its own noise. MovieLens-100K."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, progress, run
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.sources import load_dataset
from fedrec.grid.simulate import simulate

SEEDS = (1, 2, 3)
BUDGETS = (10_000.0, 8.0)
UNITS: dict[str, dict[str, Any]] = {
    "user": {"kind": "user"},
    "window": {"kind": "window", "length": 10, "sampling": 0.5},
}
"""What is protected; `ml100k_local` is the first of them."""
WINDOW_RATE = 0.1
"""Learning rate of a local step of DP-SGD, which adds windows up instead of averaging them."""


def measure(quick: bool) -> list[Row]:
    """Fit with each unit and budget, and rank all items for the validation item of each person."""
    experiment = Experiment.find("ml100k_local")
    dataset = load_dataset(experiment.data.source, say=lambda note: print(note, file=sys.stderr))
    rows = []
    for unit in UNITS:
        for budget in BUDGETS[1:] if quick else BUDGETS:
            scores = [
                _scores(_with(experiment, unit, budget, seed), dataset)
                for seed in progress(SEEDS[:1] if quick else SEEDS, f"{unit}, epsilon {budget:g}")
            ]
            for row, name in (("release", "fitted"), ("popularity", "counts")):
                values = [each[row] for each in scores]
                head = f"unit {unit}, epsilon {budget:g}, {name}"
                rows.append(Row(f"{head}: mean of {len(values)}", float(np.mean(values)), "NDCG@10"))
                rows.append(Row(f"{head}: highest of them", max(values), "NDCG@10"))
    return rows


def _with(experiment: Experiment, unit: str, budget: float, seed: int) -> Experiment:
    document = experiment.model_dump(mode="json", exclude_unset=True)
    document["privacy"] |= {"epsilon": budget, "unit": UNITS[unit]}
    if unit == "window":
        document["training"]["local"] |= {"learning_rate": WINDOW_RATE}
    document["split"]["test"] = "validation"
    evaluation = {"replicates": 0, "local_only": {"people": 0}}
    return Experiment.parse({**document, "seed": seed, "evaluation": evaluation})


def _scores(experiment: Experiment, dataset: Dataset) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        document, _ = simulate(experiment, runs=root, registry=root / "registry", dataset=dataset)
    found = document["releases"][0]["rows"]
    return {row: float(found[row]["all"]["metrics"]["ndcg@10"]["value"]) for row in ("release", "popularity")}


if __name__ == "__main__":
    sys.exit(run("local_mode", __doc__ or "", measure))
