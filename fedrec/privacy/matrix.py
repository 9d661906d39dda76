"""Correlated noise: a banded matrix mechanism, whose noise cancels in sums over rounds and which needs no sampling."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import PrivacyError
from fedrec.params import Array, Params
from fedrec.privacy.events import MatrixEvent
from fedrec.privacy.ledger import Charge
from fedrec.privacy.mechanism import check_releasable, noisy_mean
from fedrec.privacy.noise import KeyedNoise, Shape
from fedrec.random import Key

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class BandedStrategy:
    r"""How noise is correlated over the rounds of a stage: a lower-triangular Toeplitz matrix C with few diagonals.

    Round t releases :math:`x_t + (C^{-1} Z)_t` with the rows of Z independent, so the model, which adds rounds up,
    carries the noise :math:`A C^{-1} Z` with A the matrix of prefix sums.

    Attributes:
        coefficients: [band] the first column of C, from the diagonal down; the first is 1.
        rounds: n, rows of C.
        min_separation: how many rounds lie at least between the starts of two rounds of one person; at least the band.

    Source: Choquette-Choo et al., NeurIPS 2023, arXiv:2306.08153, sections 3 and 4; Toeplitz as in McKenna,
    arXiv:2405.15913.
    """

    coefficients: tuple[float, ...]
    rounds: int
    min_separation: int

    def __post_init__(self) -> None:
        """Refuse a matrix whose sensitivity is not the closed form below."""
        if not self.coefficients or self.coefficients[0] != 1.0 or not np.isfinite(self.coefficients).all():
            raise PrivacyError("The first coefficient of a banded strategy is 1, and all are finite.")
        if self.rounds < 1:
            raise PrivacyError(f"Correlated noise needs a round at least, not {self.rounds}.")
        if self.band > self.min_separation:
            raise PrivacyError(
                f"Noise that is correlated over {self.band} rounds needs as many rounds between two participations of "
                f"a person, not {self.min_separation}; lower privacy.fit_noise.band or raise training.cohort.groups."
            )

    @property
    def band(self) -> int:
        """Over how many rounds noise is correlated."""
        return len(self.coefficients)

    @property
    def max_participations(self) -> int:
        """How often one person can take part."""
        return -(-self.rounds // self.min_separation)

    @property
    def sensitivity(self) -> float:
        r"""What one person changes of the encoded stream ``C x`` at most, in clip norms.

        Columns that lie at least a band apart have no row in common, so they are orthogonal, whatever a person sends:
        :math:`\max_\pi \sqrt{\sum_{j \in \pi} |C_{:,j}|^2}` over the patterns of participation. Columns at the end
        are cut off and never longer than earlier ones, so the earliest pattern 0, b, 2b, ... is the worst.

        Source: Choquette-Choo et al., arXiv:2306.08153, section 3.
        """
        return math.sqrt(_squared_sensitivity(np.array(self.coefficients), self.rounds, self.min_separation))

    @property
    def error(self) -> float:
        """Mean squared noise of the model over the rounds, per parameter, in squares of multiplier times clip norm.

        ``sensitivity^2 |A C^-1|_F^2 / n``. Independent noise has ``k (n + 1) / 2``.
        """
        squared, _ = _prefix_error(np.array(self.coefficients), self.rounds)
        return squared * self.sensitivity**2 / self.rounds


def square_root(band: int) -> Vector:
    r"""Return the first coefficients of the square root of the matrix of prefix sums: :math:`\binom{2k}{k} / 4^k`.

    Source: Fichtenberger, Henzinger and Upadhyay, ICML 2023, theorem 1; cut off at a band as in Kalinin and Lampert,
    NeurIPS 2024, arXiv:2405.13763.

    >>> square_root(3).tolist()
    [1.0, 0.5, 0.375]
    """
    k = np.arange(1, band)
    return np.concatenate(([1.0], np.cumprod((2 * k - 1) / (2 * k))))


@lru_cache(maxsize=64)
def optimised(rounds: int, band: int, min_separation: int) -> BandedStrategy:
    """Return the strategy of the least error for rounds that are added up.

    Starts from `square_root` and descends over the coefficients, with their gradient in closed form: a tenth of a
    second for thousands of rounds. The result has 2 to 15 % less noise than the square root cut off at the band.

    Args:
        rounds: n, rounds of the stage.
        band: over how many rounds noise is correlated; 1 is independent noise. More than `rounds` is as many.
        min_separation: how many rounds lie at least between the starts of two participations of one person.

    Raises:
        PrivacyError: the band is wider than the separation.
    """
    band = min(band, rounds)
    start = BandedStrategy(tuple(square_root(band).tolist()), rounds, min_separation)
    if band == 1:
        return start
    from scipy.optimize import minimize

    def objective(rest: Vector) -> tuple[float, Vector]:
        c = np.concatenate(([1.0], rest))
        error, slope = _prefix_error(c, rounds)
        squared = _squared_sensitivity(c, rounds, min_separation)
        columns = _column_lengths(rounds, band, min_separation)
        rise = 2.0 * c * (columns[None, :] > np.arange(band)[:, None]).sum(axis=1)
        return math.log(error) + math.log(squared), (slope / error + rise / squared)[1:]

    found = minimize(objective, np.array(start.coefficients[1:]), jac=True, method="L-BFGS-B")
    best = BandedStrategy((1.0, *found.x.tolist()), rounds, min_separation)
    return best if best.error < start.error else start


def _column_lengths(rounds: int, band: int, min_separation: int) -> NDArray[np.int64]:
    """Return how many coefficients the columns 0, b, 2b, ... hold."""
    return np.minimum(band, rounds - np.arange(0, rounds, min_separation))


def _squared_sensitivity(c: Vector, rounds: int, min_separation: int) -> float:
    return float(np.cumsum(c**2)[_column_lengths(rounds, len(c), min_separation) - 1].sum())


def _prefix_error(c: Vector, rounds: int) -> tuple[float, Vector]:
    """Return the squared Frobenius norm of ``A C^-1``, and its gradient by the coefficients.

    The matrix is Toeplitz with the power series ``w = 1 / ((1 - x) c(x))``, and ``dw / dc_k = -x^k w / c``.
    """
    from scipy.signal import lfilter

    impulse = np.zeros(rounds)
    impulse[0] = 1.0
    w: Vector = np.cumsum(lfilter([1.0], c, impulse))
    v: Vector = lfilter([1.0], c, w)
    weighted = (rounds - np.arange(rounds)) * w
    slope = np.array([-2.0 * float(weighted[k:] @ v[: rounds - k]) for k in range(len(c))])
    return float(weighted @ w), slope


class CorrelatedNoise:
    r"""The rows of :math:`C^{-1} Z`, one after the other, each handed out once.

    .. math:: y_t = z_t - \sum_{k=1}^{band - 1} c_k \, y_{t-k}

    Holds the last band - 1 rows, in float64, never more. Row t of Z is a hash of the key and t, so whoever has the key
    can make all rows again, to go on after a crash or to subtract them: the key is the secret of the whole stage.
    """

    def __init__(self, strategy: BandedStrategy, key: Key, shapes: Mapping[str, Shape]) -> None:
        """Stand before the first row of tensors of these shapes."""
        self.strategy = strategy
        self._key = key
        self._shapes = {name: tuple(shape) for name, shape in sorted(shapes.items())}
        self._past: deque[dict[str, Vector]] = deque(maxlen=strategy.band - 1)
        self._next = 0

    def row(self, t: int) -> dict[str, Vector]:
        """Return row t, with standard normal rows of Z; rows before it are made and forgotten.

        Raises:
            PrivacyError: the row was handed out or passed by, or the strategy has fewer rows.
        """
        if not self._next <= t < self.strategy.rounds:
            raise PrivacyError(
                f"Row {t} of the correlated noise was used or never planned; rows {self._next} to "
                f"{self.strategy.rounds - 1} are left, and none is used twice."
            )
        row: dict[str, Vector] = {}
        for number in range(self._next, t + 1):
            row = self._made(number)
            self._past.appendleft(row)
        self._next = t + 1
        return row

    def _made(self, number: int) -> dict[str, Vector]:
        row: dict[str, Vector] = {}
        for name, shape in self._shapes.items():
            value = KeyedNoise(self._key.child("row", number, name)).normal(shape)
            for coefficient, past in zip(self.strategy.coefficients[1:], self._past, strict=False):
                value -= coefficient * past[name]
            row[name] = value
        return row


@dataclass(frozen=True)
class BandedMechanism:
    """A stream of sums of bounded contributions, released with correlated noise: one Gaussian release of all of them.

    Attributes:
        clip_norm: L2 bound of one person's contribution to one round.
        noise_multiplier: z, deviation of Z over what one person changes of the encoded stream.
        strategy: C.

    Source: Choquette-Choo et al., arXiv:2306.08153, algorithm 1; that contributions may depend on what was released
    before: Denisov et al., NeurIPS 2022, arXiv:2202.08312, theorem 2.1.
    """

    clip_norm: float
    noise_multiplier: float
    strategy: BandedStrategy

    @property
    def deviation(self) -> float:
        """Standard deviation of Z."""
        return self.clip_norm * self.noise_multiplier * self.strategy.sensitivity

    def event(self) -> MatrixEvent:
        """Return what the whole stage costs."""
        strategy = self.strategy
        return MatrixEvent(
            noise_multiplier=self.noise_multiplier,
            rounds=strategy.rounds,
            band=strategy.band,
            min_separation=strategy.min_separation,
            max_participations=strategy.max_participations,
            sensitivity=strategy.sensitivity,
        )

    def noised(self, total: Params, expected_cohort: float, charge: Charge, row: Params) -> dict[str, Array]:
        """Return ``(total + deviation row) / expected_cohort``, and use up one round of the charge.

        Args:
            total: the round's sum of clipped contributions.
            expected_cohort: a public number; never how many came.
            charge: the ledger's receipt for the stage.
            row: of `CorrelatedNoise`, for this round.

        Raises:
            PrivacyError: the charge is for another stage or used up, or the total is not finite.
        """
        check_releasable(total, expected_cohort)
        charge.use(self.noise_multiplier, self.clip_norm)
        return noisy_mean(total, expected_cohort, lambda name, shape: self.deviation * row[name].reshape(tuple(shape)))
