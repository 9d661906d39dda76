"""`InteractionLog`: grouping, order, digests and the saved folder."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from fedrec.data import log as log_module
from fedrec.data.log import NEVER, InteractionLog, UserIds
from fedrec.errors import DataError
from fedrec.random import Key

ODD_IDS = ("ann", "", "zoë", "two\nlines", '"quoted"', "back\\slash", "ann")


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
    with pytest.raises(DataError, match="has format 99, this fedrec reads 1 and 2"):
        InteractionLog.load(tmp_path)


def by_hand(log: InteractionLog, users: np.ndarray, items: np.ndarray) -> list[list[int]]:
    histories = [log.history(u).tolist() for u in users]
    return [
        [own.index(item) if item in own else NEVER for item in asked]
        for own, asked in zip(histories, items.tolist(), strict=True)
    ]


def repeating(n_users: int = 30, n_items: int = 40) -> InteractionLog:
    """People with histories of 0 to 29 items, in which items come again."""
    user = np.repeat(np.arange(n_users), np.arange(n_users)[::-1])
    item = Key.from_seed(8).child("items").numpy().integers(0, n_items, len(user))
    return InteractionLog.from_rows(user, item, np.arange(len(user)), tuple(map(str, range(n_users))))


@pytest.mark.parametrize("cells", [0, 1 << 40], ids=["sorted", "dense"])
def test_first_place_is_where_an_item_first_stands(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(log_module, "DENSE_CELLS", cells)
    log = repeating()
    users = np.array([3, 29, 0, 17, 3])  # 29 has no history, 3 is asked twice
    items = Key.from_seed(9).numpy().integers(0, 45, (5, 60))  # some are beyond everything that anybody took
    assert log.first_place(users, items).tolist() == by_hand(log, users, items)
    assert log.first_place(users[1:2], items[1:2]).tolist() == [[NEVER] * 60]
    assert log.first_place(users[:0], items[:0]).shape == (0, 60)
    assert log.first_place(users, items[:, :0]).shape == (5, 0)
    assert log.first_place(users, items).dtype == np.int64


def test_first_place_reads_only_the_histories_asked_for(tmp_path) -> None:
    """The rest of the log may be anything, and no array as long as the log is kept."""
    log = repeating()
    log.save(tmp_path)
    item = log.item.copy()
    item[log.offsets[7] :] = 10**9  # as a stride, this would ask for gigabytes
    broken = InteractionLog(**{**vars(log), "item": item})
    users, items = np.array([2, 6]), np.tile(np.arange(40), (2, 1))
    assert broken.first_place(users, items).tolist() == log.first_place(users, items).tolist()
    loaded = InteractionLog.load(tmp_path)
    loaded.first_place(users, items)
    assert set(vars(loaded)) == set(InteractionLog.__dataclass_fields__)


def test_user_ids_are_a_sequence_of_text() -> None:
    ids = UserIds.of(ODD_IDS)
    assert list(ids) == [ids[i] for i in range(len(ids))] == list(ODD_IDS)
    assert (ids[-1], ids[1:4], ids.index("zoë")) == ("ann", ODD_IDS[1:4], 2)
    assert ids == ODD_IDS
    assert ids.__eq__(list(ODD_IDS)) is NotImplemented
    assert ids == UserIds.of(list(ODD_IDS))
    assert ids != ODD_IDS[::-1]
    assert hash(ids) == hash(ODD_IDS)
    assert tuple(ids.take(np.array([3, 0, 3, 6]))) == tuple(ODD_IDS[i] for i in (3, 0, 3, 6))
    assert tuple(ids.take(np.array([], np.int64))) == tuple(UserIds.of(())) == ()
    with pytest.raises(IndexError):
        ids[7]


def test_many_user_ids_are_read_in_parts() -> None:
    ids = [str(i) for i in range(65_536 * 2 + 5)]
    assert list(UserIds.of(ids)) == ids


def test_the_digest_is_that_of_the_ids_as_one_json_list() -> None:
    log = InteractionLog(**{**vars(small()), "user_ids": ODD_IDS[:3]})
    state = hashlib.sha256()
    for column in (log.offsets, log.item, log.time, log.event, log.value):
        state.update(column.tobytes())
    state.update(json.dumps([ODD_IDS[:3], ("view", "buy")]).encode())
    assert log.digest() == state.hexdigest()
    mapped = InteractionLog(**{**vars(log), "user_ids": UserIds.of(ODD_IDS[:3])})
    assert mapped.digest() == log.digest()


def test_take_users_of_a_loaded_log_takes_their_ids(tmp_path) -> None:
    small().save(tmp_path)
    assert (tmp_path / "user_ids.jsonl").read_text() == '"ann"\n"bob"\n"cy"\n'
    taken = InteractionLog.load(tmp_path).take_users(np.array([2, 1]))
    assert taken.user_ids == ("cy", "bob")
    assert taken.digest() == small().take_users(np.array([2, 1])).digest()


def test_a_log_of_nobody_survives_a_folder(tmp_path) -> None:
    small().take_users(np.array([], np.int64)).save(tmp_path)
    assert len(InteractionLog.load(tmp_path).user_ids) == 0


def test_folders_of_format_1_which_list_the_ids_are_still_read(tmp_path) -> None:
    small().save(tmp_path)
    (tmp_path / "user_ids.jsonl").unlink()
    header = {"format": 1, "user_ids": ["ann", "bob", "cy"], "event_kinds": ["view", "buy"]}
    (tmp_path / "log.json").write_text(json.dumps(header))
    assert InteractionLog.load(tmp_path).digest() == small().digest()


def test_load_refuses_ids_of_another_number_of_users(tmp_path) -> None:
    small().save(tmp_path)
    (tmp_path / "user_ids.jsonl").write_text('"ann"\n"bob"\n')
    with pytest.raises(DataError, match="names 2 users where the columns hold 3"):
        InteractionLog.load(tmp_path)
