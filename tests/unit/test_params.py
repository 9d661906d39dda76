"""Arithmetic of named tensors."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec import params as named
from fedrec.params import Accumulator

A = {"w": np.array([3.0, 4.0], np.float32), "b": np.array(12.0, np.float32)}


def test_adding_and_scaling_keep_the_dtype_and_leave_the_inputs_alone() -> None:
    total = named.add(A, {"w": np.ones(2), "b": np.array(1.0)}, 0.5)
    assert (total["w"].tolist(), float(total["b"])) == ([3.5, 4.5], 12.5)
    half = named.scale(A, 0.5)
    assert (half["w"].tolist(), float(half["b"])) == ([1.5, 2.0], 6.0)
    assert {value.dtype for value in (*total.values(), *half.values())} == {np.dtype(np.float32)}
    assert A["w"].tolist() == [3.0, 4.0]


def test_the_norm_is_over_all_tensors_and_does_not_overflow() -> None:
    assert named.norm(A) == 13.0  # 3, 4, 12
    assert named.norm({}) == 0.0
    assert named.norm({"w": np.full(4, 1e30, np.float32)}) == pytest.approx(2e30)
    assert np.isnan(named.norm({"w": np.array([np.nan])}))


def test_tensors_that_are_not_finite_are_named() -> None:
    mixed = {"ok": np.ones(2), "nan": np.array([1.0, np.nan]), "inf": np.array(-np.inf), "count": np.arange(3)}
    assert named.non_finite(mixed) == ["nan", "inf"]
    assert named.non_finite({"empty": np.zeros((0, 3))}) == []


def test_sizes() -> None:
    assert named.n_values(A) == 3
    assert named.n_bytes(A) == 12
    assert named.n_bytes({"w": np.zeros((2, 3), np.int64)}) == 48


def test_the_digest_sees_names_dtypes_shapes_and_values_but_not_order_or_layout() -> None:
    digest = named.digest(A)
    assert digest == named.digest({"b": A["b"], "w": A["w"]})
    assert digest == named.digest({"w": np.repeat(A["w"], 2)[::2], "b": A["b"]})
    changed = [
        {**A, "w": A["w"] + np.float32(1e-6)},
        {**A, "w": A["w"].astype(np.float64)},
        {**A, "w": A["w"][None]},
        {"v": A["w"], "b": A["b"]},
        {"w": A["w"]},
    ]
    assert len({digest, *map(named.digest, changed)}) == len(changed) + 1


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"w": np.zeros(2, np.float32), "b": np.array(0, np.float32)}, True),
        ({"w": np.zeros(3, np.float32), "b": np.array(0, np.float32)}, False),
        ({"w": np.zeros(2, np.float64), "b": np.array(0, np.float32)}, False),
        ({"w": np.zeros(2, np.float32)}, False),
    ],
)
def test_same_shapes(other: dict[str, np.ndarray], same: bool) -> None:
    assert named.same_shapes(A, other) is same
    assert named.same_shapes(other, A) is same


def test_a_sum_of_many_small_numbers_keeps_them() -> None:
    """In float32, 1e8 + 1 is 1e8, however often it is added."""
    total = Accumulator()
    total.fold({"w": np.array([1e8], np.float32)})
    for _ in range(64):
        total.fold({"w": np.array([1.0], np.float32)})
    assert total.value()["w"].tolist() == [1e8 + 64]
    assert total.value()["w"].dtype == np.float32


def test_a_sum_keeps_dtypes_of_integers_and_takes_only_the_names_asked_for() -> None:
    total = Accumulator()
    total.fold({"n": np.array([1, 2]), "w": np.ones(1)}, ["n"])
    total.fold({"n": np.array([3, 4]), "w": np.ones(1)}, ["n"])
    assert {name: value.tolist() for name, value in total.value().items()} == {"n": [4, 6]}
    assert total.value()["n"].dtype == np.int64


def test_folding_does_not_change_what_was_folded() -> None:
    first, total = {"w": np.ones(2)}, Accumulator()
    total.fold(first)
    total.fold(first)
    assert first["w"].tolist() == [1.0, 1.0]
    assert Accumulator().value() == {}
