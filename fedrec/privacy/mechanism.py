"""The Gaussian mechanism: clip, add up, add noise; and a receipt without which there is no noise to be had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedrec import params as named
from fedrec.errors import PrivacyError
from fedrec.params import Array, Params
from fedrec.privacy.clip import clip_factors
from fedrec.privacy.events import GaussianEvent
from fedrec.privacy.ledger import Charge
from fedrec.privacy.noise import NoiseSource, Shape

Draw = Callable[[str, Shape], NDArray[np.float64]]
"""Gives the noise of a tensor."""


@dataclass(frozen=True)
class GaussianMechanism:
    r"""A sum of bounded contributions, released with Gaussian noise.

    .. math:: \frac{1}{m} \Big( \sum_u x_u \min(1, C / |x_u|) + z C \, \mathcal{N}(0, I) \Big)

    Attributes:
        clip_norm: C, the L2 bound of one person's whole contribution.
        noise_multiplier: z.

    Source: McMahan et al., ICLR 2018, algorithm 1 (the estimator with a fixed denominator).
    """

    clip_norm: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        """Refuse what no guarantee can be given for."""
        if not (self.clip_norm > 0 and np.isfinite(self.clip_norm)):
            raise PrivacyError(f"The clip norm must be a number above 0, not {self.clip_norm:g}.")
        if not (self.noise_multiplier > 0 and np.isfinite(self.noise_multiplier)):
            raise PrivacyError(f"The noise multiplier must be a number above 0, not {self.noise_multiplier:g}.")

    def factors(self, norms: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return what to multiply each contribution by; 0 for one that is not finite."""
        return clip_factors(norms, self.clip_norm)

    def event(self, sampling: float = 1.0) -> GaussianEvent:
        """Return what one release costs, when each person is in the sum with this probability."""
        if not 0 < sampling <= 1:
            raise PrivacyError(f"A sampling rate lies in (0, 1], not {sampling:g}.")
        return GaussianEvent(noise_multiplier=self.noise_multiplier, sampling=sampling)

    def noised(self, total: Params, expected_cohort: float, charge: Charge, noise: NoiseSource) -> dict[str, Array]:
        """Return ``(total + noise) / expected_cohort``, and use up the charge.

        Args:
            total: the sum of clipped contributions.
            expected_cohort: a public number; never how many came.
            charge: the ledger's receipt for exactly this release.
            noise: where the noise comes from.

        Returns:
            As `total`, in its dtypes; noise is added in float64, whole numbers become float64.

        Raises:
            PrivacyError: the charge is for another release or was used before, the total is not finite, or the cohort
                is no number above 0.
        """
        check_releasable(total, expected_cohort)
        charge.use(self.noise_multiplier, self.clip_norm)
        deviation = self.clip_norm * self.noise_multiplier
        return noisy_mean(total, expected_cohort, lambda name, shape: deviation * noise.normal(shape))


def check_releasable(total: Params, expected_cohort: float) -> None:
    """Raise `PrivacyError` for a sum that no noise can hide anybody in, or a cohort that is no number above 0."""
    if not (expected_cohort > 0 and np.isfinite(expected_cohort)):
        raise PrivacyError(f"The expected cohort must be a number above 0, not {expected_cohort:g}.")
    broken = named.non_finite(total)
    if broken:
        raise PrivacyError(f"'{broken[0]}' is not finite, so no noise can hide anybody in it.")


def noisy_mean(total: Params, expected_cohort: float, draw: Draw) -> dict[str, Array]:
    """Return ``(total + noise) / expected_cohort`` in the dtypes of `total`, whole numbers as float64.

    The noise is added in float64. It pays nothing: mechanisms call it once their charge is used.
    """
    return {
        name: ((value + draw(name, value.shape)) / expected_cohort).astype(
            value.dtype if value.dtype.kind == "f" else np.float64
        )
        for name, value in total.items()
    }
