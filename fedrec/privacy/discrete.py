"""Contributions as whole numbers with discrete Gaussian noise, so that they can be masked and added exactly.

Source: Kairouz, Liu and Steinke, ICML 2021 (the distributed discrete Gaussian mechanism).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import MaskingError
from fedrec.privacy.masking import Ring
from fedrec.privacy.noise import Uniforms

FINEST = 40
"""A clip norm has at most 2^40 units: then every step below is exact in float64."""
ROUNDING_TRIES = 64
MOST_INFLATION = 1.05
"""Noise may be this much above what a continuous Gaussian would need, before a finer grid is asked for."""
OVERFLOW_BITS = 40
"""A sum leaves the ring with a probability of at most 2^-40."""
_SLACK = 1e-8
"""What float64 sums of squares may be wrong by, many times over."""


@dataclass(frozen=True)
class Grid:
    r"""The whole numbers that contributions are rounded to: one unit is :math:`2^{-e}`.

    Attributes:
        clip_norm: C, the L2 bound of a contribution before it is rounded.
        n_values: d, how many numbers it has.
        exponent: e.
        ring_bits: 32 or 64, the bits of the ring that it is added in.
    """

    clip_norm: float
    n_values: int
    exponent: int
    ring_bits: int

    @property
    def dtype(self) -> np.dtype[np.uint32] | np.dtype[np.uint64]:
        """The ring's numbers."""
        return np.dtype(np.uint32) if self.ring_bits == 32 else np.dtype(np.uint64)

    @property
    def sensitivity(self) -> float:
        r"""L2 bound of a rounded contribution in units, which `encode` checks on the whole numbers themselves.

        With :math:`c = 2^e C` and :math:`\beta = e^{-1/2}`,

        .. math:: \min\Big(c + \sqrt d,\; \sqrt{c^2 + d/4 + \sqrt{2 \ln(1/\beta)}\,(c + \sqrt d / 2)}\Big) .

        Source: Kairouz et al., ICML 2021, proposition 22.
        """
        c, d = math.ldexp(self.clip_norm, self.exponent), self.n_values
        return min(c + math.sqrt(d), math.sqrt(c * c + d / 4 + c + math.sqrt(d) / 2)) * (1 + _SLACK)

    def encode(self, values: NDArray[np.floating], uniforms: Uniforms) -> NDArray[np.int64]:
        """Return a contribution in whole units, rounded at random, its norm at most `sensitivity`.

        Rounding is repeated until the bound holds. A contribution that is longer than the clip norm is scaled down to
        it; one that is not finite becomes zeros.

        Args:
            values: [d] numbers.
            uniforms: gives numbers in (0, 1].
        """
        wide = np.asarray(values, np.float64)
        norm = math.sqrt(float(wide @ wide)) if bool(np.isfinite(wide).all()) else math.inf
        if not math.isfinite(norm):
            return np.zeros(len(wide), np.int64)
        scaled = np.ldexp(wide, self.exponent) * min(1.0, self.clip_norm / norm if norm > 0 else 1.0)
        low = np.floor(scaled)
        rest, bound = scaled - low, self.sensitivity**2
        for _ in range(ROUNDING_TRIES):
            rounded = low + (uniforms(len(wide)) <= rest)
            if float(rounded @ rounded) <= bound:
                return rounded.astype(np.int64)
        return np.trunc(scaled).astype(np.int64)  # towards zero: never longer

    def to_ring(self, units: NDArray[np.int64]) -> Ring:
        """Return whole numbers as numbers of the ring, negative ones wrapped around."""
        wide = units.astype(np.uint64)
        return wide if self.ring_bits == 64 else wide.astype(np.uint32)

    def from_ring(self, total: Ring) -> NDArray[np.int64]:
        """Return numbers of the ring as signed whole numbers."""
        return total.view(np.int32 if self.ring_bits == 32 else np.int64).astype(np.int64)

    def decode(self, units: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return whole units as numbers."""
        return np.ldexp(units.astype(np.float64), -self.exponent)

    def reach(self, n_clients: int, noise_multiplier: float, excess: float) -> float:
        """Return what no number of the sum's exceeds, but for the chance that `OVERFLOW_BITS` names.

        All clients may put their whole norm into one number; the noise's tail is sub-Gaussian.

        Args:
            n_clients: how many may be added up.
            noise_multiplier: of the least noise, over `sensitivity`.
            excess: how often the variance of that the noise may have.
        """
        tail = math.sqrt(2 * math.log(2 * self.n_values * 2.0**OVERFLOW_BITS))
        deviation = noise_multiplier * self.sensitivity * math.sqrt(excess) * MOST_INFLATION
        return n_clients * self.sensitivity + tail * deviation


def finest(grid: Grid, n_clients: int, noise_multiplier: float, excess: float) -> Grid:
    """Return the grid with the smallest unit on which no sum leaves the ring.

    Raises:
        MaskingError: there is none on which rounding would not cost more than noise.
    """
    _, top = math.frexp(grid.clip_norm)
    for exponent in range(FINEST - top, -top - 2, -1):
        found = replace(grid, exponent=exponent)
        if found.reach(n_clients, noise_multiplier, excess) < 2.0 ** (grid.ring_bits - 1):
            return found
    raise MaskingError(
        f"A sum of {n_clients:,} clients does not fit {grid.ring_bits} bits; set ring_bits to 64 or take fewer clients."
    )


def effective_multiplier(sensitivity: float, deviation: float, n_clients: int, n_values: int) -> float:
    r"""Return the noise multiplier of a continuous Gaussian that is no more private than a sum of discrete ones.

    A sum of n discrete Gaussians of parameter s is not one, but nearly: with
    :math:`\tau = 10 \sum_{k=1}^{n-1} e^{-2 \pi^2 s^2 k / (k+1)}` its Renyi divergence is at most
    :math:`\frac{\alpha}{2} (\Delta / (\sqrt n s) + \tau \sqrt d)^2`, that of a Gaussian with multiplier
    :math:`1 / (\Delta / (\sqrt n s) + \tau \sqrt d)`.

    Args:
        sensitivity: Delta, in units.
        deviation: s, of each client's noise.
        n_clients: n, how many honest clients add noise at least; more only add to privacy.
        n_values: d.

    Returns:
        0 where the bound does not hold, below s = 1/2.

    Source: Kairouz et al., ICML 2021, proposition 14, its third term, and theorem 1.
    """
    if deviation < 0.5:
        return 0.0
    exponent = -2 * (math.pi * deviation) ** 2
    # The first terms as they are, the others by the largest of them: never too small.
    first = [math.exp(exponent * k / (k + 1)) for k in range(1, min(n_clients, 16))]
    tau = 10 * (sum(first) + max(n_clients - 16, 0) * math.exp(exponent * 16 / 17))
    return 1.0 / (sensitivity / (math.sqrt(n_clients) * deviation) + tau * math.sqrt(n_values))


def noise_deviation(grid: Grid, noise_multiplier: float, n_honest: int) -> float:
    """Return the parameter of the discrete Gaussian that each client adds, so that `n_honest` together suffice.

    Args:
        grid: what contributions are rounded to; the multiplier is over its `sensitivity`, rounding included.
        noise_multiplier: what the ledger was charged.
        n_honest: how many clients that tell nobody their noise are in every sum that is opened.

    Raises:
        MaskingError: units are so coarse that the noise would have to be much larger.
    """
    if noise_multiplier == 0:
        return 0.0
    plain = noise_multiplier * grid.sensitivity / math.sqrt(n_honest)
    deviation = max(plain, 0.5)
    while effective_multiplier(grid.sensitivity, deviation, n_honest, grid.n_values) < noise_multiplier:
        deviation *= 1 + 1e-12 if deviation == plain else 1.001
        if deviation > MOST_INFLATION * plain:
            break
    if deviation > MOST_INFLATION * plain:
        raise MaskingError(
            f"Noise of {plain:.2g} units a client is too coarse to account for; set ring_bits to 64 or take fewer "
            "clients."
        )
    return deviation
