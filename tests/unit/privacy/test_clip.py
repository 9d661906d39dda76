"""Clip factors: finite first, then the bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedrec.privacy.clip import clip_factors

ANY = st.floats(min_value=0, max_value=1e30) | st.sampled_from([np.nan, np.inf, 0.0])


def test_short_ones_stay_and_long_ones_are_scaled_to_the_bound() -> None:
    factors = clip_factors(np.array([0.0, 1.0, 2.0, 8.0]), 2.0)
    assert factors.tolist() == [1.0, 1.0, 1.0, 0.25]
    assert factors.dtype == np.float32


@pytest.mark.parametrize("bound", [None, 1.0])
def test_what_is_not_finite_is_left_out_with_and_without_a_bound(bound: float | None) -> None:
    assert clip_factors(np.array([np.nan, np.inf, -np.inf, 0.5]), bound).tolist() == [0.0, 0.0, 0.0, 1.0]


def test_without_a_bound_everything_finite_stays() -> None:
    assert clip_factors(np.array([1e300, 0.0]), None).tolist() == [1.0, 1.0]


@settings(deadline=None)
@given(arrays(np.float64, st.integers(0, 8), elements=ANY), st.floats(min_value=1e-3, max_value=1e3))
def test_no_factor_lets_a_norm_pass_the_bound(norms: np.ndarray, bound: float) -> None:
    factors = clip_factors(norms, bound)
    finite = np.isfinite(norms)
    assert ((factors >= 0) & (factors <= 1)).all()
    assert (factors[~finite] == 0).all()
    assert (factors[finite] * norms[finite] <= bound * (1 + 1e-6)).all()
    assert (factors[finite & (norms <= bound)] == 1).all()
