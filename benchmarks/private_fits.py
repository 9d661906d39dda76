"""What the privacy benchmark knows of models that are fitted in rounds, alone and on top of a statistic."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.private_choices import CHOICES, EXACT, FITS, SMALL, SPENT
from benchmarks.private_statistics import DELTA, TEST, Bench
from fedrec.config import Experiment
from fedrec.grid.simulate import simulate
from fedrec.models.build import build
from fedrec.models.recommender import get_params
from fedrec.protocol.task import FitTask
from fedrec.random import Key


def fitted(name: str, bench: Bench, epsilon: float, seed: int, test: str = "test") -> Experiment:
    """Return a private fit of a small transformer; its popularity counts get a hundredth of the budget."""
    noise = {"fit": _fit_noise(name, bench, 0.99), "count": 10.0}
    return _experiment(name, seed, SMALL, FITS[name], _central(epsilon, noise), test)


def combined(name: str, bench: Bench, epsilon: float, seed: int, test: str = "test") -> Experiment:
    """Return a spectral prior with a fit on top; both, and the validation that must adopt it, share the budget."""
    choice = CHOICES[name][epsilon]
    items, _, counts = choice.shares
    model = {"kind": "blend", "prior": choice.model.model_dump(), "fitted": SMALL}
    told = {"item_share": items / (1 - counts), "feature_share": 1 - items / (1 - counts)}
    training = {**FITS[name], "statistics": {**told, "features": choice.features.model_dump()}}
    prior, fit, validation = SPENT
    tried = 1 + len(Experiment.parse({"model": model}).model.weights)  # type: ignore[union-attr]
    noise = {
        "statistics": 1 / math.sqrt(prior * (1 - counts)),
        "count": 1 / math.sqrt(prior * counts),
        "fit": _fit_noise(name, bench, fit),
        "metrics_noise": math.sqrt(tried / validation),
    }
    return _experiment(name, seed, model, training, _central(epsilon, noise), test)


def exact(name: str, seed: int) -> Experiment:
    """Return the transformer without privacy, with the local-only row beside it."""
    model = {"kind": "transformer", "dim": 64, "blocks": 1, "heads": 2, "length": 50, "dropout": 0.2}
    return _experiment(name, seed, model, EXACT, {"mode": "none"}, local_only=200)


def _fit_noise(name: str, bench: Bench, share: float) -> float:
    """Return the relative multiplier of a round so that all rounds cost about this share of a release of noise 1.

    Many rounds of rate q and noise z are worth one Gaussian release of noise z / (q sqrt(rounds)).
    """
    people = bench.pool.census(TEST.train, bench.dataset.catalog.digest())
    rate = float(FITS[name]["cohort"]["expected"]) / people
    return rate * math.sqrt(float(FITS[name]["base"]["rounds"]) / share)


def _central(epsilon: float, noise: Mapping[str, float]) -> dict[str, Any]:
    return {"mode": "central", "epsilon": epsilon, "delta": DELTA, "noise": "seed", "metrics": "research", **noise}


def _experiment(
    source: str,
    seed: int,
    model: Mapping[str, Any],
    training: Mapping[str, Any],
    privacy: Mapping[str, Any],
    test: str = "test",
    local_only: int = 0,
) -> Experiment:
    """Return one run of leave-one-out."""
    return Experiment.parse(
        {
            "name": "privacy",
            "seed": seed,
            "data": {"source": source},
            "split": {"kind": "leave_one_out", "test": test},
            "model": dict(model),
            "training": {**training, "later": {"rounds": 0}},
            "privacy": dict(privacy),
            "evaluation": {"replicates": 0, "local_only": {"people": local_only}},
            "runtime": {"checkpoint_every": 1000},
        }
    )


def live(bench: Bench, asked: Experiment) -> dict[str, Any]:
    """Return the report of a run's only release."""
    with tempfile.TemporaryDirectory() as folder:
        document, _ = simulate(
            asked,
            runs=Path(folder),
            registry=Path(folder) / "registry",
            dataset=bench.dataset,
            command="python -m benchmarks.privacy",
        )
    release: dict[str, Any] = document["releases"][0]
    return release


def quality(release: Mapping[str, Any], row: str = "release") -> float:
    """Return NDCG@10 of a row."""
    return float(release["rows"][row]["all"]["metrics"]["ndcg@10"]["value"])


def update_bytes(bench: Bench, asked: Experiment) -> int:
    """Return what one client sends in one round of training that is alone on its node."""
    fresh = get_params(build(asked.model, bench.n_items, Key.from_seed(0)))
    task = FitTask(window=TEST.train, local=asked.training.local)
    return bench.alone(bench.plan(task, asked.model, fresh, {}), 0)
