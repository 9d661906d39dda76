"""Settings of the privacy benchmark, and how they were chosen.

Chosen by NDCG@10 of the four interactions before each person's last (`private_statistics.CHOICE`: neither counts nor
statistic see them), with noise of other seeds than those reported; nothing was chosen by the last interaction, which is
the test. The search is not accounted for: the data is public.
"""

from __future__ import annotations

from typing import Any

from benchmarks.private_statistics import Choice
from fedrec.data.features import FeatureSettings
from fedrec.models.configs import SpectralConfig

SEEDS = {"ml-100k": tuple(range(1, 11)), "ml-1m": (1, 2, 3)}
"""Of the noise in statistics."""
FIT_SEEDS = {"ml-100k": (1, 2, 3), "ml-1m": (1, 2)}
"""Of private fits, which take longer."""
EXACT_SEEDS = {"ml-100k": (1, 2, 3), "ml-1m": (1, 2)}
"""Of fits without privacy, which take longest."""
EASE = {"ml-100k": 500.0, "ml-1m": 500.0}
"""Its regularisation."""


def model(
    items: int,
    features: int,
    powers: tuple[float, float],
    weights: tuple[float, float],
    decays: tuple[float, float],
    caution: float = 1.0,
    second: tuple[int, float] = (0, 0.0),
) -> SpectralConfig:
    """Return settings; `weights` are those of items (features have 1) and popularity, the rest is items first.

    `second` is the rank of the second look's prior and by how much eigenvalues are lowered.
    """
    return SpectralConfig(
        item_rank=items,
        feature_rank=features,
        item_power=powers[0],
        feature_power=powers[1],
        item_weight=weights[0],
        popularity_weight=weights[1],
        decay=decays[0],
        feature_decay=decays[1],
        caution=caution,
        second_rank=second[0],
        item_shrink=second[1],
    )


PUBLIC = FeatureSettings(encoder="wordllama", rank=1024, popularity=0.0)
WAVES = FeatureSettings(encoder="wordllama", rank=256, popularity=0.75, spread=0.25)
POPULAR = FeatureSettings(encoder="wordllama", rank=256, popularity=1.0, spread=0.25)
SMOOTH = FeatureSettings(encoder="wordllama", rank=256, fourier=0, spread=0.25)
CHOICES: dict[str, dict[float | None, Choice]] = {
    "ml-1m": {
        None: Choice((0.78, 0.2, 0.02), model(2400, 1024, (0.35, 0.35), (2.0, 0.0), (0.7, 0.7)), PUBLIC),
        8.0: Choice((0.78, 0.2, 0.02), model(300, 1024, (0.25, 0.5), (1.6, 0.0), (0.7, 0.8), 0.6), PUBLIC),
        4.0: Choice((0.75, 0.22, 0.03), model(300, 1024, (0.25, 0.5), (1.0, 0.0), (0.7, 0.8), 0.6), PUBLIC),
        2.0: Choice((0.68, 0.29, 0.03), model(200, 1024, (0.35, 0.5), (1.0, 0.0), (0.7, 0.8), 0.6), PUBLIC),
        1.0: Choice((0.0, 0.97, 0.03), model(0, 1024, (0.5, 0.5), (1.0, 0.6), (0.8, 0.8)), PUBLIC),
    },
    "ml-100k": {
        None: Choice((0.78, 0.17, 0.05), model(160, 256, (0.5, 0.5), (1.5, 0.3), (0.8, 0.8)), WAVES),
        8.0: Choice((0.72, 0.23, 0.05), model(200, 256, (0.3, 0.5), (1.0, 0.6), (0.8, 0.8), 1.0, (45, 8.0)), POPULAR),
        4.0: Choice((0.6, 0.32, 0.08), model(200, 256, (0.3, 0.5), (1.0, 0.6), (0.8, 0.8), 1.0, (30, 4.0)), SMOOTH),
        2.0: Choice((0.5, 0.35, 0.15), model(150, 256, (0.35, 0.5), (0.6, 0.6), (0.9, 0.8)), SMOOTH),
        1.0: Choice((0.0, 0.7, 0.3), model(0, 256, (0.5, 0.5), (1.0, 0.8), (0.8, 0.8)), SMOOTH),
    },
}
SMALL: dict[str, Any] = {"kind": "transformer", "dim": 32, "blocks": 1, "heads": 1, "length": 50}
"""What is fitted privately: noise grows with the number of parameters."""
FIT: dict[str, Any] = {
    "local": {"steps": 1, "learning_rate": 1.0, "clip_norm": 1.0},
    "server": {"kind": "adam", "learning_rate": 1e-2},
}
FITS: dict[str, dict[str, Any]] = {
    "ml-100k": {
        **FIT,
        "cohort": {"kind": "poisson", "expected": 256},
        "base": {"rounds": 60, "warmup": 5, "final": 0.1},
    },
    "ml-1m": {
        **FIT,
        "cohort": {"kind": "poisson", "expected": 1024},
        "base": {"rounds": 30, "warmup": 5, "final": 0.1},
    },
}
"""How: clip norm, learning rate and cohort chosen among a handful at epsilon 8."""
SPENT = (0.85, 0.1, 0.05)
"""Shares of the budget of prior, fit and the validation that decides on it, in a combination."""
EXACT: dict[str, Any] = {
    "cohort": {"kind": "poisson", "expected": 64},
    "server": {"kind": "adam", "learning_rate": 2e-3},
    "base": {"rounds": 1000, "warmup": 50, "final": 0.01},
    "average": 0.99,
}
"""The transformer without privacy; `benchmarks.leave_one_out` trains its own longer."""
