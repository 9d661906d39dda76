"""EASE of the quality table is the closed form, asked as everybody else is."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.peers.ease import ease, item_weights
from fedrec.data.synthetic import sequential
from fedrec.random import Key
from tests.support import dataset_of


@pytest.mark.parametrize("n_users", [6, 20])  # fewer and more than items: two ways to the same inverse
def test_weights_are_those_of_the_paper_on_all_but_the_last_two(n_users: int) -> None:
    data = sequential(n_users, 12, 6, Key.from_seed(3))
    x = np.zeros((n_users, 12))
    for user in range(n_users):
        x[user, data.log.history(user)[:-2]] = 1.0
    inverse = np.linalg.inv(x.T @ x + 4.0 * np.eye(12))
    wanted = np.eye(12) - inverse / np.diag(inverse)
    np.testing.assert_allclose(item_weights(data, 4.0), wanted, atol=1e-5)


def test_people_are_asked_after_all_that_they_had_before() -> None:
    data = dataset_of([("a", "i0", 0), ("a", "i1", 1), ("a", "i2", 2), ("b", "i0", 0)])
    number = data.catalog.number_of
    weights = np.zeros((3, 3), np.float32)
    weights[number["i0"], number["i2"]] = 1.0
    weights[number["i1"], number["i2"]] = -3.0
    assert ease(data, weights, skip=1)[0] == pytest.approx(1 / np.log2(3))  # i0 alone is known: i2 is before i1
    assert ease(data, weights)[0] == 1.0  # nothing else is left
    assert len(ease(data, weights, skip=1)) == 1  # b has nothing before the last
