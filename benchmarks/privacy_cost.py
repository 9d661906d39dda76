"""What privacy costs in time: the same rounds of training with `privacy.mode` "central" and "none". MovieLens-100K."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, claim, progress, run, unclaimed
from fedrec.config import Experiment
from fedrec.data.sources import load_dataset
from fedrec.grid.simulate import simulate

ROUNDS, QUICK_ROUNDS = 60, 20
REPEATS = 5
MOST = 1.3
PRIVATE = {"mode": "central", "epsilon": 8.0, "noise": "system", "metrics": "research"}


def measure(quick: bool) -> list[Row]:
    """Take turns, and compare medians: of rounds, and of whole runs with ledger, checkpoints, report."""
    dataset = load_dataset("ml-100k", say=lambda note: print(note, file=sys.stderr))
    runs = {mode: _experiment(QUICK_ROUNDS if quick else ROUNDS, mode) for mode in ("none", "central")}
    rounds: dict[str, list[float]] = {mode: [] for mode in runs}
    whole: dict[str, list[float]] = {mode: [] for mode in runs}
    for repeat in progress(range(1 if quick else REPEATS + 1), "turns"):
        for mode, experiment in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                document, _ = simulate(
                    experiment,
                    runs=Path(folder),
                    registry=Path(folder) / "registry",
                    dataset=dataset,
                    command="python -m benchmarks.privacy_cost",
                )
                spent = time.perf_counter() - began
            if repeat or quick:  # the first turn warms up
                rounds[mode].append(float(np.mean([record["seconds"] for record in document["rounds"]])))
                whole[mode].append(spent)
    reach = unclaimed if quick else claim
    cost = float(np.median(np.divide(rounds["central"], rounds["none"])))
    return [
        *(Row(f'a round, mode "{mode}"', 1e3 * float(np.median(found)), "ms") for mode, found in rounds.items()),
        *(Row(f'a whole run, mode "{mode}"', float(np.median(found)), "s") for mode, found in whole.items()),
        reach("a private round against one that is not", cost, "x", "<=", MOST),
        Row("a private run against one that is not", float(np.median(np.divide(whole["central"], whole["none"]))), "x"),
    ]


def _experiment(rounds: int, mode: str) -> Experiment:
    found: dict[str, Any] = Experiment.find("ml100k_leave_one_out").model_dump(mode="json", exclude_unset=True)
    found["training"]["base"] = {"rounds": rounds}
    found["training"]["cohort"] = {"kind": "poisson", "expected": 200}
    found["evaluation"] = {"replicates": 0, "local_only": {"people": 0}}
    return Experiment.parse({**found, "privacy": PRIVATE if mode == "central" else {"mode": "none"}})


if __name__ == "__main__":
    sys.exit(run("privacy_cost", __doc__ or "", measure))
