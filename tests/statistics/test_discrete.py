"""What the ledger says of discrete Gaussian noise against exact sums over the whole numbers."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import brentq

from fedrec.privacy.accounting import epsilon
from fedrec.privacy.discrete import Grid, client_noise, finest
from fedrec.privacy.events import GaussianEvent
from fedrec.privacy.settings import SecureSum
from fedrec.privacy.terms import agree_on

DELTA = 1e-5
Mass = NDArray[np.float64]


def exact_epsilon(deviation: float, shift: int) -> float:
    r"""Return the smallest epsilon of a discrete Gaussian between sums that differ by `shift`.

    .. math:: \delta = P[X > \epsilon \sigma^2 / \Delta - \Delta / 2]
              - e^\epsilon P[X > \epsilon \sigma^2 / \Delta + \Delta / 2]

    Source: Canonne, Kamath and Steinke, NeurIPS 2020, theorem 7; the distribution is symmetric, so one side suffices.
    """
    reach = int(12 * deviation) + shift + 2
    whole = 1.0 + 2.0 * float(np.exp(-((np.arange(1, reach) / deviation) ** 2) / 2).sum())

    def excess(eps: float) -> float:
        first = math.floor(eps * deviation**2 / shift - shift / 2) + 1
        k = np.arange(first, max(first + 1, reach), dtype=np.float64)
        gain = np.exp(-((k / deviation) ** 2) / 2) - np.exp(eps - (((k + shift) / deviation) ** 2) / 2)
        return float(gain.sum()) / whole - DELTA

    return float(brentq(excess, 1e-9, 20.0 + shift**2 / deviation**2 * 10, xtol=1e-13)) if excess(1e-9) > 0 else 0.0


def claimed(multiplier: float, accountant: str = "pld") -> float:
    return epsilon([GaussianEvent(noise_multiplier=multiplier)], DELTA, accountant)  # type: ignore[arg-type]


@pytest.mark.parametrize("multiplier", [0.3, 0.6, 1.0, 2.0, 4.0, 10.0])
def test_with_a_unit_of_variance_more_the_claim_is_never_below_the_truth(multiplier: float) -> None:
    plainly_below = 0
    for shift in (*range(1, 30), 64, 100, 333, 1000):
        deviation = multiplier * shift
        truth = exact_epsilon(math.hypot(deviation, 1.0), shift)
        assert truth <= claimed(multiplier), shift
        # The proven bound: 1/2 (shift / deviation)^2 zero-concentrated privacy, whatever the unit (their theorem 4).
        assert exact_epsilon(deviation, shift) <= claimed(multiplier, "rdp")
        plainly_below += exact_epsilon(deviation, shift) > claimed(multiplier)
    assert plainly_below  # without that unit the claim would be too small for some


def hockey_stick(p: Mass, q: Mass, eps: float) -> float:
    return float(np.maximum(p - math.exp(eps) * q, 0.0).sum())


def summed(parts: list[float], reach: int = 150) -> Mass:
    """Return the distribution of a sum of discrete Gaussians, by convolution."""
    x, total = np.arange(-reach, reach + 1), np.ones(1)
    for part in parts:
        one = np.exp(-((x / part) ** 2) / 2)
        total = np.convolve(total, one / one.sum())
    return total


@pytest.mark.parametrize(("multiplier", "fewest", "most"), [(0.8, 6, 9), (1.5, 4, 4), (3.0, 5, 8)])
def test_sums_of_clients_in_two_coordinates_are_as_private_as_the_ledger_says(
    multiplier: float, fewest: int, most: int
) -> None:
    grid = Grid(clip_norm=1.0, n_values=2, exponent=3, ring_bits=32)
    noise = client_noise(grid, multiplier, fewest, most)
    length = math.floor(grid.sensitivity)
    for parts in ([noise.base] * most, [math.hypot(noise.base, noise.extra)] * fewest):
        one = summed([part for part in parts if part])
        for shift in product(range(length + 1), repeat=2):
            if 0 < math.hypot(*shift) <= grid.sensitivity and shift[0] >= shift[1]:
                p, q = (np.outer(np.roll(one, a), np.roll(one, b)) for a, b in (shift, (0, 0)))
                assert hockey_stick(p, q, claimed(multiplier)) <= DELTA, (parts, shift)
                assert hockey_stick(q, p, claimed(multiplier)) <= DELTA


@pytest.mark.parametrize(("people", "values", "multiplier"), [(943, 131_328, 0.6), (6_040, 135_034, 3.7), (60, 9, 1.0)])
def test_on_the_grids_that_are_used_the_claim_is_the_truth_to_eight_digits(
    people: int, values: int, multiplier: float
) -> None:
    terms = agree_on("0" * 32, 0, 0, SecureSum(), people, (("x", (values,)),), 1.0, multiplier, "system")
    noise, least = terms.client_noise(people), terms.needed(people)
    for variance in (people * noise.base**2, least * (noise.base**2 + noise.extra**2)):
        scale = max(1.0, math.sqrt(variance) / 2e5)  # a coarser unit is the harder case, and fits a sum
        truth = exact_epsilon(math.sqrt(variance) / scale, math.floor(terms.grid.sensitivity / scale))
        assert truth <= claimed(multiplier) * (1 + 1e-9)
        assert truth == pytest.approx(claimed(multiplier), rel=1e-4)
    assert finest(terms.grid, people, multiplier, terms.excess) == terms.grid
