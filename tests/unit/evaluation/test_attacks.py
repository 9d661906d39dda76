"""The one-run bound against its paper, hand values and a mechanism of known epsilon; detection against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import binomtest

from fedrec.errors import PrivacyError
from fedrec.evaluation.attacks import detection, lower_bound, one_run_bound, p_value, share_interval
from fedrec.privacy.accounting import epsilon
from fedrec.privacy.events import GaussianEvent
from fedrec.random import Key


def test_the_bound_is_that_of_the_paper() -> None:
    # Steinke, Nasr and Jagielski, arXiv:2305.08846v1, appendix D: 1000 canaries, 100 guesses, 75 right, delta 1e-4.
    assert lower_bound(1000, 100, 75, 1e-4, 0.95) == pytest.approx(0.673, abs=5e-4)


def test_the_p_value_by_hand() -> None:
    q = float(expit(0.7))
    assert p_value(5, 1, 1, 0.7, 0.0) == pytest.approx(q)
    assert p_value(5, 0, 0, 0.7, 0.0) == 1.0
    # Two guesses, both right: P[W = 2] = q^2; P[2 > W >= 1] = 2 q (1 - q); P[2 > W >= 0] = 1 - q^2, which counts half.
    slack = max(2 * q * (1 - q), (1 - q * q) / 2)
    assert p_value(4, 2, 2, 0.7, 0.01) == pytest.approx(q * q + 2 * 4 * 0.01 * slack)


def test_all_guesses_right_gives_the_largest_bound_that_so_many_can() -> None:
    for n in (10, 100):
        assert lower_bound(n, n, n, 0.0, 0.95) == pytest.approx(float(logit(0.05 ** (1 / n))), abs=1e-3)
        assert lower_bound(n, n, n // 2, 0.0, 0.95) == 0.0


def test_the_bound_holds_for_randomised_response_and_is_near() -> None:
    """Each bit is told rightly with probability e^eps / (1 + e^eps): the bound passes eps in 1 of 20 runs at most."""
    random = Key.from_seed(11).child("randomised response").numpy()
    for true, near in ((0.5, 0.3), (2.0, 1.6)):
        found = np.array([lower_bound(400, 400, int(random.binomial(400, expit(true))), 0.0, 0.95) for _ in range(300)])
        # 15 of 300 are expected at most; 28 is more than three deviations of a binomial above.
        assert int((found > true).sum()) <= 28
        assert found.mean() > near


def test_the_bound_over_guesses_chosen_afterwards_holds_for_a_gaussian_release() -> None:
    random = Key.from_seed(12).child("gaussian").numpy()
    true = epsilon([GaussianEvent(noise_multiplier=1.0)], 1e-5)
    found = []
    for _ in range(60):
        included = random.random(500) < 0.5
        found.append(one_run_bound(included + random.normal(size=500), included, 1e-5, 0.95).epsilon)
    assert max(found) < true  # 4.4; the bound of one run is far from tight here
    assert float(np.mean(found)) > 1.0


def test_useless_scores_pass_zero_in_one_of_twenty_runs_at_most() -> None:
    random = Key.from_seed(13).child("useless").numpy()
    bounds = [one_run_bound(random.random(200), random.random(200) < 0.5, 0.0, 0.95) for _ in range(200)]
    assert sum(bound.epsilon > 0 for bound in bounds) <= 20  # 10 expected at most, and three deviations
    assert all(bound.epsilon <= bound.ceiling for bound in bounds)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(PrivacyError, match="cannot be"):
        p_value(5, 3, 4, 1.0, 0.0)
    with pytest.raises(PrivacyError, match="no hypothesis"):
        p_value(5, 3, 2, -1.0, 0.0)
    with pytest.raises(PrivacyError, match="between 0 and 1"):
        lower_bound(5, 3, 2, 0.0, 1.0)


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (3, 7), (7, 7)])
def test_the_interval_of_a_share_is_the_exact_one(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.9, "exact")
    assert share_interval(hits, n, 0.9) == pytest.approx((expected.low, expected.high))


def test_detection_equals_a_loop_over_all_pairs() -> None:
    random = Key.from_seed(14).child("detection").numpy()
    members, others = np.round(random.normal(0.7, 1, 80), 1), np.round(random.normal(0, 1, 120), 1)  # ties on purpose
    found = detection(members, others)
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert found.auc == pytest.approx(float(np.mean(pairs)))
    assert found.auc_low < found.auc < found.auc_high
    threshold = sorted(others)[-2]  # 1 % of 120 is one false alarm
    assert (others > threshold).sum() <= 1
    assert found.detected == pytest.approx(float((members > threshold).mean()))


def test_the_interval_of_the_area_covers_the_truth() -> None:
    random = Key.from_seed(15).child("coverage").numpy()
    truth = 0.5 * (1 + math.erf(0.5))  # P[N(1, 1) > N(0, 1)] = Phi(1 / sqrt 2)
    hits = 0
    for _ in range(200):
        found = detection(random.normal(1, 1, 60), random.normal(0, 1, 60))
        hits += found.auc_low <= truth <= found.auc_high
    assert hits >= 178  # 190 expected; four deviations below


def test_too_few_to_attack_is_said() -> None:
    with pytest.raises(PrivacyError, match="too few to attack"):
        detection(np.zeros(1), np.zeros(5))
