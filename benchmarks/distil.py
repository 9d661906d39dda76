"""Distillation on the server at zero added epsilon: what is retained over a life, and what a device student keeps.

The life: the published F3CRec blocks of ML-100K, everything known masked, NDCG@20, no
privacy. Both arms train the same rounds of the same seed; one is taught after them. Settings were chosen with
``--validation``, those of the device student by ``benchmarks.student_choice``. ``--part life`` or ``student`` runs one.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.harness import Row, claim, option, progress, run, unclaimed
from benchmarks.lives import experiment_of, f3crec_blocks, live
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.sources import load_dataset
from fedrec.evaluation.continual import Life
from fedrec.grid.simulate import simulate

SEEDS = (1, 2, 3, 4, 5)
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Of Student's distribution at 97.5 %, by the number of seeds."""
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
PRIOR = {name: value for name, value in SPECTRAL["model"].items() if name != "kind"}
DISTIL: dict[str, Any] = {
    "steps": 120, "learning_rate": 3e-3, "statistic": 3.0, "fitted": 1.0, "previous": 0.0, "prior": PRIOR,
    "transfer": {"histories": 512},
}  # fmt: skip
TAUGHT: dict[str, Any] = {"statistics": SPECTRAL["training"]["statistics"], "distil": DISTIL}
STUDENT: dict[str, Any] = {"model": {"kind": "spectral", "item_rank": 80, "feature_rank": 0, "item_power": 0.35}}


def paired(differences: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of paired differences and its 95 % interval (Student's t).

    >>> [round(v, 3) for v in paired([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    n, mean = len(differences), float(np.mean(differences))
    if n < 2:
        return mean, float("-inf"), float("inf")
    half = T[n] * float(np.std(differences, ddof=1)) / n**0.5
    return mean, mean - half, mean + half


def lives_of(dataset: Dataset, training: dict[str, Any], seeds: Sequence[int], what: str) -> list[Life]:
    """Live one life per seed."""
    return [live(experiment_of(FITTED, seed, {"training": training}), dataset).life for seed in progress(seeds, what)]


def life_rows(dataset: Dataset, seeds: Sequence[int], short: dict[str, Any], judge: Any) -> list[Row]:
    """Return the two arms, the statistic alone, and the paired difference of what is retained."""
    rows: list[Row] = []
    arms: dict[str, list[Life]] = {}
    for what, training in (("fine-tune", {}), ("distilled", TAUGHT)):
        began = time.process_time()
        arms[what] = lives_of(dataset, {**short, **training}, seeds, what)
        for name in ("retained", "learning", "harmonic", "forgetting"):
            rows.append(
                Row(f"{what}, {name} average", float(np.mean([getattr(o, name) for o in arms[what]])), "NDCG@20")
            )
        rows.append(Row(f"{what}, processor time of a life", (time.process_time() - began) / len(seeds), "s"))
    alone = live(experiment_of(SPECTRAL, 1), dataset).life
    rows.append(Row("its teacher, the statistic alone, retained average", alone.retained, "NDCG@20"))
    for name in ("retained", "harmonic"):
        pairs = zip(arms["fine-tune"], arms["distilled"], strict=True)
        mean, low, high = paired([getattr(b, name) - getattr(a, name) for a, b in pairs])
        rows.append(Row(f"distilled minus fine-tune, {name} average, mean of seeds", mean, "NDCG@20"))
        if len(seeds) > 1:
            rows.append(judge(f"the same, {name}, lower end of the 95 % interval", low, "NDCG@20", ">=", 0.0))
            rows.append(Row(f"the same, {name}, upper end", high, "NDCG@20"))
    rows.append(judge("added epsilon", 0.0, "", "<=", 0.0))
    return rows


def student_rows(test: str, judge: Any, quick: bool) -> list[Row]:
    """Return what a device student keeps of a release: ML-100K, leave-one-out, the spectral release of all ranks."""
    document: dict[str, Any] = {
        "name": "student", "data": {"source": "ml-100k"}, "split": {"kind": "leave_one_out", "test": test},
        "model": {"kind": "spectral"},
        "training": {
            "statistics": {}, "base": {"rounds": 0}, "later": {"rounds": 0},
            "student": STUDENT | ({"steps": 20} if quick else {}),
        },
        "evaluation": {"ks": [10, 20], "replicates": 200, "local_only": {"people": 0}},
    }  # fmt: skip
    dataset = load_dataset("ml-100k", say=lambda note: print(note, file=sys.stderr))
    with tempfile.TemporaryDirectory() as folder:
        found, _ = simulate(
            Experiment.parse(document), runs=Path(folder), registry=Path(folder) / "registry", dataset=dataset
        )
    release = found["releases"][0]
    own, small = (release["rows"][row]["all"]["metrics"]["ndcg@10"]["value"] for row in ("release", "student"))
    gap = release["differences"]["student"]["ndcg@10"]
    return [
        Row("release, ML-100K leave-one-out", own, "NDCG@10"),
        Row("its device student", small, "NDCG@10"),
        judge("device student, share of the release's NDCG@10", small / own, "", ">=", 0.97),
        Row("release minus student, lower end of the 95 % interval over people", gap["low"], "NDCG@10"),
        Row("release minus student, upper end", gap["high"], "NDCG@10"),
        judge(
            "device student, share of the release's parameters", release["student"]["share_of_params"], "", "<=", 0.1
        ),
        Row("device student, bytes", release["student"]["bytes"], "B"),
    ]


def measure(quick: bool, hold: Literal["test", "validation"] = "test", part: str = "") -> list[Row]:
    """Measure both claims, or one: "life" or "student"."""
    judge = unclaimed if quick or hold == "validation" else claim
    if part == "student":
        return student_rows(hold, judge, quick)
    dataset = f3crec_blocks(Path(os.environ.get("FEDREC_DATA", "data")) / "f3crec-ml-100k", hold)
    short: dict[str, Any] = {"base": {"rounds": 30}, "later": {"rounds": 10}} if quick else {}
    rows = life_rows(dataset, SEEDS[: 1 if quick else None], short, judge)
    return rows if part == "life" else rows + student_rows(hold, judge, quick)


if __name__ == "__main__":
    hold: Literal["test", "validation"] = "validation" if "--validation" in sys.argv else "test"
    rest = [argument for argument in sys.argv[1:] if argument != "--validation"]
    part = option(rest, "--part", ("life", "student"), "")
    title = (__doc__ or "").split("\n")[0]
    raise SystemExit(run("distil", title, lambda quick: measure(quick, hold, part), rest, sys.argv[1:]))
