"""Holding on to the release before: the pull, the item-wise mean, and that new items are free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec import params as named
from fedrec.server.anchor import item_means, pulled
from fedrec.server.fisher import accumulated
from tests.support import dataset_of, same_bytes, simulated, small_experiment, small_rows

OLD = {"item": np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), "bias": np.array([1.0, 1.0], np.float32)}
NEW = {"item": np.array([[1.0, 2.0], [6.0, 8.0], [5.0, 5.0]], np.float32), "bias": np.array([3.0, 1.0], np.float32)}
DELTA = {"item": np.ones((3, 2), np.float32), "bias": np.zeros(2, np.float32)}


def test_the_pull_is_the_gradient_of_half_the_squared_distance_and_leaves_new_items_alone() -> None:
    found = pulled(DELTA, NEW, OLD, 0.1)
    np.testing.assert_allclose(found["item"], [[1, 1], [1 - 0.3, 1 - 0.4], [1, 1]], rtol=1e-6)
    np.testing.assert_allclose(found["bias"], [-0.2, 0.0], rtol=1e-6)
    assert same_bytes(pulled(DELTA, NEW, OLD, 0.0), DELTA)
    assert same_bytes(pulled(DELTA, NEW, {}, 0.5), DELTA)
    assert DELTA["item"].min() == 1.0


def test_what_mattered_is_pulled_harder_and_never_beyond_the_anchor() -> None:
    matters = {"item": np.array([[0.0, 0.0], [4.0, 0.0]], np.float32), "bias": np.array([2.0, 0.0], np.float32)}
    found = pulled(DELTA, NEW, OLD, 0.1, matters)  # the mean importance is 1
    np.testing.assert_allclose(found["item"], [[1, 1], [1 - 0.4 * 3, 1], [1, 1]], rtol=1e-6)
    np.testing.assert_allclose(found["bias"], [-0.2 * 2, 0.0], rtol=1e-6)
    np.testing.assert_allclose(pulled(DELTA, NEW, OLD, 50.0, matters)["bias"], [-2.0, 0.0], rtol=1e-6)
    nothing = {name: np.zeros_like(value) for name, value in OLD.items()}
    assert same_bytes(pulled(DELTA, NEW, OLD, 0.1, nothing), DELTA)


def test_importance_fades_grows_with_the_catalogue_and_is_never_negative() -> None:
    before = {"item": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    new = {"item": np.array([[-1, 2], [0, 0], [3, 3]], np.float32), "bias": np.array([-5, 5], np.float32)}
    found = accumulated(before, new, NEW, 0.5)
    assert found["item"].tolist() == [[0.5, 2.5], [0.5, 0.5], [3, 3]]
    assert found["bias"].tolist() == [0.5, 5.5]
    assert accumulated({}, {}, NEW, 0.5)["item"].shape == NEW["item"].shape


def test_an_item_that_moved_far_keeps_less_of_its_old_row() -> None:
    found = item_means(NEW, OLD, 0.5, {"item"})
    weight = 0.5 / (1 + 25 / np.sqrt(2))
    np.testing.assert_allclose(found["item"][1], (1 - weight) * np.array([6, 8]) + weight * np.array([3, 4]), rtol=1e-6)
    np.testing.assert_array_equal(found["item"][[0, 2]], NEW["item"][[0, 2]])
    assert found["bias"] is NEW["bias"]
    assert same_bytes(item_means(NEW, OLD, 0.0, {"item"}), NEW)
    assert same_bytes(item_means(NEW, {}, 0.5, {"item"}), NEW)


@pytest.mark.parametrize(
    "setting",
    [
        {"training__anchor": 20.0},
        {"training__item_mean": 0.9},
        {"training__ewc": {"strength": 20.0}},
        {"training__local": {"imitate": 30.0}},
    ],
    ids=str,
)
def test_a_run_that_holds_on_ends_nearer_to_its_first_release_and_learns_the_base_alike(
    tmp_path: Path, setting: dict[str, Any]
) -> None:
    dataset, moved = dataset_of(small_rows()), []
    firsts = []
    for name, changes in (("free", {}), ("held", setting)):
        _, registry = simulated(
            small_experiment(training__average=0.0, training__later__rounds=20, **changes), dataset, tmp_path / name
        )
        first, last = registry.load(1).params, registry.load(3).params
        n = len(first["item"])
        moved.append(named.norm({"item": last["item"][:n] - first["item"]}))
        firsts.append(first)
    assert same_bytes(*firsts)
    assert 0 < moved[1] < 0.9 * moved[0]
