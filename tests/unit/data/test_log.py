"""`InteractionLog`: grouping, order, digests and the saved folder."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedrec.data.log import InteractionLog
from fedrec.errors import DataError


def small() -> InteractionLog:
    return InteractionLog.from_rows(
        user=np.array([1, 0, 1, 0, 1]),
        item=np.array([10, 20, 30, 40, 50]),
        time=np.array([5, 9, 3, 1, 5]),
        user_ids=("ann", "bob", "cy"),
        event=np.array([0, 1, 0, 0, 1], np.int8),
        value=np.array([1, 2, 3, 4, 5], np.float32),
        event_kinds=("view", "buy"),
    )


def test_rows_are_grouped_by_user_and_ordered_by_time_with_ties_as_given() -> None:
    log = small()
    assert log.history(0).tolist() == [40, 20]
    assert log.history(1).tolist() == [30, 10, 50]  # 10 and 50 at the same time
    assert log.history(2).tolist() == []
    assert log.offsets.tolist() == [0, 2, 5, 5]
    assert log.event.tolist() == [0, 1, 0, 0, 1]
    assert log.value.tolist() == [4, 2, 3, 1, 5]
    assert log.user.tolist() == [0, 0, 1, 1, 1]
    assert (len(log), log.n_users, log.counts.tolist()) == (5, 3, [2, 3, 0])


def test_missing_events_are_zero_and_missing_values_are_nan() -> None:
    log = InteractionLog.from_rows(np.array([0]), np.array([0]), np.array([0]), ("a",))
    assert log.event.tolist() == [0]
    assert np.isnan(log.value).all()


def test_no_rows_or_uneven_columns_are_refused() -> None:
    none = np.array([], np.int64)
    with pytest.raises(DataError, match="no interaction"):
        InteractionLog.from_rows(none, none, none, ())
    with pytest.raises(DataError, match="2 users, 1 items, 2 times"):
        InteractionLog.from_rows(np.zeros(2, int), np.zeros(1, int), np.zeros(2, int), ("a",))


def test_take_users_renumbers_in_the_order_given() -> None:
    log = small().take_users(np.array([2, 1]))
    assert log.user_ids == ("cy", "bob")
    assert [log.history(u).tolist() for u in range(2)] == [[], [30, 10, 50]]
    assert log.value.tolist() == [3, 1, 5]


def test_digest_sees_every_column_and_the_ids() -> None:
    log = small()
    changed = {
        "item": log.item + 1,
        "time": log.time + 1,
        "event": 1 - log.event,
        "value": log.value + 1,
        "user_ids": ("ann", "bob", "di"),
        "event_kinds": ("view", "read"),
    }
    digests = {InteractionLog(**{**vars(small()), name: column}).digest() for name, column in changed.items()}
    assert len(digests | {log.digest()}) == len(changed) + 1
    assert small().digest() == log.digest()


def test_save_and_load_give_the_same_log_memory_mapped(tmp_path) -> None:
    small().save(tmp_path / "log")
    loaded = InteractionLog.load(tmp_path / "log")
    assert loaded.digest() == small().digest()
    assert isinstance(loaded.item, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        loaded.item[0] = 1


def test_load_refuses_an_empty_folder_and_another_format(tmp_path) -> None:
    with pytest.raises(DataError, match=r"No interaction log at .*fedrec data import"):
        InteractionLog.load(tmp_path)
    small().save(tmp_path)
    header = json.loads((tmp_path / "log.json").read_text())
    (tmp_path / "log.json").write_text(json.dumps({**header, "format": 99}))
    with pytest.raises(DataError, match="has format 99, this fedrec reads 1"):
        InteractionLog.load(tmp_path)
