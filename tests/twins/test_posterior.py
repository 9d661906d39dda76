"""The posterior mean of pairs against its integral, and what it is good for."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedrec.models.configs import SpectralConfig
from fedrec.protocol.triangle import packed
from fedrec.random import Key
from fedrec.server.posterior import expected_pairs, posterior_mean, second_look
from fedrec.server.spectral import spectral_params

KEY = Key.from_seed(11)
N, RANK, DEVIATION = 80, 6, 0.5


def integral(observed: float, deviation: float, prior: float) -> float:
    """Return the posterior mean by summing over a fine grid."""
    grid = np.linspace(0.0, max(observed, 0.0) + 12.0 * deviation, 200_001)
    log = -0.5 * ((observed - grid) / deviation) ** 2 - grid / prior
    weight = np.exp(log - log.max())
    return float((grid * weight).sum() / weight.sum())


@pytest.mark.parametrize("observed", [-2.0, -0.1, 0.0, 0.4, 3.0])
@pytest.mark.parametrize("deviation", [0.3, 1.5])
@pytest.mark.parametrize("prior", [0.2, 1.0, 30.0])
def test_mean_equals_integral(observed: float, deviation: float, prior: float) -> None:
    found = posterior_mean(np.array([[observed]]), deviation, np.array([[prior]]))
    assert found[0, 0] == pytest.approx(integral(observed, deviation, prior), rel=1e-4, abs=1e-4)


def test_mean_far_below_zero_is_finite_and_small() -> None:
    # Far below 0 the mean tends to 1 / (-observed / deviation^2 + 1 / prior), here 1 / (3.0 / 0.01 + 1e6).
    found = posterior_mean(np.array([-3.0]), 0.1, np.array([1e-6]))
    assert found[0] == pytest.approx(1.0 / (300.0 + 1e6), rel=1e-2)


def world(seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return pairs, counts, features and the sketch of a catalogue whose features tell of the pairs; no noise."""
    random = KEY.child("world", seed).numpy()
    features, _ = np.linalg.qr(random.normal(size=(N, RANK)))
    popular = random.pareto(1.5, N) + 0.1
    likes = np.exp(2.0 * features[:, :3] @ features[:, :3].T * np.sqrt(N / RANK))
    pairs = np.outer(popular, popular) * likes
    pairs *= random.exponential(1.0, (N, N)) / pairs.mean()
    pairs = np.triu(pairs) + np.triu(pairs, 1).T
    return (
        pairs.astype(np.float32),
        (10.0 * popular).astype(np.float32),
        features.astype(np.float32),
        (features.T @ pairs @ features).astype(np.float32),
    )


def symmetric_noise(n: int, name: str) -> NDArray[np.float32]:
    upper = np.triu(KEY.child(name).numpy().normal(0.0, DEVIATION, (n, n)))
    return np.asarray(upper + np.triu(upper, 1).T, np.float32)


def test_means_are_nearer_to_the_truth_than_what_was_released() -> None:
    pairs, counts, features, sketch = world(1)
    noised = pairs + symmetric_noise(N, "pairs")
    found = expected_pairs(noised, counts, DEVIATION, features, sketch + symmetric_noise(RANK, "sketch"))
    error = np.square(found - pairs).mean()
    assert error < 0.8 * np.square(np.maximum(noised, 0.0) - pairs).mean()
    assert (found >= 0).all()
    np.testing.assert_allclose(found, found.T, rtol=1e-3, atol=1e-4)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, counts, features, sketch = world(2)
    whole = expected_pairs(pairs, counts, DEVIATION, features, sketch)
    again = second_look(pairs, whole, DEVIATION, 5)
    monkeypatch.setattr("fedrec.server.posterior.AT_ONCE", 7)
    np.testing.assert_allclose(expected_pairs(pairs, counts, DEVIATION, features, sketch), whole, rtol=1e-4)
    np.testing.assert_allclose(second_look(pairs, whole, DEVIATION, 5), again, rtol=1e-3, atol=1e-4)


