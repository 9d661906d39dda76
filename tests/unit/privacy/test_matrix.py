"""The banded strategy against dense matrices, brute force and the optimum; its noise streamed, restored, used once."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import sqrtm, toeplitz

from fedrec.errors import PrivacyError
from fedrec.privacy.accounting import calibrate
from fedrec.privacy.events import GaussianEvent, MatrixEvent
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.privacy.matrix import BandedMechanism, BandedStrategy, CorrelatedNoise, optimised, square_root
from fedrec.privacy.noise import KeyedNoise
from fedrec.random import Key

Matrix = NDArray[np.float64]
KEY = Key.from_seed(4)


def dense(strategy: BandedStrategy) -> Matrix:
    """Return C."""
    column = np.zeros(strategy.rounds)
    column[: strategy.band] = strategy.coefficients
    return np.tril(toeplitz(column))


def prefix(n: int) -> Matrix:
    """Return A."""
    return np.tril(np.ones((n, n)))


@st.composite
def strategies(draw: st.DrawFn) -> BandedStrategy:
    rounds = draw(st.integers(1, 8))
    band = draw(st.integers(1, min(4, rounds)))
    rest = draw(st.lists(st.floats(-1.0, 1.0), min_size=band - 1, max_size=band - 1))
    return BandedStrategy((1.0, *rest), rounds, draw(st.integers(band, 8)))


@given(strategies())
@settings(max_examples=60, deadline=None)
def test_sensitivity_is_the_largest_over_all_participation_patterns_and_signs(strategy: BandedStrategy) -> None:
    c, worst = dense(strategy), 0.0
    for size in range(1, strategy.max_participations + 1):
        for pattern in itertools.combinations(range(strategy.rounds), size):
            if all(b - a >= strategy.min_separation for a, b in itertools.pairwise(pattern)):
                for signs in itertools.product((1.0, -1.0), repeat=size):
                    worst = max(worst, float(np.linalg.norm(c[:, pattern] @ np.array(signs))))
    assert strategy.sensitivity == pytest.approx(worst)
    longer = itertools.combinations(range(strategy.rounds), strategy.max_participations + 1)
    assert not any(all(b - a >= strategy.min_separation for a, b in itertools.pairwise(p)) for p in longer)


@given(strategies())
@settings(max_examples=60, deadline=None)
def test_the_error_is_that_of_the_dense_matrices(strategy: BandedStrategy) -> None:
    spread = prefix(strategy.rounds) @ np.linalg.inv(dense(strategy))
    expected = strategy.sensitivity**2 * float((spread**2).sum()) / strategy.rounds
    assert strategy.error == pytest.approx(expected)


@given(strategies())
@settings(max_examples=30, deadline=None)
def test_streamed_rows_solve_the_dense_system(strategy: BandedStrategy) -> None:
    noise = CorrelatedNoise(strategy, KEY, {"w": (5,), "b": ()})
    rows = [noise.row(t) for t in range(strategy.rounds)]
    for name, shape in (("w", (5,)), ("b", ())):
        z = np.stack([KeyedNoise(KEY.child("row", t, name)).normal(shape) for t in range(strategy.rounds)])
        expected = np.linalg.solve(dense(strategy), z.reshape(strategy.rounds, -1))
        assert np.allclose(np.stack([row[name] for row in rows]).reshape(strategy.rounds, -1), expected)


def test_the_covariance_of_the_noise_is_that_of_the_inverse() -> None:
    strategy, n = optimised(6, 3, 3), 60_000
    noise = CorrelatedNoise(strategy, KEY, {"w": (n,)})
    rows = np.stack([noise.row(t)["w"] for t in range(6)])
    inverse = np.linalg.inv(dense(strategy))
    claimed = inverse @ inverse.T
    deviation = np.sqrt((np.outer(np.diag(claimed), np.diag(claimed)) + claimed**2) / n)  # of a sample covariance
    assert (np.abs(rows @ rows.T / n - claimed) < 6 * deviation).all()
    assert np.abs(claimed - np.eye(6)).max() > 0.3  # it is correlated at all


def test_a_band_of_one_is_independent_noise() -> None:
    strategy = optimised(50, 1, 8)
    assert strategy.coefficients == (1.0,)
    assert strategy.max_participations == 7
    assert strategy.sensitivity == pytest.approx(math.sqrt(7))
    assert strategy.error == pytest.approx(7 * 51 / 2)
    first = CorrelatedNoise(strategy, KEY, {"w": (4,)})
    for t in range(3):
        assert np.array_equal(first.row(t)["w"], KeyedNoise(KEY.child("row", t, "w")).normal((4,)))


def test_the_full_square_root_factors_the_matrix_of_prefix_sums() -> None:
    strategy = BandedStrategy(tuple(square_root(40).tolist()), 40, 40)
    c = dense(strategy)
    assert np.allclose(c @ c, prefix(40))
    # Both factors are the same matrix, so |A C^-1|_F = |C|_F, and the first column is the longest.
    assert strategy.error == pytest.approx(float((c**2).sum()) * float((c[:, 0] ** 2).sum()) / 40)


def optimum(n: int) -> float:
    """Return the least error of any matrix when everybody takes part once (Denisov et al., NeurIPS 2022, theorem 3.2).

    X = C^T C has diagonal 1; the fixed point of v = diag(sqrt(V^1/2 W V^1/2)) gives the dual optimum tr(v).
    """
    a = prefix(n)
    w, v = a.T @ a, np.ones(n)
    for _ in range(200):
        root = np.sqrt(v)
        v = np.diag(np.real(sqrtm(root[:, None] * w * root[None, :])))
    return float(v.sum()) / n


@pytest.mark.parametrize(
    ("coefficients", "rounds", "separation", "participations", "sensitivity", "error"),
    [
        ((1.0, 0.5, 0.375), 20, 4, 5, 2.6368778887161235, 25.19189266874288),
        ((1.0, -0.4, 0.3, 0.2), 17, 5, 4, 2.2427661492005804, 45.346301358635245),
        ((1.0, 0.5, 0.375, 0.3125), 30, 64, 1, math.hypot(1, 1 / 2, 3 / 8, 5 / 16), None),
    ],
)
def test_sensitivity_and_error_are_those_of_jax_privacy(
    coefficients: tuple[float, ...],
    rounds: int,
    separation: int,
    participations: int,
    sensitivity: float,
    error: float | None,
) -> None:
    # jax-privacy 2.0.0, matrix_factorization, in float64: toeplitz.minsep_sensitivity_squared and
    # sensitivity.get_sensitivity_banded agree; error: the mean of toeplitz.per_query_error times the squared
    # sensitivity. The last row is one participation: a Gaussian release of the length of the longest column.
    strategy = BandedStrategy(coefficients, rounds, separation)
    assert strategy.max_participations == participations
    assert strategy.sensitivity == pytest.approx(sensitivity, rel=1e-12)
    assert error is None or strategy.error == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize(
    ("rounds", "band", "separation", "theirs"),
    [
        (50, 8, 8, 39.975620583926876),
        (200, 4, 16, 370.12930499581836),
        (200, 16, 16, 141.9741058344755),
        (32, 32, 32, 3.853161427121909),
        (100, 10, 25, 34.72749559430107),
    ],
)
def test_the_optimum_is_no_worse_than_that_of_jax_privacy(
    rounds: int, band: int, separation: int, theirs: float
) -> None:
    # jax-privacy 2.0.0: toeplitz.optimize_banded_toeplitz(rounds, band), which looks at one participation, judged by
    # per_query_error and minsep_sensitivity_squared as above. Ours knows that late columns are cut off.
    ours = optimised(rounds, band, separation).error
    assert 0.99 * theirs < ours < theirs * (1 + 1e-6)


def test_one_participation_comes_close_to_the_best_of_all_matrices() -> None:
    found, best = optimised(32, 32, 32).error, optimum(32)
    assert best * (1 - 1e-6) < found < 1.1 * best


@pytest.mark.parametrize(("rounds", "band", "separation"), [(50, 8, 8), (200, 4, 16), (200, 16, 16), (30, 30, 64)])
def test_the_optimum_beats_its_neighbours_the_square_root_and_independent_noise(
    rounds: int, band: int, separation: int
) -> None:
    best = optimised(rounds, band, separation)
    start = BandedStrategy(tuple(square_root(best.band).tolist()), rounds, separation)
    assert best.error < start.error < optimised(rounds, 1, separation).error
    for seed in range(20):
        step = 1e-2 * KEY.child("step", seed).numpy().standard_normal(best.band - 1)
        moved = BandedStrategy((1.0, *(np.array(best.coefficients[1:]) + step).tolist()), rounds, separation)
        assert moved.error > best.error


def test_at_the_same_epsilon_correlated_noise_leaves_a_third_of_the_error() -> None:
    # 200 rounds, a person every 16th; both are one Gaussian release of the same multiplier. Computed by this code,
    # against dense matrices above; the ratio of root mean squared errors is what docs/privacy.md quotes.
    ratio = math.sqrt(optimised(200, 16, 16).error / optimised(200, 1, 16).error)
    assert ratio == pytest.approx(0.330, abs=0.002)
    assert math.sqrt(optimised(200, 8, 16).error / optimised(200, 1, 16).error) == pytest.approx(0.409, abs=0.002)


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "expected"), [(1.0, 1.27), (8.0, 0.82)])
def test_against_poisson_sampling_it_wins_where_the_budget_is_large(budget: float, expected: float) -> None:
    # 200 rounds of a sixteenth of the people; the figures stand in docs/privacy.md.
    rounds, groups = 200, 16
    sampled = calibrate(lambda z: [GaussianEvent(noise_multiplier=z, sampling=1 / groups, count=rounds)], budget, 1e-5)
    whole = calibrate(lambda z: [GaussianEvent(noise_multiplier=z)], budget, 1e-5)
    ratio = whole * math.sqrt(optimised(rounds, 16, groups).error) / (sampled * math.sqrt((rounds + 1) / 2))
    assert ratio == pytest.approx(expected, abs=0.01)


def test_rows_are_given_once_and_made_again_from_the_key() -> None:
    strategy = optimised(12, 4, 4)
    noise, shapes = CorrelatedNoise(strategy, KEY, {"w": (3,)}), {"w": (3,)}
    rows = [noise.row(t)["w"] for t in range(8)]
    with pytest.raises(PrivacyError, match=r"Row 7 .* used"):
        noise.row(7)
    assert len(noise._past) == 3
    restored = CorrelatedNoise(strategy, KEY, shapes)
    assert np.array_equal(restored.row(6)["w"], rows[6])
    with pytest.raises(PrivacyError, match="Row 5"):
        restored.row(5)
    assert np.array_equal(restored.row(7)["w"], rows[7])
    with pytest.raises(PrivacyError, match="Row 12"):
        restored.row(12)


def test_a_band_wider_than_the_separation_is_refused() -> None:
    with pytest.raises(PrivacyError, match=r"lower privacy.fit_noise.band"):
        optimised(50, 9, 8)
    assert optimised(3, 9, 8).band == 3
    for wrong in ((), (2.0,), (1.0, math.nan)):
        with pytest.raises(PrivacyError, match="first coefficient"):
            BandedStrategy(wrong, 5, 5)


def test_a_stage_is_one_charge_for_so_many_rounds_of_exactly_this_noise() -> None:
    mechanism = BandedMechanism(2.0, 1.5, optimised(4, 2, 2))
    event = mechanism.event()
    assert isinstance(event, MatrixEvent)
    assert (event.rounds, event.band, event.min_separation, event.max_participations) == (4, 2, 2, 2)
    book = PrivacyLedger(None, epsilon=None, delta=1e-5)
    charge = book.charge("stage", event, clip_norm=2.0)
    noise = CorrelatedNoise(mechanism.strategy, KEY, {"w": (50_000,)})
    total = {"w": np.full(50_000, 3.0, np.float32)}
    for t in range(4):
        row = noise.row(t)
        released = mechanism.noised(total, 10.0, charge, row)["w"]
        assert released.dtype == np.float32
        assert np.allclose(released, (3.0 + 3.0 * event.sensitivity * row["w"]) / 10.0, atol=1e-6)
        if t == 0:  # the first row is that of Z
            assert float(released.std()) == pytest.approx(3.0 * event.sensitivity / 10.0, rel=6 / math.sqrt(1e5))
    with pytest.raises(PrivacyError, match="released already"):
        mechanism.noised(total, 10.0, charge, row)
    other = book.charge("stage", event, clip_norm=2.5)
    with pytest.raises(PrivacyError, match="clip norm"):
        mechanism.noised(total, 10.0, other, row)
    with pytest.raises(PrivacyError, match="not finite"):
        mechanism.noised({"w": np.array([math.nan])}, 10.0, other, row)


def test_a_stage_is_reopened_with_what_is_left_of_it_and_nothing_else_is() -> None:
    mechanism = BandedMechanism(1.0, 1.0, optimised(3, 1, 1))
    book = PrivacyLedger(None, epsilon=None, delta=1e-5)
    entry = book.charge("stage", mechanism.event(), clip_norm=1.0).entry
    again = book.reopened(entry, used=2)
    again.use(1.0, 1.0)
    with pytest.raises(PrivacyError, match="released already"):
        again.use(1.0, 1.0)
    with pytest.raises(PrivacyError, match="no stage"):
        PrivacyLedger(None, epsilon=None, delta=1e-5).reopened(entry, used=0)
    assert book.last("stage") == entry
    assert book.last("other") is None
