"""What quality benchmarks share: an experiment for each model and data set, and the questions of leave-one-out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from benchmarks.private_choices import CHOICES
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.random import Key

TEXTLESS = ("amazon-video", "amazon-beauty")
"""Data sets whose items have no titles."""
SEQUENCE: dict[str, Any] = {"dim": 64, "length": 50, "softmax": {"kind": "sampled", "negatives": 256}}
FEATURES: dict[str, Any] = {"encoder": "wordllama", "rank": 256, "fourier": 0}
TEXT: dict[str, Any] = {**SEQUENCE, "kind": "text_transformer", "residual": 8, "features": FEATURES}
MODELS: dict[str, dict[str, Any]] = {
    "transformer": {**SEQUENCE, "kind": "transformer"},
    "text_transformer": TEXT,
    "gru": {**SEQUENCE, "kind": "gru"},
    "ncf": {**SEQUENCE, "kind": "ncf"},
    "factorisation_machine": {**SEQUENCE, "kind": "factorisation_machine"},
    "lightgcn": {**SEQUENCE, "kind": "lightgcn"},
    "factorisation": {"kind": "factorisation", "dim": 32},
    "nearest": {"kind": "nearest", "features": FEATURES},
    "spectral": {"kind": "spectral", "item_rank": 240, "feature_rank": 256},
}
"""Settings that are the same for all data sets: defaults, and what `simulations/ml100k_leave_one_out.toml` chose; the
spectral ones of MovieLens are those of `benchmarks.private_choices` without noise."""
WIDE = ("amazon-beauty", "amazon-video", "movietweetings-100k")
"""Data sets with more items than a statistic of pairs may have."""
MADE = ("nearest", "spectral")
"""Models that no round trains."""
COHORT = {"ml-100k": 32, "ml-1m": 96, "amazon-video": 64, "amazon-beauty": 128, "movietweetings-100k": 96}


def experiment_for(
    source: str,
    kind: str,
    rounds: int,
    *,
    seed: int = 1,
    local_only: int = 0,
    model: dict[str, Any] | None = None,
    rate: float = 2e-3,
    **changes: Any,
) -> Experiment:
    """Return the leave-one-out experiment of a model on a data set.

    Args:
        source: name of the data set.
        kind: a key of `MODELS`.
        rounds: of training; 0 for what is made at once.
        seed: of the run.
        local_only: how many people the local-only row asks.
        model: changes of the model's settings.
        rate: the server's step size, but for a factorisation.
        changes: tables of the experiment that are replaced.
    """
    made = kind in MADE
    server = {"kind": "adam", "learning_rate": 0.05 if kind == "factorisation" else rate}
    training: dict[str, Any] = {
        "average": 0.0 if made or kind == "factorisation" else 0.995,
        "cohort": {"kind": "poisson", "expected": float(COHORT.get(source, 64))},
        "server": server,
        "base": {"rounds": 0 if made else rounds, "warmup": min(75, rounds // 4), "final": 0.01},
        "later": {"rounds": 0},
    }
    settings = {**MODELS[kind], **(model or {})}
    if kind == "spectral":
        settings, training["statistics"] = _spectral(source, settings)
    document: dict[str, Any] = {
        "name": f"zoo-{source}-{kind}".replace("_", "-"),
        "seed": seed,
        "data": {"source": source},
        "split": {"kind": "leave_one_out"},
        "model": settings,
        "training": training,
        "evaluation": {"local_only": {"people": local_only}, "ks": [10]},
        "runtime": {"checkpoint_every": 100},
    }
    return Experiment.parse({**document, **changes})


def _spectral(source: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return settings of the model and of its statistic."""
    if source in CHOICES:
        choice = CHOICES[source][None]
        items, _, counts = choice.shares
        shares = {"item_share": items / (1 - counts), "feature_share": 1 - items / (1 - counts)}
        return choice.model.model_dump(), {**shares, "features": choice.features.model_dump()}
    if source in WIDE:  # too many items for a statistic of pairs
        features = {"encoder": "hashed" if source in TEXTLESS else "wordllama", "rank": 512}
        sketch = {"sketch": "features", "item_share": 0.0, "feature_share": 1.0}
        return {**settings, "item_rank": 0, "feature_rank": 512}, {**sketch, "features": features}
    return settings, {"item_share": 0.8, "feature_share": 0.2, "features": FEATURES}


def questions(dataset: Dataset, people: int) -> tuple[list[list[int]], list[int]]:
    """Return histories and last items of some people, drawn once for all."""
    chosen = Key.from_seed(0).child("questions").numpy().permutation(dataset.log.n_users)[:people]
    rows = [dataset.log.history(int(user)).tolist() for user in chosen]
    rows = [row for row in rows if len(row) > 2]
    return [row[:-1] for row in rows], [row[-1] for row in rows]


def quality_of(lists: list[list[int]], targets: list[int]) -> float:
    """Return NDCG@10 of ranked lists of which each has one right answer."""
    found = [
        1 / math.log2(own.index(item) + 2) if item in own else 0.0 for own, item in zip(lists, targets, strict=True)
    ]
    return float(np.mean(found))
