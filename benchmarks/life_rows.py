"""The recommenders that the lifelong benchmark compares, as experiments.

Settings were chosen on validation parts (``benchmarks.lifelong --validation``), never on a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.lives import laid_over

BASE, LATER = 120, 12
"""Rounds of the transformer that the rows of the literature fine-tune."""
RANKS = {"f3crec": 60, "movietweetings": 120, "amazon-video": 160}
LENGTHS = {"f3crec": 50, "movietweetings": 30, "amazon-video": 20}
PRIOR: dict[str, dict[str, Any]] = {
    name: {"item_rank": RANKS[name], "feature_rank": 0, "item_power": 0.35, "decay": decay, "popularity_weight": weight}
    for name, (decay, weight) in {
        "f3crec": (0.88, 0.1),
        "movietweetings": (0.75, 0.5),
        "amazon-video": (0.88, 0.3),
    }.items()
}
RECENCY = {"f3crec": 1.0, "movietweetings": 0.1, "amazon-video": 0.2}
"""What part of older blocks' counts is kept in the statistic's popularity."""
FOLLOW = {"f3crec": "all", "movietweetings": "new", "amazon-video": "all"}
"""Which items are laid anew in the statistic's geometry at every block."""
ROUNDS = {"f3crec": (40, 14), "movietweetings": (60, 8), "amazon-video": (30, 12)}
"""Of ours, in the base and in later blocks: what a third of the retraining's time allows beside the statistic."""
WEIGHTS = {"f3crec": [0.2, 0.5, 1.0], "movietweetings": [0.2, 0.5, 1.0, 2.0], "amazon-video": [0.2, 0.5, 1.0]}
"""How much of the fit validation may take."""
NONE: dict[str, Any] = {"base": {"rounds": 0}, "later": {"rounds": 0}}
LIKES = {"history_negatives": False}

VARIANTS: dict[str, dict[str, Any]] = {
    "fine-tune": {"later": {"dropout": 0.0}, "local": LIKES},
    "F3CRec's method": {"local": {"replay": 0.5, "replay_by_shift": True}, "item_mean": 0.01},
    "dropout fine-tune": {"local": LIKES},
    "+ history-aware negatives": {},
    "L2 anchor": {"anchor": 0.3},
    "EWC": {"ewc": {"strength": 0.03}},
    "distillation on the client": {"local": {"imitate": 0.5}},
    "replay": {"local": {"replay": 0.5}},
    "synthetic replay": {"rehearsal": {}},
    "curriculum": {"curriculum": {}},
    "drift detection": {"drift": {"threshold": 0.05}},
    "early stopping": {"stopping": {"every": 3, "patience": 1}},
}
"""What later blocks do, on the base that all share; all but fine-tune and dropout fine-tune spare old likes."""
MAIN_VARIANTS = ("fine-tune", "F3CRec's method")

DISTILLED: dict[str, Any] = {
    "statistics": {"item_share": 1.0, "feature_share": 0.0},
    "distil": {
        "steps": 120, "learning_rate": 3e-3, "statistic": 3.0, "previous": 0.0, "prior": PRIOR["f3crec"],
    },
}  # fmt: skip
TIERED: dict[str, Any] = {
    **DISTILLED, "tiers": {},
    "student": {
        "model": {"kind": "transformer", "dim": 16, "expand": 2, "softmax": {"kind": "sampled", "negatives": 128}},
        "share": 0.3, "learning_rate": 3e-3,
    },
}  # fmt: skip
"""The transformer taught on synthetic histories; the same with half of the people on small devices."""
PRIVATE: dict[str, Any] = {
    "model": {"item_rank": 60, "popularity_weight": 0.6, "decay": 0.95},
    "training": {"statistics": {"recency": 1.0}},
    "privacy": {
        "mode": "central", "epsilon": 8.0, "metrics": "research", "noise": "seed", "statistics": 1.0, "count": 4.0,
        "count_clip": 4.0,
    },
}  # fmt: skip
COUNTED: dict[str, Any] = {
    "model": {"kind": "factorisation", "dim": 2}, "training": NONE,
    "privacy": {"mode": "central", "epsilon": 8.0, "metrics": "research", "noise": "seed", "count_clip": 4.0},
}  # fmt: skip
"""Popularity that gets the whole budget."""


def statistics(name: str) -> dict[str, Any]:
    """Return how the statistic is gathered."""
    return {"item_share": 1.0, "feature_share": 0.0, "recency": RECENCY[name]}


def spectral(name: str) -> dict[str, Any]:
    """Return the cumulative statistic alone."""
    return {"model": {"kind": "spectral", **PRIOR[name]}, "training": {"statistics": statistics(name), **NONE}}


def fitted(name: str) -> dict[str, Any]:
    """Return the transformer that the rows of the literature fine-tune."""
    return {
        "model": {
            "kind": "transformer", "dim": 64, "length": LENGTHS[name],
            "softmax": {"kind": "sampled", "negatives": 128},
        },
        "training": {
            "average": 0.95, "cohort": {"kind": "poisson", "expected": 64},
            "server": {"kind": "adam", "learning_rate": 3e-3},
            "base": {"rounds": BASE, "warmup": 10, "final": 0.05},
            "later": {"rounds": LATER, "warmup": 3, "final": 0.1, "speed": 0.5},
        },
    }  # fmt: skip


def ours(name: str) -> dict[str, Any]:
    """Return the cumulative statistic as prior, and a transformer in its geometry that rehearses and is added."""
    fit = fitted(name)
    model = {
        "kind": "blend", "prior": PRIOR[name], "fitted": fit["model"], "weights": WEIGHTS[name], "follow": FOLLOW[name],
    }  # fmt: skip
    first, later = ROUNDS[name]
    rounds = {
        "base": {**fit["training"]["base"], "rounds": first},
        "later": {"warmup": 3, "final": 0.1, "rounds": later},
    }
    training = {**fit["training"], **rounds, "statistics": statistics(name), "local": {"replay": 0.5}}
    return {"model": model, "training": training}


def parts_of_ours(name: str) -> dict[str, dict[str, Any]]:
    """Return changes that take a part of ours away, do it another way, or add one."""
    other = {"all": "new", "new": "all"}[FOLLOW[name]]
    found: dict[str, dict[str, Any]] = {
        "without the statistic": {"model": fitted(name)["model"], "training": {"statistics": None}},
        "without replay": {"training": {"local": {"replay": 0.0}}},
        "without history-aware negatives": {"training": {"local": LIKES}},
        "without the statistic's geometry": {"model": {"start": "fresh"}},
        f"{other} items laid in it": {"model": {"follow": other}},
        "with server distillation": {"training": {"distil": {"steps": 60, "learning_rate": 1e-3}}},
    }
    if RECENCY[name] < 1.0:
        old = {"model": {"prior": {"popularity_weight": 0.1}}, "training": {"statistics": {"recency": 1.0}}}
        found["without recent popularity"] = old
    return found


def retrained(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a life that trains a new model on all blocks so far, as long as the transformer's base, at every block."""
    stage = fitted("f3crec")["training"]["base"]
    changes: dict[str, Any] = {
        "split": {"refit": "fresh"}, "training": {"base": stage, "later": stage, "local": {"replay": 0.0}},
    }  # fmt: skip
    if document["model"]["kind"] == "blend":  # what is trained so long deserves more weight
        changes["model"] = {"weights": [0.2, 0.5, 1.0, 2.0]}
    return laid_over(document, changes)
