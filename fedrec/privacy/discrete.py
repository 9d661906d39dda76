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
from fedrec.privacy.noise import KeyStream, Uniforms, discrete_gaussian

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


@dataclass(frozen=True)
class ClientNoise:
    """The discrete Gaussian noise of one client, in units: two parts, of which one may be taken off afterwards.

    Attributes:
        base: parameter of the part that stays, whoever falls silent.
        extra: parameter of the part that only some of those who stay must keep; 0: there is none.
    """

    base: float
    extra: float


def effective_multiplier(sensitivity: float, total: float, part: float, n_parts: int, n_values: int) -> float:
    r"""Return the noise multiplier of a continuous Gaussian that is no more private than a sum of discrete ones.

    A sum of discrete Gaussians is not one, but nearly: if one more of parameter t is added to a sum of variance V, the
    logarithm of any probability is off by at most :math:`5 e^{-2 \pi^2 / (1/V + 1/t^2)}`. Of parts of parameter s at
    least the k-th addition has :math:`V \ge k s^2`. So with
    :math:`\tau = 10 \sum_{k=1}^{n-1} e^{-2 \pi^2 s^2 k / (k+1)}` the Renyi divergence of the whole is at most
    :math:`\frac{\alpha}{2} (\Delta / S + \tau \sqrt d)^2`, that of a Gaussian with multiplier
    :math:`1 / (\Delta / S + \tau \sqrt d)`.

    Args:
        sensitivity: Delta, in units.
        total: S, the root of the sum of all squared parameters, at least.
        part: s, the smallest parameter.
        n_parts: n, how many are added up at most.
        n_values: d.

    Returns:
        0 where the bound does not hold, below s = 1/2.

    Source: Kairouz et al., ICML 2021, theorem 9 (two summands) and proposition 14, its third term (equal ones).
    """
    if part < 0.5:
        return 0.0
    exponent = -2 * (math.pi * part) ** 2
    # The first terms as they are, the others by the largest of them: never too small.
    first = [math.exp(exponent * k / (k + 1)) for k in range(1, min(n_parts, 16))]
    tau = 10 * (sum(first) + max(n_parts - 16, 0) * math.exp(exponent * 16 / 17))
    return 1.0 / (sensitivity / total + tau * math.sqrt(n_values))


def client_noise(grid: Grid, noise_multiplier: float, fewest: int, most: int) -> ClientNoise:
    r"""Return the noise of each client, so that both parts of `fewest`, or the bases of `most`, are the charged noise.

    .. math:: base^2 = V / most, \qquad base^2 + extra^2 = V / fewest, \qquad V = (z \Delta)^2 + 1 .

    One unit of variance is added because a discrete Gaussian of the same parameter is, at some thresholds, less private
    than the continuous one that the ledger charges: by some :math:`V^{-1}` in epsilon. With it, it never is.

    Args:
        grid: what contributions are rounded to; the multiplier is over its `sensitivity`, rounding included.
        noise_multiplier: what the ledger was charged.
        fewest: how many clients that tell nobody their noise are in every sum that is opened.
        most: how many such clients there are; as many as `fewest` where nothing is ever taken off.

    Raises:
        MaskingError: units are so coarse that the noise would have to be much larger.
    """
    if noise_multiplier == 0:
        return ClientNoise(0.0, 0.0)
    plain = total = math.hypot(noise_multiplier * grid.sensitivity, 1.0)
    while True:
        base, extra = total / math.sqrt(most), total * math.sqrt(max(0.0, 1 / fewest - 1 / most))
        part = min(base, extra) if most > fewest else base
        found = effective_multiplier(grid.sensitivity, total, part, 2 * most, grid.n_values)
        if found >= noise_multiplier:
            return ClientNoise(base, extra if most > fewest else 0.0)
        if total > MOST_INFLATION * plain:
            raise MaskingError(
                f"Noise of {part:.2g} units a client is too coarse to account for; set ring_bits to 64 or take fewer "
                "clients."
            )
        total *= 1 + 1e-12 if total == plain else 1.001


def extra_noise(key: bytes, deviation: float, n_values: int) -> NDArray[np.int64]:
    """Return the part of a client's noise that may be taken off: the same for whoever has the key.

    Machines whose logarithms differ in the last bit get the same numbers but for one unit in some of 1e10.
    """
    return discrete_gaussian(KeyStream(key), deviation, (n_values,))
