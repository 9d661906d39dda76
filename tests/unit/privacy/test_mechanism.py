"""The mechanism and its receipt: noise as claimed, once per charge, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.errors import PrivacyError
from fedrec.params import Params
from fedrec.privacy.ledger import Charge, PrivacyLedger
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.noise import SecureNoise, SeededNoise
from fedrec.random import Key

MECHANISM = GaussianMechanism(clip_norm=2.0, noise_multiplier=1.5)
N = 40_000


def ledger() -> PrivacyLedger:
    return PrivacyLedger(None, epsilon=None, delta=1e-5)


def charged(mechanism: GaussianMechanism = MECHANISM, book: PrivacyLedger | None = None) -> Charge:
    return (book or ledger()).charge("a round", mechanism.event(0.1), clip_norm=mechanism.clip_norm)


def zeros(n: int = N) -> Params:
    return {"a": np.zeros(n, np.float32), "b": np.zeros((n // 100, 100), np.float32)}


def test_noise_has_the_deviation_of_clip_times_multiplier_over_the_expected_cohort() -> None:
    found = MECHANISM.noised(zeros(), 4.0, charged(), SecureNoise())
    for value in found.values():
        assert value.dtype == np.float32
        assert float(value.std()) == pytest.approx(2.0 * 1.5 / 4.0, rel=6 / np.sqrt(2 * N))
        assert abs(float(value.mean())) < 6 * 0.75 / np.sqrt(N)
    assert abs(float(np.corrcoef(found["a"], found["b"].ravel())[0, 1])) < 6 / np.sqrt(N)


def test_the_sum_stands_behind_the_noise() -> None:
    total = {"a": np.full(N, 8.0)}
    found = MECHANISM.noised(total, 4.0, charged(), SecureNoise())
    assert float(found["a"].mean()) == pytest.approx(2.0, abs=6 * 0.75 / np.sqrt(N))
    assert (total["a"] == 8.0).all()


def test_whole_numbers_come_back_as_fractions() -> None:
    found = MECHANISM.noised({"n": np.zeros(10, np.int64)}, 1.0, charged(), SecureNoise())
    assert found["n"].dtype == np.float64
    assert np.abs(found["n"] % 1).max() > 0


def test_a_charge_pays_for_one_release() -> None:
    charge = charged()
    MECHANISM.noised(zeros(100), 1.0, charge, SecureNoise())
    with pytest.raises(PrivacyError, match="released already"):
        MECHANISM.noised(zeros(100), 1.0, charge, SecureNoise())


@pytest.mark.parametrize("other", [GaussianMechanism(2.0, 1.4), GaussianMechanism(3.0, 1.5)])
def test_a_charge_pays_for_its_own_mechanism_only(other: GaussianMechanism) -> None:
    charge = charged()
    with pytest.raises(PrivacyError, match="was charged"):
        other.noised(zeros(100), 1.0, charge, SecureNoise())
    MECHANISM.noised(zeros(100), 1.0, charge, SecureNoise())  # the refusal did not use it up


def test_nobody_but_the_ledger_makes_a_charge() -> None:
    with pytest.raises(PrivacyError, match="made by PrivacyLedger"):
        Charge(charged().entry, object())


def test_a_retry_gets_other_noise_and_another_cohort_from_the_same_seed() -> None:
    book, root = ledger(), Key.from_seed(1)
    first, again, other = charged(book=book), charged(book=book), book.charge("another round", MECHANISM.event(0.1))
    keys = {charge.key(root) for charge in (first, again, other)}
    assert len(keys) == 3
    noise = [SeededNoise(key).normal((50,)) for key in keys]
    assert not np.allclose(noise[0], noise[1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_total_that_is_not_finite_is_refused_and_the_charge_stays(value: float) -> None:
    charge = charged()
    with pytest.raises(PrivacyError, match="not finite"):
        MECHANISM.noised({"a": np.array([0.0, value])}, 1.0, charge, SecureNoise())
    MECHANISM.noised(zeros(100), 1.0, charge, SecureNoise())


@pytest.mark.parametrize("cohort", [0.0, -1.0, np.inf, np.nan])
def test_an_expected_cohort_that_is_none_is_refused(cohort: float) -> None:
    with pytest.raises(PrivacyError, match="expected cohort"):
        MECHANISM.noised(zeros(100), cohort, charged(), SecureNoise())


@pytest.mark.parametrize(
    ("clip", "noise"), [(0.0, 1.0), (-1.0, 1.0), (np.inf, 1.0), (1.0, 0.0), (1.0, -2.0), (1.0, np.nan)]
)
def test_a_mechanism_without_a_guarantee_is_refused(clip: float, noise: float) -> None:
    with pytest.raises(PrivacyError, match="above 0"):
        GaussianMechanism(clip, noise)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1])
def test_a_sampling_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(PrivacyError, match="sampling rate"):
        MECHANISM.event(rate)


def test_factors_leave_out_what_is_not_finite_before_they_compare() -> None:
    assert MECHANISM.factors(np.array([1.0, 4.0, np.nan, np.inf])).tolist() == [1.0, 0.5, 0.0, 0.0]
