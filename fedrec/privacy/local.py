"""Local privacy in numbers: what a client's release may change, how it is bounded, and what it is called."""

from __future__ import annotations

import math

from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.settings import LocalNoise, LocalUnit, WindowUnit

TAIL = 7.0
"""The norm of d normal numbers is above ``sqrt(d) + 7`` with a probability of 3e-11 at most (concentration)."""


def unit_name(unit: LocalUnit) -> str:
    """Return what is protected, in words for ledgers and reports."""
    if isinstance(unit, WindowUnit):
        return f"a window of {unit.length} successive interactions of one person"
    return "user"


def adjacency(unit: LocalUnit) -> str:
    """Return what two worlds that must look alike differ in."""
    if isinstance(unit, WindowUnit):
        return "add or remove one window of a client's history"
    return "replace one person's whole history by any other"


def replacing(clip_norm: float, noise_multiplier: float) -> GaussianMechanism:
    r"""Return the mechanism that hides which of all contributions of norm C a client made.

    Any two of them differ by 2 C at most, so the noise's standard deviation is :math:`2 z C`. Whoever adds or removes
    windows changes the contribution by no more, so this also holds for the unit "window".

    Args:
        clip_norm: C, which the contribution must have been clipped to.
        noise_multiplier: z.
    """
    return GaussianMechanism(2.0 * clip_norm, noise_multiplier)


def fit_deviation(noise: LocalNoise, clip_norm: float, learning_rate: float, steps: int) -> float:
    """Return the standard deviation of the noise in an update, or the sum of those of its steps.

    Args:
        noise: what clients add.
        clip_norm: L2 bound of an update.
        learning_rate: of a local step.
        steps: local steps.
    """
    if isinstance(noise.unit, WindowUnit):
        return learning_rate * steps * noise.unit.clip_norm * noise.noise_multiplier
    return 2.0 * clip_norm * noise.noise_multiplier


def upload_bound(clip_norm: float, deviation: float, n_values: int) -> float:
    """Return the L2 bound of one client's noised upload, which clients keep to and servers check.

    Args:
        clip_norm: bound of what is below the noise.
        deviation: standard deviation of the noise in each number, or the sum of those of several steps.
        n_values: how many numbers an upload has.
    """
    return clip_norm + deviation * (math.sqrt(n_values) + TAIL)
