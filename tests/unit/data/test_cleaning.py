"""`clean`: every reason to drop a row, alone and together."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.data.cleaning import REASONS, CleaningReport, RawRows, clean
from fedrec.errors import DataError

NOW = 1_000


def rows_of(*rows: tuple, events: list | None = None, values: list | None = None) -> RawRows:
    user, item, time = (list(column) for column in zip(*rows, strict=True))
    return RawRows(
        np.array(user, object),
        np.array(item, object),
        np.array(time, np.float64),
        None if events is None else np.array(events, object),
        None if values is None else np.array(values, np.float64),
    )


def left(rows: RawRows) -> list[tuple[str, str, float]]:
    return list(zip(rows.user.tolist(), rows.item.tolist(), rows.time.tolist(), strict=True))


def test_missing_users_items_and_times_are_dropped_and_counted() -> None:
    bad_users = [(user, "x", 1) for user in (None, "", "  ", float("nan"))]
    rows = rows_of(("a", "x", 1), *bad_users, ("a", None, 1), ("b", "y", np.nan))
    kept, report = clean(rows, now=NOW)
    assert left(kept) == [("a", "x", 1.0)]
    assert report.dropped == {**dict.fromkeys(REASONS, 0), "missing": 6}


def test_numbers_and_padded_text_become_plain_ids() -> None:
    kept, _ = clean(RawRows(np.array([7, 8]), np.array([" x", "x "]), np.array([1.0, 2.0])), now=NOW)
    assert left(kept) == [("7", "x", 1.0), ("8", "x", 2.0)]
    _, report = clean(RawRows(np.array([7.0, np.nan]), np.array(["x", "x"]), np.array([1.0, 2.0])), now=NOW)
    assert report.dropped["missing"] == 1


def test_times_before_1970_after_now_or_infinite_are_impossible() -> None:
    rows = rows_of(*(("a", "x", time) for time in (-1, 0, NOW, NOW + 1, np.inf, -np.inf)))
    kept, report = clean(rows, now=NOW)
    assert kept.time.tolist() == [0, NOW]
    assert report.dropped["impossible_time"] == 4


def test_without_a_clock_only_times_that_no_integer_holds_are_impossible() -> None:
    kept, report = clean(rows_of(("a", "x", 5e9), ("a", "x", 1e30)), now=None)
    assert kept.time.tolist() == [5e9]
    assert report.dropped["impossible_time"] == 1


def test_infinite_values_are_dropped_and_missing_ones_are_kept() -> None:
    rows = rows_of(("a", "x", 1), ("a", "y", 2), ("a", "z", 3), values=[np.inf, np.nan, 3])
    kept, report = clean(rows, now=NOW)
    assert kept.item.tolist() == ["y", "z"]
    assert report.dropped["infinite_value"] == 1


def test_the_first_of_equal_rows_stays_in_its_place() -> None:
    rows = rows_of(("b", "x", 2), ("a", "x", 1), ("b", "x", 2), ("b", "x", 3), values=[1, 2, 3, 4])
    kept, report = clean(rows, now=NOW)
    assert left(kept) == [("b", "x", 2.0), ("a", "x", 1.0), ("b", "x", 3.0)]
    assert kept.value.tolist() == [1, 2, 4]
    assert report.dropped["duplicate"] == 1


def test_another_event_at_the_same_time_is_no_duplicate() -> None:
    rows = [("a", "x", 1)] * 3
    kept, report = clean(rows_of(*rows, events=["view", "buy", "view"]), now=NOW)
    assert kept.event.tolist() == ["view", "buy"]
    assert report.dropped["duplicate"] == 1


def test_repeats_are_kept_or_reduced_to_the_earliest() -> None:
    rows = rows_of(("a", "x", 9), ("a", "x", 3), ("b", "x", 9), ("a", "x", 3), ("a", "y", 9))
    assert clean(rows, now=NOW)[1].dropped["repeat"] == 0
    kept, report = clean(rows, now=NOW, repeats="first")
    assert left(kept) == [("a", "x", 3.0), ("b", "x", 9.0), ("a", "y", 9.0)]
    assert (report.dropped["duplicate"], report.dropped["repeat"]) == (1, 1)


def slow_core(pairs: list[tuple[str, str]], k_user: int, k_item: int) -> list[tuple[str, str]]:
    while True:
        users, items = [u for u, _ in pairs], [i for _, i in pairs]
        fewer = [(u, i) for u, i in pairs if users.count(u) >= k_user and items.count(i) >= k_item]
        if fewer == pairs:
            return pairs
        pairs = fewer


@pytest.mark.parametrize(("k_user", "k_item"), [(2, 2), (4, 0), (0, 4), (3, 4), (5, 2)])
def test_the_k_core_equals_dropping_rows_one_pass_at_a_time(k_user: int, k_item: int) -> None:
    rng = np.random.default_rng(k_user * 10 + k_item)
    pairs = sorted(
        {(f"u{u}", f"i{i}") for u, i in zip(rng.integers(0, 40, 150), rng.geometric(0.08, 150), strict=True)}
    )
    rows = rows_of(*((u, i, place) for place, (u, i) in enumerate(pairs)))
    expected = slow_core(pairs, k_user, k_item)
    assert 0 < len(expected) < len(pairs)
    kept, report = clean(rows, k_user, k_item, now=NOW)
    assert list(zip(kept.user.tolist(), kept.item.tolist(), strict=True)) == expected
    assert report.dropped["below_k_core"] == len(pairs) - len(expected)


def test_dropping_everything_is_an_error_that_says_why() -> None:
    with pytest.raises(DataError, match=r"No interaction is left.*Kept 0 of 2 rows; dropped 1 with a missing.*k-core"):
        clean(rows_of(("a", "x", 1), ("", "x", 1)), 2, now=NOW)


def test_rows_in_equal_rows_out_plus_dropped() -> None:
    rows = rows_of(
        ("a", "x", 1), ("a", "x", 1), ("", "x", 1), ("b", "y", -3), ("c", "x", 4), ("a", "z", 5), ("c", "z", 6)
    )
    kept, report = clean(rows, 2, 2, now=NOW)
    assert report.rows_in == 7
    assert report.rows_out == len(kept) == 4
    assert sum(report.dropped.values()) == 3
    assert report.to_dict() == {"rows_in": 7, "rows_out": 4, "dropped": report.dropped}


def test_summaries_read_as_one_sentence() -> None:
    assert CleaningReport(5, 5, {"missing": 0}).summary() == "Kept 5 of 5 rows; nothing was dropped."
    one = CleaningReport(5, 4, {"missing": 0, "below_k_core": 1}).summary()
    assert one == "Kept 4 of 5 rows; dropped 1 below the k-core."
    three = CleaningReport(9, 5, {"missing": 1, "duplicate": 2, "below_k_core": 1}).summary()
    assert three.endswith(
        "dropped 1 with a missing user, item or time, 2 that repeat another row and 1 below the k-core."
    )


def test_uneven_columns_are_refused() -> None:
    with pytest.raises(DataError, match="differ in length"):
        RawRows(np.array(["a"]), np.array(["x", "y"]), np.array([1.0]))
