"""A clip norm that follows a quantile of the lengths of updates, learnt from a noised count beside the noised sum."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedrec.errors import PrivacyError
from fedrec.params import Array, Params
from fedrec.privacy.events import GaussianEvent
from fedrec.privacy.ledger import Charge
from fedrec.privacy.mechanism import GaussianMechanism, check_releasable, noisy_mean
from fedrec.privacy.noise import NoiseSource
from fedrec.privacy.settings import AdaptiveClipping


@dataclass(frozen=True)
class AdaptiveMechanism:
    r"""A sum of clipped updates and a count of those that needed no clipping, both with noise, as one release.

    A person adds a vector of norm C at most to the sum, with noise :math:`z_\Delta C`, and :math:`b - 1/2`, b 0 or 1,
    to the count, with noise :math:`\sigma_b`. Scaled to their noise the two are one Gaussian release of multiplier z:

    .. math:: z^{-2} = z_\Delta^{-2} + (2 \sigma_b)^{-2}

    Attributes:
        clip_norm: C of this round.
        noise_multiplier: z, what is charged.
        count_noise: sigma_b, in people; above z / 2.

    Source: Andrew, Thakkar, McMahan and Ramaswamy, NeurIPS 2021, arXiv:1905.03871, algorithm 1 and theorem 1.
    """

    clip_norm: float
    noise_multiplier: float
    count_noise: float

    def __post_init__(self) -> None:
        """Refuse what no guarantee can be given for."""
        GaussianMechanism(self.clip_norm, self.noise_multiplier)
        if not (self.count_noise > self.noise_multiplier / 2 and math.isfinite(self.count_noise)):
            raise PrivacyError(
                f"A count with noise {self.count_noise:g} alone costs more than a release of multiplier "
                f"{self.noise_multiplier:g}; set privacy.adaptive.count_noise above {self.noise_multiplier / 2:g}, or "
                "leave it out."
            )

    @property
    def sum_multiplier(self) -> float:
        r"""Noise multiplier of the sum: :math:`z_\Delta = (z^{-2} - (2 \sigma_b)^{-2})^{-1/2}`, above z."""
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self.count_noise) ** -2)

    def event(self, sampling: float = 1.0) -> GaussianEvent:
        """Return what the sum and the count cost together."""
        return GaussianMechanism(self.clip_norm, self.noise_multiplier).event(sampling)

    def noised(
        self, total: Params, n_within: float, n_clients: int, expected_cohort: float, charge: Charge, noise: NoiseSource
    ) -> tuple[dict[str, Array], float]:
        """Return the noised mean update and the noised share of people within the clip norm, and use up the charge.

        Args:
            total: the sum of clipped updates.
            n_within: how many of the clients needed no clipping.
            n_clients: how many are in the sum.
            expected_cohort: a public number, which both are divided by; never how many came.
            charge: the ledger's receipt for exactly this release.
            noise: where the noise comes from.

        Raises:
            PrivacyError: the charge is for another release or was used, the total is not finite, or the count is
                impossible.
        """
        check_releasable(total, expected_cohort)
        if not 0 <= n_within <= n_clients:
            raise PrivacyError(f"{n_within:g} of {n_clients} clients cannot be within the clip norm.")
        charge.use(self.noise_multiplier, self.clip_norm)
        deviation = self.clip_norm * self.sum_multiplier
        mean = noisy_mean(total, expected_cohort, lambda name, shape: deviation * noise.normal(shape))
        centred = n_within - n_clients / 2 + self.count_noise * float(noise.normal(()))
        return mean, centred / expected_cohort + 0.5


def count_noise(settings: AdaptiveClipping, expected_cohort: float, noise_multiplier: float) -> float:
    """Return the deviation of the count's noise: as set, or a twentieth of the cohort but the multiplier at least.

    With the default the sum's multiplier is 1.16 times the charged one at most, and hardly more in a large cohort.
    """
    return settings.count_noise or max(expected_cohort / 20, noise_multiplier)


def next_clip_norm(settings: AdaptiveClipping, clip_norm: float, share_within: float) -> float:
    r"""Return the clip norm of the next round: :math:`C \exp(-\eta (b - \gamma))`; the noised share is cut to [0, 1].

    Source: Andrew et al., arXiv:1905.03871, section 2.1.

    >>> next_clip_norm(AdaptiveClipping(quantile=0.5), 2.0, 0.5)
    2.0
    """
    share = min(max(share_within, 0.0), 1.0)
    return clip_norm * math.exp(-settings.learning_rate * (share - settings.quantile))
