"""New people with a handful of interactions: what a device's own training adds, and a start that was learnt for it.

ML-100K: four fifths of the people train; the others come new, are known by their first 1, 3, 5 or 10 interactions, and
are asked for their next ten, over all items. A client that takes several local steps and sends where they led is
Reptile: the server moves to where a few steps lead far (Nichol, Achiam and Schulman, 2018). Settings were chosen
with ``--validation``, where the new people are a fifth of those who otherwise train.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, progress, run
from benchmarks.lives import laid_over
from fedrec.config import Experiment
from fedrec.data.blocks import TEST, TRAIN, VALIDATION, lay_out
from fedrec.data.cleaning import Dataset, RawRows
from fedrec.data.sources import load_dataset
from fedrec.grid.simulate import simulate
from fedrec.random import Key

SEEDS = (1, 2, 3)
KNOWN = (1, 3, 5, 10)
ASKED = 10
ADAPT: dict[str, Any] = {"steps": 5, "learning_rate": 0.1}
TRANSFORMER: dict[str, Any] = {
    "model": {"kind": "transformer", "dim": 64, "softmax": {"kind": "sampled", "negatives": 128}},
    "training": {
        "average": 0.95, "cohort": {"kind": "poisson", "expected": 64},
        "server": {"kind": "adam", "learning_rate": 3e-3}, "base": {"rounds": 120, "warmup": 10, "final": 0.05},
        "later": {"rounds": 0},
    },
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "one local step": {},
    "five local steps (Reptile)": {"training": {"local": {"steps": 5, "learning_rate": 0.1}}},
}


def people(hold: str) -> Dataset:
    """Return old people as block 0, and new people once for each number of known interactions as later blocks."""
    source = load_dataset("ml-100k", say=lambda note: print(note, file=sys.stderr))
    log = source.log
    fifth = np.floor(Key.from_seed(0).child("handful").uniforms(np.arange(log.n_users, dtype=np.int64), 1)[:, 0] * 5)
    new, left = (0, None) if hold == "test" else (1, 0)
    columns: dict[str, list[Any]] = {"user": [], "item": [], "block": [], "part": []}

    def add(user: str, items: Sequence[int], block: int, parts: Sequence[int]) -> None:
        columns["user"] += [user] * len(items)
        columns["item"] += [source.catalog.ids[i] for i in items]
        columns["block"] += [block] * len(items)
        columns["part"] += parts

    for number, name in enumerate(log.user_ids):
        items = [int(i) for i in log.item[log.offsets[number] : log.offsets[number + 1]]]
        if fifth[number] == left:
            continue
        if fifth[number] != new:
            held = max(1, round(0.1 * len(items)))
            parts = [TRAIN] * (len(items) - 2 * held) + [VALIDATION] * held + [TEST] * held
            add(str(name), items, 0, parts)
            continue
        for block, known in enumerate(KNOWN, start=1):
            taken = items[: known + ASKED]
            add(f"{name}/{known}", taken, block, [TRAIN] * known + [TEST] * (len(taken) - known))
    text = {key: np.asarray(columns[key], object) for key in ("user", "item")}
    rows = RawRows(text["user"], text["item"], np.zeros(len(text["user"])))
    return lay_out(rows, np.asarray(columns["block"]), np.asarray(columns["part"]), name="ml-100k, new people")


def curve(dataset: Dataset, document: Mapping[str, Any], seed: int) -> dict[str, list[float]]:
    """Return NDCG@10 of the new people by how much is known of them, as released and adapted on the device."""
    common: dict[str, Any] = {
        "name": "handful", "seed": seed, "data": {"source": "blocks"}, "split": {"kind": "blocks", "later": len(KNOWN)},
        "evaluation": {"ks": [10], "replicates": 0, "local_only": {"people": 0}, "adapt": ADAPT},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        found, _ = simulate(
            Experiment.parse(laid_over(common, document)),
            runs=Path(folder), registry=Path(folder) / "registry", dataset=dataset,
        )  # fmt: skip
    return {
        row: [one["rows"][row]["all"]["metrics"]["ndcg@10"]["value"] for one in found["releases"][1:]]
        for row in ("release", "adapted", "popularity")
    }


def measure(quick: bool, hold: str) -> list[Row]:
    """Measure the curve of every arm."""
    dataset, rows = people(hold), []
    short: dict[str, Any] = {"training": {"base": {"rounds": 4}}} if quick else {}
    for arm, changes in ARMS.items():
        document = laid_over(laid_over(TRANSFORMER, changes), short)
        seeds = progress(SEEDS[: 1 if quick else None], arm)
        found = [curve(dataset, document, seed) for seed in seeds]
        for row, words in (("release", "as released"), ("adapted", "adapted on the device")):
            values = np.array([one[row] for one in found])
            for place, known in enumerate(KNOWN):
                what = f"{arm}, {words}, {known} known"
                rows.append(Row(what, float(values[:, place].mean()), "NDCG@10"))
                if len(values) > 1:
                    rows.append(Row(f"{what}, standard deviation over seeds", float(values[:, place].std(ddof=1)), ""))
    rows += [Row(f"popularity, {known} known", found[0]["popularity"][i], "NDCG@10") for i, known in enumerate(KNOWN)]
    return rows


def main(argv: Sequence[str]) -> int:
    """Run what the arguments ask for."""
    hold = "validation" if "--validation" in argv else "test"
    rest = [argument for argument in argv if argument != "--validation"]
    return run("handful", (__doc__ or "").split("\n")[0], lambda quick: measure(quick, hold), rest, argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
