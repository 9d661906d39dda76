"""The accountant against Opacus', against closed forms, and against itself."""

from __future__ import annotations

import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from fedrec.errors import PrivacyError
from fedrec.privacy.accounting import calibrate, check_delta, epsilon
from fedrec.privacy.events import GaussianEvent, MatrixEvent

DELTA = 1e-5
CASES = [(0.6, 1.0, 1), (1.5, 512 / 6040, 1000), (1.0, 0.01, 200), (0.8, 0.2, 5), (4.0, 0.5, 50)]


def event(noise: float, sampling: float = 1.0, count: int = 1) -> GaussianEvent:
    return GaussianEvent(noise_multiplier=noise, sampling=sampling, count=count)


@pytest.mark.parametrize(("noise", "sampling", "count"), CASES)
def test_two_accountants_agree_within_one_percent(noise: float, sampling: float, count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant

        other = PRVAccountant()
        other.history = [(noise, sampling, count)]
        theirs = other.get_epsilon(DELTA, eps_error=0.001)
    ours = epsilon([event(noise, sampling, count)], DELTA)
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize(("noise", "sampling", "count"), CASES)
def test_rdp_is_never_below_the_tight_accountant_and_agrees_with_opacus(
    noise: float, sampling: float, count: int
) -> None:
    ours = epsilon([event(noise, sampling, count)], DELTA, "rdp")
    assert ours >= epsilon([event(noise, sampling, count)], DELTA)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import RDPAccountant

        other = RDPAccountant()
        other.history = [(noise, sampling, count)]
        theirs = other.get_epsilon(DELTA)
    assert ours == pytest.approx(theirs, rel=0.02)


def analytic(noise: float) -> float:
    """Return epsilon of one Gaussian release from Balle and Wang, ICML 2018, theorem 8."""

    def delta_at(eps: float) -> float:
        a, b = 1 / (2 * noise), eps * noise
        return float(stats.norm.cdf(a - b) - math.exp(eps) * stats.norm.cdf(-a - b))

    return float(optimize.brentq(lambda eps: delta_at(eps) - DELTA, 0.0, 200.0))


@pytest.mark.parametrize("noise", [0.5998, 1.0813, 1.9938, 3.7303])
def test_one_release_is_the_analytic_gaussian(noise: float) -> None:
    ours = epsilon([event(noise)], DELTA)
    assert ours == pytest.approx(analytic(noise), rel=1e-3)
    assert ours >= analytic(noise) - 1e-6


def test_unsampled_releases_compose_as_one_and_order_does_not_matter() -> None:
    assert epsilon([event(2.0, count=4)], DELTA) == pytest.approx(epsilon([event(1.0)], DELTA), rel=1e-9)
    mixed = [event(2.0), event(1.5, 0.1, 20), event(2.0)]
    assert epsilon(mixed, DELTA) == epsilon(mixed[::-1], DELTA)


def test_a_matrix_event_is_one_release_without_sampling() -> None:
    whole = MatrixEvent(
        noise_multiplier=1.0, rounds=50, band=4, min_separation=4, max_participations=3, sensitivity=1.7
    )
    assert epsilon([whole], DELTA) == epsilon([event(1.0)], DELTA)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.7, 5), st.floats(0.01, 1), st.integers(1, 200))
def test_more_releases_less_noise_or_a_larger_sample_never_cost_less(noise: float, sampling: float, count: int) -> None:
    base = epsilon([event(noise, sampling, count)], DELTA, "rdp")
    assert epsilon([event(noise, sampling, count + 1)], DELTA, "rdp") >= base
    assert epsilon([event(noise * 1.1, sampling, count)], DELTA, "rdp") <= base + 1e-9


@pytest.mark.parametrize("target", [0.5, 2.0, 8.0])
def test_calibration_spends_the_budget_and_never_more(target: float) -> None:
    def life(scale: float) -> list[GaussianEvent]:
        return [event(scale, 0.1, 50), event(5 * scale)]

    scale = calibrate(life, target, DELTA)
    assert epsilon(life(scale), DELTA) <= target
    assert epsilon(life(scale / 1.01), DELTA) > target


def test_nothing_costs_nothing() -> None:
    assert epsilon([], DELTA) == 0.0


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_that_is_none_is_refused(target: float) -> None:
    with pytest.raises(PrivacyError, match="above 0"):
        calibrate(lambda scale: [event(scale)], target, DELTA)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1])
def test_a_delta_that_is_none_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="between 0 and 1"):
        epsilon([event(1.0)], delta)


def test_a_delta_that_allows_to_publish_somebody_is_warned_about() -> None:
    assert check_delta(1e-5, 943) is None
    warning = check_delta(1e-3, 1000)
    assert warning is not None
    assert "1,000 people" in warning
