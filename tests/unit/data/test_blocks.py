"""Blocks: what is held back is in nobody's history and in nobody's training, for the whole life."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.data.blocks import SPAN, TEST, TRAIN, VALIDATION, block_slices, in_blocks, lay_out
from fedrec.data.cleaning import Dataset, RawRows
from fedrec.data.slices import resolve
from fedrec.errors import DataError
from tests.support import dataset_of, small_rows

ROWS = RawRows(
    np.array(["a"] * 8 + ["b"] * 4, object),
    np.array(["1", "2", "3", "4", "5", "6", "7", "8", "1", "3", "5", "9"], object),
    np.zeros(12),
)
BLOCK = np.array([0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1])
PART = np.array([TRAIN, TRAIN, VALIDATION, TEST, TRAIN, TRAIN, VALIDATION, TEST, TRAIN, TEST, TRAIN, TEST])


def items_of(dataset: Dataset, user: int, low: int, high: int) -> list[str]:
    start = int(dataset.log.offsets[user])
    return [dataset.catalog.ids[i] for i in dataset.log.item[start + low : start + high]]


def seen(dataset: Dataset, window: object) -> list[list[str]]:
    low, high = resolve(dataset.log, window)  # type: ignore[arg-type]
    return [items_of(dataset, user, int(low[user]), int(high[user])) for user in range(dataset.log.n_users)]


def test_windows_hold_what_the_parts_say() -> None:
    dataset = lay_out(ROWS, BLOCK, PART, name="two people")
    first, second = block_slices(dataset, 2)
    assert list(dataset.log.user_ids) == ["a", "b"]
    assert seen(dataset, first.train) == [["1", "2"], ["1"]]
    assert seen(dataset, second.train) == [["3", "5", "6"], ["5"]]
    assert seen(dataset, first.test) == [["4"], ["3"]]
    assert seen(dataset, second.test) == [["8"], ["9"]]
    assert first.life == second.life == (first.test, second.test)
    assert seen(dataset, first.known) == [["1", "2", "3"], ["1"]]
    assert seen(dataset, second.known) == [["1", "2", "3", "5", "6", "7"], ["1", "5"]]
    assert (first.n_items, second.n_items, second.n_items_test) == (3, 6, 9)
    assert first.fit is None
    assert seen(dataset, first.validation) == [["3"], []]
    assert seen(dataset, second.validation) == [["7"], []]
    assert seen(dataset, block_slices(dataset, 2, refit="warm")[1].fit) == [["1", "2", "3", "5", "6"], ["1", "5"]]


def test_for_choosing_settings_the_tests_are_not_even_there() -> None:
    dataset = lay_out(ROWS, BLOCK, PART, name="two people", hold="validation")
    first, second = block_slices(dataset, 2)
    assert set(dataset.catalog.ids) == {"1", "2", "3", "5", "6", "7"}
    assert seen(dataset, first.train) == [["1"], ["1"]]
    assert seen(dataset, first.validation) == [["2"], []]
    assert seen(dataset, first.test) == [["3"], []]
    assert seen(dataset, second.train) == [["2", "5"], ["5"]]
    assert seen(dataset, second.known) == [["1", "2", "5", "6"], ["1", "5"]]


def test_a_data_set_is_cut_by_time_and_loses_nothing() -> None:
    dataset = dataset_of([(u, i, t) for u, i, t in {(u, i): (u, i, t) for u, i, t in small_rows()}.values()])
    cut = in_blocks(dataset, base=0.5, later=2, share=0.1)
    slices = block_slices(cut, 3)
    rows = [sum(map(len, seen(cut, s.train))) for s in slices], [sum(map(len, seen(cut, s.test))) for s in slices]
    n_validation = sum(map(len, seen(cut, slices[-1].validation)))
    assert len(cut.log) == len(dataset.log)
    assert n_validation == sum(map(len, seen(cut, slices[-1].test))) == len(dataset.log) - sum(rows[0]) - sum(rows[1])
    assert all(0 < test < train for train, test in zip(*rows, strict=True))
    when = {(u, dataset.catalog.ids[i]): t for u, i, t in _rows(dataset)}
    held = {(u, cut.catalog.ids[i]) for u, i, t in _rows(cut) if t >= 3 * SPAN}
    for one in slices:  # the test of a block is newer than what that person trains on in it
        for user, (train, test) in enumerate(zip(seen(cut, one.train), seen(cut, one.test), strict=True)):
            name = cut.log.user_ids[user]
            assert not any((name, item) in held for item in train)
            times = [when[name, item] for item in train]
            assert all(when[name, item] > max(times) for item in test if times)


def test_rare_people_and_items_can_be_left_out_first() -> None:
    dataset = dataset_of(list({(u, i): (u, i, t) for u, i, t in small_rows()}.values()))
    cut = in_blocks(dataset, base=0.5, later=1, min_user=6, min_item=3)
    assert np.diff(cut.log.offsets).min() >= 6
    assert np.bincount(cut.log.item, minlength=len(cut.catalog)).min() >= 3
    assert 0 < len(cut.log) < len(dataset.log)


def _rows(dataset: Dataset) -> list[tuple[str, int, int]]:
    user = np.repeat(np.arange(dataset.log.n_users), np.diff(dataset.log.offsets))
    return [
        (dataset.log.user_ids[u], int(i), int(t))
        for u, i, t in zip(user, dataset.log.item, dataset.log.time, strict=True)
    ]


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(DataError, match="Block 1 has nothing"):
        lay_out(ROWS, BLOCK, np.where(BLOCK == 1, TRAIN, PART), name="x")
    with pytest.raises(DataError, match="knows no global time"):
        in_blocks(dataset_of(small_rows(), time_unit="order"))
    with pytest.raises(DataError, match="is not laid out in 4 blocks"):
        block_slices(lay_out(ROWS, BLOCK, PART, name="two people"), 4)
    with pytest.raises(DataError, match="is not laid out in 2 blocks"):
        block_slices(dataset_of(small_rows()), 2)
