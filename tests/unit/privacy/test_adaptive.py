"""A learnt clip norm: both releases cost what is charged, and the norm goes to the quantile."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrec.errors import PrivacyError
from fedrec.privacy.accounting import epsilon
from fedrec.privacy.adaptive import AdaptiveMechanism, count_noise, next_clip_norm
from fedrec.privacy.clip import clip_factors
from fedrec.privacy.events import GaussianEvent
from fedrec.privacy.ledger import Charge, PrivacyLedger
from fedrec.privacy.noise import SeededNoise
from fedrec.privacy.settings import AdaptiveClipping
from fedrec.random import Key

ROOT = Key.from_seed(9)


def charge_of(mechanism: AdaptiveMechanism) -> Charge:
    book = PrivacyLedger(None, epsilon=None, delta=1e-5)
    return book.charge("round", mechanism.event(0.1), clip_norm=mechanism.clip_norm)


@given(st.floats(0.05, 50.0), st.floats(0.501, 200.0))
def test_sum_and_count_together_have_exactly_the_charged_multiplier(z: float, ratio: float) -> None:
    mechanism = AdaptiveMechanism(clip_norm=3.0, noise_multiplier=z, count_noise=z * ratio)
    # A person moves the sum by C and the centred count by 1/2, each over its own noise: two parts of one vector.
    moved = math.hypot(3.0 / (3.0 * mechanism.sum_multiplier), 0.5 / mechanism.count_noise)
    assert 1 / moved == pytest.approx(z, rel=1e-9)
    assert mechanism.sum_multiplier > z


def test_the_accountant_agrees_that_the_two_cost_what_one_costs() -> None:
    mechanism = AdaptiveMechanism(1.0, 1.3, 0.9)
    apart = [
        GaussianEvent(noise_multiplier=mechanism.sum_multiplier),
        GaussianEvent(noise_multiplier=2 * mechanism.count_noise),
    ]
    assert epsilon(apart, 1e-5) == pytest.approx(epsilon([mechanism.event()], 1e-5), rel=1e-6)


def test_the_released_numbers_carry_that_noise() -> None:
    mechanism, n = AdaptiveMechanism(2.0, 1.2, 0.8), 3_000
    shares, means = [], []
    for number in range(n):
        noise = SeededNoise(ROOT.child("moments", number))
        mean, share = mechanism.noised({"w": np.full(20, 5.0)}, 30, 40, 50.0, charge_of(mechanism), noise)
        shares.append(share)
        means.append(mean["w"])
    assert np.std(shares) == pytest.approx(0.8 / 50, rel=6 / math.sqrt(2 * n))
    assert np.mean(shares) == pytest.approx((30 - 20) / 50 + 0.5, abs=6 * 0.8 / 50 / math.sqrt(n))
    assert np.std(means) == pytest.approx(2.0 * mechanism.sum_multiplier / 50, rel=6 / math.sqrt(40 * n))
    assert np.mean(means) == pytest.approx(0.1, abs=0.01)
    assert abs(np.corrcoef(shares, np.array(means)[:, 0])[0, 1]) < 6 / math.sqrt(n)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("first", [0.05, 40.0])
def test_the_clip_norm_goes_to_the_quantile(quantile: float, first: float) -> None:
    settings = AdaptiveClipping(quantile=quantile)
    lengths = np.exp(ROOT.child("lengths").numpy().standard_normal(20_000))
    clip_norm, late = first, []
    for number in range(300):
        key = ROOT.child("round", number)
        cohort = lengths[key.numpy().random(len(lengths)) < 0.01]
        mechanism = AdaptiveMechanism(clip_norm, 1.0, count_noise(settings, 200.0, 1.0))
        within = float((clip_factors(cohort, clip_norm) == 1.0).sum())
        noise = SeededNoise(key.child("noise"))
        _, share = mechanism.noised({}, within, len(cohort), 200.0, charge_of(mechanism), noise)
        clip_norm = next_clip_norm(settings, clip_norm, share)
        late += [clip_norm] if number >= 200 else []
    reached = float((lengths <= np.exp(np.mean(np.log(late)))).mean())
    assert reached == pytest.approx(quantile, abs=0.03)


def test_a_count_that_costs_more_than_its_round_is_refused_and_the_default_never_does() -> None:
    with pytest.raises(PrivacyError, match=r"privacy.adaptive.count_noise above 0.6"):
        AdaptiveMechanism(1.0, 1.2, 0.6)
    for cohort in (1.0, 40.0, 5_000.0):
        mechanism = AdaptiveMechanism(1.0, 1.2, count_noise(AdaptiveClipping(), cohort, 1.2))
        assert 1.2 < mechanism.sum_multiplier < 1.16 * 1.2
    assert count_noise(AdaptiveClipping(count_noise=7.0), 40.0, 1.2) == 7.0


def test_what_cannot_be_released_is_refused() -> None:
    mechanism = AdaptiveMechanism(1.0, 1.2, 2.0)
    noise = SeededNoise(ROOT)
    for within in (-1.0, 5.0, math.nan):
        with pytest.raises(PrivacyError, match="cannot be within"):
            mechanism.noised({}, within, 4, 1.0, charge_of(mechanism), noise)
    with pytest.raises(PrivacyError, match="not finite"):
        mechanism.noised({"w": np.array([math.inf])}, 1, 4, 1.0, charge_of(mechanism), noise)
    charge = charge_of(mechanism)
    mechanism.noised({}, 1, 4, 1.0, charge, noise)
    with pytest.raises(PrivacyError, match="released already"):
        mechanism.noised({}, 1, 4, 1.0, charge, noise)
    with pytest.raises(PrivacyError, match="clip norm"):
        AdaptiveMechanism(1.1, 1.2, 2.0).noised({}, 1, 4, 1.0, charge_of(mechanism), noise)