def test_a_second_look_at_pairs_of_low_rank_is_nearer_to_the_truth() -> None:
    tastes = KEY.child("tastes").numpy().gamma(0.3, 1.0, (N, 3))
    pairs = (tastes @ tastes.T).astype(np.float32)
    noised = pairs + symmetric_noise(N, "second")
    first = expected_pairs(noised, pairs.sum(axis=1), DEVIATION)
    second = second_look(noised, first, DEVIATION, 3)
    assert np.square(second - pairs).mean() < 0.92 * np.square(first - pairs).mean()
    assert (second >= 0).all()
    assert np.isfinite(second_look(noised, np.zeros_like(noised), DEVIATION, 3)).all()


def test_without_noise_pairs_stay_and_less_caution_keeps_more() -> None:
    pairs, counts, features, sketch = world(3)
    assert expected_pairs(pairs, counts, 0.0, features, sketch) is pairs
    bold, careful = (expected_pairs(pairs, counts, DEVIATION, caution=share) for share in (0.3, 1.0))
    assert np.square(bold - pairs).sum() < np.square(careful - pairs).sum()


def test_nothing_but_noise_gives_finite_means() -> None:
    noise = symmetric_noise(N, "alone")
    found = expected_pairs(
        noise, np.zeros(N, np.float32), DEVIATION, np.zeros((N, 2), np.float32), np.eye(2, dtype=np.float32)
    )
    assert np.isfinite(found).all()
    assert (found >= 0).all()


def test_model_takes_the_means_where_the_statistic_tells_its_noise() -> None:
    pairs, counts, _, _ = world(4)
    statistic = {"items": packed(pairs).astype(np.float32)}
    noisy = {**statistic, "variance": np.full(1, DEVIATION**2, np.float32)}
    with_it = SpectralConfig(item_rank=5, feature_rank=0, caution=1.0)
    without = SpectralConfig(item_rank=5, feature_rank=0, caution=0.0)
    rows = [spectral_params(s, counts, c, None, N)["items"] for s in (statistic, noisy) for c in (with_it, without)]
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[1], rows[3])
    assert not np.allclose(np.abs(rows[2]), np.abs(rows[3]), atol=1e-3)


def test_eigenvalues_are_lowered_by_so_many_deviations_and_small_ones_vanish() -> None:
    square = np.diag(np.array([9.0, 4.0, 1.0], np.float32))
    statistic = {"items": packed(square).astype(np.float32), "variance": np.full(1, 0.5**2, np.float32)}
    config = SpectralConfig(item_rank=3, feature_rank=0, item_power=1.0, item_shrink=4.0, caution=0.0)
    rows = spectral_params(statistic, np.ones(3, np.float32), config, None, 3)["items"]
    # 9, 4 and 1 less 4 x 0.5, over the largest, to the power 1 / 2: a score multiplies two rows.
    np.testing.assert_allclose(np.abs(rows), np.diag([1.0, np.sqrt(2 / 7), 0.0]), atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 7, 40, 60])
def test_the_rows_that_are_kept_are_those_of_the_whole_decomposition(rank: int) -> None:
    pairs = symmetric_noise(40, "whole") + 3.0 * np.eye(40, dtype=np.float32)
    config = SpectralConfig(item_rank=rank, feature_rank=0, item_power=0.5, caution=0.0)
    rows = spectral_params({"items": packed(pairs).astype(np.float32)}, np.ones(40, np.float32), config, None, 40)[
        "items"
    ]
    values, vectors = np.linalg.eigh(pairs.astype(np.float64))
    kept = np.argsort(-values)[:rank]
    share = np.maximum(values[kept], 0.0) / values.max()
    assert rows.shape == (40, rank)
    np.testing.assert_allclose(rows @ rows.T, (vectors[:, kept] * share**0.5) @ vectors[:, kept].T, atol=1e-4)
