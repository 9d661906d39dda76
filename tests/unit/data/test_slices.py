"""Windows and slices: which part of each history a task is about."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from fedrec.data.catalog import ItemCatalog
from fedrec.data.log import InteractionLog
from fedrec.data.slices import LastWindow, TimeWindow, leave_one_out, resolve, schedule_slices, stream_slices
from fedrec.errors import DataError


def log_of(times_per_user: list[list[int]]) -> InteractionLog:
    user = np.repeat(np.arange(len(times_per_user)), [len(times) for times in times_per_user])
    time = np.array([t for times in times_per_user for t in times])
    return InteractionLog.from_rows(user, np.arange(len(time)), time, tuple(map(str, range(len(times_per_user)))))


def catalog_of(first_seen: list[int]) -> ItemCatalog:
    ids = tuple(map(str, range(len(first_seen))))
    return ItemCatalog(ids, ids, ((),) * len(ids), np.array(first_seen, np.int64))


def ranges(log, window) -> list[tuple[int, int]]:
    low, high = resolve(log, window)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def test_a_time_window_holds_its_start_and_not_its_end() -> None:
    log = log_of([[1, 5, 5, 9], [], [5], [10, 11]])
    assert ranges(log, TimeWindow(start=5, end=9)) == [(1, 3), (0, 0), (0, 1), (0, 0)]
    assert ranges(log, TimeWindow(start=6, end=100)) == [(3, 4), (0, 0), (1, 1), (0, 2)]


def test_a_time_window_equals_counting_row_by_row() -> None:
    rng = np.random.default_rng(3)
    log = log_of([sorted(rng.integers(0, 50, n).tolist()) for n in rng.integers(0, 12, 40)])
    for start, end in ((0, 50), (10, 30), (30, 10)):
        expected = []
        for u in range(log.n_users):
            times = log.time[log.offsets[u] : log.offsets[u + 1]]
            expected.append((int((times < start).sum()), int((times < end).sum())))
        assert ranges(log, TimeWindow(start=start, end=end)) == expected
        asked = np.array([17, 3, 3, 39])
        low, high = resolve(log, TimeWindow(start=start, end=end), asked)
        assert list(zip(low.tolist(), high.tolist(), strict=True)) == [expected[u] for u in asked]


def test_last_windows_stop_at_the_start_of_a_history() -> None:
    log = log_of([[1, 2, 3, 4], [1], []])
    assert ranges(log, LastWindow(skip=0, take=1)) == [(3, 4), (0, 1), (0, 0)]
    assert ranges(log, LastWindow(skip=1, take=1)) == [(2, 3), (0, 0), (0, 0)]
    assert ranges(log, LastWindow(skip=2)) == [(0, 2), (0, 0), (0, 0)]
    assert ranges(log, LastWindow(skip=1, take=9)) == [(0, 3), (0, 0), (0, 0)]


def test_a_window_is_resolved_for_those_asked_in_the_order_given() -> None:
    log = log_of([[1, 2, 3, 4], [1], [], [2, 2, 2]])
    users = np.array([3, 2, 0])
    for window in (LastWindow(skip=1, take=2), LastWindow(skip=0), TimeWindow(start=2, end=4)):
        everybody = resolve(log, window)
        for part, whole in zip(resolve(log, window, users), everybody, strict=True):
            assert part.tolist() == whole[users].tolist()
    nobody = resolve(log, TimeWindow(start=0, end=9), users[:0])
    assert [part.tolist() for part in nobody] == [[], []]


def test_a_time_window_reads_few_rows_of_a_long_history() -> None:
    """Bisection looks at 15 of 20,000 rows for each end of the window, and at no other."""
    log = log_of([list(range(20_000))])
    looked: list[int] = []

    class Watched(np.ndarray):
        def __getitem__(self, rows):
            looked.extend(np.atleast_1d(rows).tolist())
            return np.asarray(self)[rows]

    watched = InteractionLog(**{**vars(log), "time": log.time.view(Watched)})
    assert ranges(watched, TimeWindow(start=777, end=15_000)) == [(777, 15_000)]
    assert 0 < len(set(looked)) <= 30


@pytest.mark.parametrize("window", [{"skip": -1}, {"skip": 0, "take": 0}, {"skip": 0, "tak": 1}])
def test_impossible_windows_are_refused(window) -> None:
    with pytest.raises(ValidationError):
        LastWindow(**window)


def test_stream_slices_share_out_every_interaction_once() -> None:
    log = log_of([list(range(0, 100, 2)), list(range(1, 100, 2))])
    slices = stream_slices(log, catalog_of([0, 55, 99]), base=0.6, later=2, holdout=0.1)
    trained = [sum(high - low for low, high in ranges(log, one.train)) for one in slices]
    assert trained == [60, 15, 15]
    assert sum(high - low for low, high in ranges(log, slices[-1].test)) == 10
    assert [one.test for one in slices[:-1]] == [one.train for one in slices[1:]]
    assert [one.index for one in slices] == [0, 1, 2]
    assert [(one.n_items, one.n_items_test) for one in slices] == [(2, 2), (2, 2), (2, 3)]
    assert list(slices[2].new_items) == [2]


def test_a_slice_without_interactions_is_refused() -> None:
    with pytest.raises(DataError, match=r"Cannot cut 4 interactions .* 2 later slices .* would be empty"):
        stream_slices(log_of([[7, 7, 7, 7]]), catalog_of([0]), base=0.5, later=2, holdout=0.1)


def test_leave_one_out_trains_tests_and_validates_on_disjoint_places() -> None:
    log = log_of([[1, 2, 3, 4, 5]])
    (test,), (validation,) = leave_one_out(catalog_of([0, 3])), leave_one_out(catalog_of([0, 3]), "validation")
    assert ranges(log, test.train) == ranges(log, validation.train) == [(0, 3)]
    assert ranges(log, validation.test) == [(3, 4)]
    assert ranges(log, test.test) == [(4, 5)]
    assert (test.n_items, test.n_items_test, list(test.new_items)) == (2, 2, [])


def test_a_schedule_cuts_by_the_clock_without_a_look_at_interactions() -> None:
    ids = tuple(f"i{number}" for number in range(6))
    catalog = ItemCatalog(ids, ids, ((),) * 6, np.array([0, 10, 50, 95, 101, 400]))
    first, second, third = schedule_slices(catalog, start=100, interval_seconds=100, later=2, test=0.1)
    assert first.train.end == first.test.start == second.train.start == 90
    assert first.test.end == 100
    assert second.train.end == second.test.start == third.train.start == 190
    assert third.test.end == 300
    assert [(one.n_items, one.n_items_test) for one in (first, second, third)] == [(3, 4), (5, 5), (5, 5)]
    with pytest.raises(DataError, match="No item of the catalogue joined before -10 "):
        schedule_slices(catalog, start=0, interval_seconds=100, later=0, test=0.1)
