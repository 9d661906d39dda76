"""Measures of a life against hand-made matrices."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.evaluation.continual import measure


def test_nothing_is_forgotten_where_nothing_changes() -> None:
    life = measure(np.full((4, 4), 0.2))
    assert life.harmonic == pytest.approx(0.2)
    assert (life.forgetting, life.backward) == (0.0, 0.0)


def test_forgetting_is_from_the_best_and_backward_transfer_from_the_first() -> None:
    a = np.array([[0.3, 0.0, 0.0], [0.5, 0.4, 0.1], [0.2, 0.6, 0.7]])
    life = measure(a)
    assert life.learning == pytest.approx((0.3 + 0.4 + 0.7) / 3)
    assert life.retained == pytest.approx((0.2 + 0.6 + 0.7) / 3)
    assert life.forgetting == pytest.approx(((0.5 - 0.2) + (0.6 - 0.6)) / 2)
    assert life.backward == pytest.approx(((0.2 - 0.3) + (0.6 - 0.4)) / 2)
    assert life.forward == pytest.approx((0.0 + 0.1) / 2)


def test_a_block_that_nobody_was_tested_on_is_left_out() -> None:
    a = np.array([[0.4, np.nan], [0.2, np.nan]])
    life = measure(a)
    assert (life.learning, life.retained) == (pytest.approx(0.4), pytest.approx(0.2))
    assert np.isnan(life.forward)
    assert measure(np.zeros((2, 2))).harmonic == 0.0
