"""Noise has the moments that it claims, and its sources keep their promises."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fedrec.privacy.noise import KeyedNoise, NoiseSource, SecureNoise, SeededNoise
from fedrec.random import Key

N = 200_000
SOURCES = {
    "system": SecureNoise(),
    "seed": SeededNoise(Key.from_seed(5)),
    "key": KeyedNoise(Key.from_seed(6)),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_normal_numbers_are_standard_normal(source: NoiseSource) -> None:
    x = source.normal((N,))
    # Bounds of six standard errors: a right source fails once in 10^8 runs.
    assert abs(x.mean()) < 6 / np.sqrt(N)
    assert abs(x.var() - 1) < 6 * np.sqrt(2 / N)
    assert abs(stats.skew(x)) < 6 * np.sqrt(6 / N)
    assert abs(stats.kurtosis(x)) < 6 * np.sqrt(24 / N)
    assert stats.kstest(x, "norm").statistic < 3 / np.sqrt(N)


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_normal_numbers_do_not_depend_on_their_neighbours(source: NoiseSource) -> None:
    x = source.normal((N,))
    for lag in (1, 2, 3):
        assert abs(np.mean(x[:-lag] * x[lag:])) < 6 / np.sqrt(N)
        assert abs(np.mean((x[:-lag] ** 2 - 1) * (x[lag:] ** 2 - 1))) < 6 * 2 / np.sqrt(N)


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 4), (0,)])
def test_any_shape_is_given(source: NoiseSource, shape: tuple[int, ...]) -> None:
    assert source.normal(shape).shape == shape
    assert source.discrete_gaussian(2.0, shape).shape == shape


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.7, 50.0])
def test_discrete_gaussian_has_its_probabilities(source: NoiseSource, sigma: float) -> None:
    x = source.discrete_gaussian(sigma, (N,))
    assert x.dtype == np.int64
    reach = int(10 * sigma) + 10
    values = np.arange(-reach, reach + 1)
    mass = np.exp(-(values**2) / (2 * sigma**2))
    expected = N * mass / mass.sum()
    seen = np.bincount(x + reach, minlength=len(values))
    common = expected > 20
    statistic = float((((seen - expected) ** 2)[common] / expected[common]).sum())
    degrees = int(common.sum())
    assert statistic < degrees + 7 * np.sqrt(2 * degrees) + 10


def test_the_system_never_repeats_itself_and_a_seed_always_does() -> None:
    assert not np.array_equal(SecureNoise().normal((100,)), SecureNoise().normal((100,)))
    same = (SeededNoise(Key.from_seed(1)).normal((100,)) for _ in range(2))
    assert np.array_equal(*same)


def test_sources_say_what_they_are() -> None:
    assert "operating system" in SecureNoise.label
    assert "protects nobody" in SeededNoise.label
