"""Masked sums against a trusted server: same task, same epsilon, 30 % of the clients falling silent. MovieLens-100K."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, claim, progress, run
from fedrec.config import Experiment
from fedrec.data.slices import LastWindow
from fedrec.data.sources import load_dataset
from fedrec.grid.simulate import simulate
from fedrec.privacy.settings import SecureSum
from fedrec.privacy.terms import agree_on, degree
from fedrec.protocol.secure import layout_of
from fedrec.server.secure import upload_bytes
from fedrec.server.spectral import asked_shapes

SEEDS = (1, 2, 3, 4, 5)
EPSILONS = (8.0, 2.0)
STUDENT = 2.776
"""97.5 % quantile of Student's t with four degrees of freedom, for five pairs."""
SILENT = 0.3
MOST_BYTES = 2_000_000


def measure(quick: bool) -> list[Row]:
    """Run both modes with the same seeds and budgets."""
    experiment = Experiment.find("ml100k_masked")
    dataset = load_dataset(experiment.data.source, say=lambda note: print(note, file=sys.stderr))
    rows = _traffic(experiment, len(dataset.catalog), dataset.log.n_users)
    for epsilon in EPSILONS[:1] if quick else EPSILONS:
        found: dict[str, list[float]] = {"central": [], "distributed": []}
        seconds: dict[str, list[float]] = {"central": [], "distributed": []}
        for seed in progress(SEEDS[:1] if quick else SEEDS, f"epsilon {epsilon:g}"):
            for mode, scores in found.items():
                began = time.perf_counter()
                scores.append(_score(_in_mode(experiment, mode, epsilon, seed), dataset))
                seconds[mode].append(time.perf_counter() - began)
        rows += _compared(epsilon, found, seconds, quick)
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


def _score(experiment: Experiment, dataset: Any) -> float:
    with tempfile.TemporaryDirectory() as folder:
        document, _ = simulate(
            experiment,
            runs=Path(folder),
            registry=Path(folder) / "registry",
            dataset=dataset,
            command="python -m benchmarks.masked",
        )
    return float(document["releases"][0]["rows"]["release"]["all"]["metrics"]["ndcg@10"]["value"])


def _compared(
    epsilon: float, found: Mapping[str, list[float]], seconds: Mapping[str, list[float]], quick: bool
) -> list[Row]:
    lost = np.subtract(found["central"], found["distributed"])
    head, unit = f"epsilon {epsilon:g}", "NDCG@10"
    rows = [Row(f"{head}: {mode}, mean of {len(lost)}", float(np.mean(scores)), unit) for mode, scores in found.items()]
    rows += [Row(f"{head}: {mode}, a whole run", float(np.median(spent)), "s") for mode, spent in seconds.items()]
    rows.append(Row(f"{head}: central minus distributed, mean", float(lost.mean()), unit))
    if len(lost) == len(SEEDS):
        half = STUDENT * float(lost.std(ddof=1)) / math.sqrt(len(lost))
        what = f"{head}: central minus distributed, {{}} end of Student's interval"
        rows.append(claim(what.format("low"), float(lost.mean()) - half, unit, "<=", 0.0))
        rows.append(Row(what.format("high"), float(lost.mean()) + half, unit))
    return rows


def _traffic(experiment: Experiment, n_items: int, n_people: int) -> list[Row]:
    """Return what a client sends that is alone on its node, in each of the two masked sums of a slice."""
    statistics = experiment.training.statistics
    assert statistics is not None
    counts = {"counts": ((n_items,), np.dtype(np.float32))}
    asked = asked_shapes(statistics.task(LastWindow(skip=1)), n_items, statistics.features.rank)
    rows = []
    for name, shapes in (("statistic", asked), ("popularity counts", counts)):
        layout = layout_of({key: tuple(shape) for key, (shape, _) in shapes.items()})
        terms = agree_on("0" * 32, 0, 0, SecureSum(), n_people, layout, 1.0, 1.0, "system")
        sent = upload_bytes(terms, degree(n_people, SecureSum()))
        rows.append(claim(f"upload of a client alone on its node: {name}", sent, "bytes", "<=", MOST_BYTES))
    return rows


if __name__ == "__main__":
    sys.exit(run("masked", __doc__ or "", measure))
