"""`Dataset`: numbering, and a folder that is written whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedrec.data.catalog import ItemCatalog
from fedrec.data.cleaning import CleaningReport, Dataset, RawRows, clean
from fedrec.errors import DataError

REPORT = CleaningReport(3, 3, {"missing": 0})


def build(rows: list[tuple], titles=None, attributes=None, first_seen=None, unit="seconds", **columns) -> Dataset:
    user, item, time = (np.array(column) for column in zip(*rows, strict=True))
    raw = RawRows(user, item, time.astype(np.float64), **columns)
    provenance = {"source": "test", "time_unit": unit}
    return Dataset.build(
        raw, titles or {}, attributes or {}, first_seen, name="small", report=REPORT, provenance=provenance
    )


def test_users_and_items_are_numbered_by_first_interaction_and_ties_by_number() -> None:
    made = build([("10", "7", 50), ("9", "100", 50), ("3", "20", 60), ("3", "7", 10), ("10", "3", 90)])
    assert made.log.user_ids == ("3", "9", "10")
    assert made.catalog.ids == ("7", "100", "20", "3")
    assert made.catalog.first_seen.tolist() == [10, 50, 60, 90]
    assert made.log.history(0).tolist() == [0, 2]
    assert made.log.history(2).tolist() == [0, 3]


def test_ties_of_textual_ids_are_alphabetical() -> None:
    made = build([("u10", "b", 5), ("u9", "a", 5)])
    assert made.log.user_ids == ("u10", "u9")
    assert made.catalog.ids == ("a", "b")


def test_untouched_items_come_last_and_arrive_with_the_last_interaction() -> None:
    titles = {"1": "One", "2": "Two", "3": ""}
    made = build([("u", "2", 10), ("u", "9", 80)], titles, {"4": ("b", "a", "b"), "2": ("c",)})
    assert made.catalog.ids == ("2", "9", "1", "3", "4")
    assert made.catalog.titles == ("Two", "9", "One", "3", "4")
    assert made.catalog.attributes == (("c",), (), (), (), ("a", "b"))
    assert made.catalog.first_seen.tolist() == [10, 80, 80, 80, 80]


def test_a_given_first_seen_counts_unless_the_item_was_touched_before() -> None:
    made = build([("u", "a", 10), ("u", "b", 20)], {"c": "C"}, first_seen={"a": 15, "b": 5, "c": 12})
    assert dict(zip(made.catalog.ids, made.catalog.first_seen.tolist(), strict=True)) == {"b": 5, "a": 10, "c": 12}


def test_order_only_data_has_every_touched_item_from_the_start() -> None:
    made = build([("2", "x", 0), ("2", "y", 1), ("1", "y", 0), ("1", "w", 1)], {"v": "V"}, unit="order")
    assert made.catalog.ids == ("w", "x", "y", "v")
    assert made.catalog.first_seen.tolist() == [0, 0, 0, 1]
    assert made.log.user_ids == ("1", "2")
    assert made.provenance["time_unit"] == "order"


def test_time_unit_is_seconds_unless_said() -> None:
    raw = RawRows(np.array(["u"]), np.array(["i"]), np.array([1.0]))
    assert Dataset.build(raw, {}, {}, name="x", report=REPORT).provenance == {"time_unit": "seconds"}


def test_fractions_of_a_second_order_rows_and_are_then_cut() -> None:
    made = build([("u", "late", 5.9), ("u", "early", 5.1)])
    assert [made.catalog.ids[i] for i in made.log.history(0)] == ["early", "late"]
    assert made.log.time.tolist() == [5, 5]


def test_events_are_named_and_values_follow_their_rows() -> None:
    made = build(
        [("u", "a", 9), ("u", "b", 3), ("u", "c", 5)],
        event=np.array(["view", "", "buy"]),
        value=np.array([1.0, 2.0, np.nan]),
    )
    assert made.log.event_kinds == ("buy", "interaction", "view")
    assert [made.log.event_kinds[e] for e in made.log.event] == ["interaction", "buy", "view"]
    assert made.log.value[[0, 2]].tolist() == [2.0, 1.0]
    assert np.isnan(made.log.value[1])


def test_too_many_kinds_of_event_are_refused() -> None:
    rows = [("u", str(i), i) for i in range(200)]
    with pytest.raises(DataError, match="200 different events, at most 127"):
        build(rows, event=np.array([f"e{i}" for i in range(200)]))


def test_save_and_load_give_the_same_data_set(tmp_path) -> None:
    made = build([("u", "a", 9), ("v", "b", 3)])
    made.save(tmp_path / "deep" / "set")
    loaded = Dataset.load(tmp_path / "deep" / "set")
    assert loaded.log.digest() == made.log.digest()
    assert loaded.catalog.digest() == made.catalog.digest()
    assert (loaded.name, loaded.report, loaded.provenance) == ("small", REPORT, made.provenance)
    assert isinstance(loaded.log.time, np.memmap)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["set"]


def test_saving_again_replaces_the_older_data_set(tmp_path) -> None:
    build([("u", "a", 9), ("v", "b", 3)]).save(tmp_path / "set")
    newer = build([("w", "c", 1)])
    newer.save(tmp_path / "set")
    assert Dataset.load(tmp_path / "set").log.user_ids == ("w",)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_save_that_fails_leaves_the_older_data_set_and_no_litter(tmp_path, monkeypatch) -> None:
    build([("u", "a", 9)]).save(tmp_path / "set")

    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ItemCatalog, "save", full)
    with pytest.raises(DataError, match=r"Cannot write the data set 'small' to .*: No space left on device\."):
        build([("w", "c", 1)]).save(tmp_path / "set")
    monkeypatch.undo()
    assert Dataset.load(tmp_path / "set").log.user_ids == ("u",)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_files_of_others_are_never_replaced(tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(DataError, match="holds something else; choose a new or empty folder"):
            build([("u", "a", 9)]).save(place)
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


def test_load_refuses_nothing_another_format_and_damage(tmp_path) -> None:
    with pytest.raises(DataError, match=r"No data set at .*fedrec data fetch"):
        Dataset.load(tmp_path)
    build([("u", "a", 9), ("v", "b", 3)]).save(tmp_path / "set")
    column = tmp_path / "set" / "time.npy"
    whole = column.read_bytes()
    column.write_bytes(whole[:-8])
    with pytest.raises(DataError, match="is damaged"):
        Dataset.load(tmp_path / "set")
    np.save(column, np.array([1], np.int64))
    with pytest.raises(DataError, match=r"is damaged \(columns differ in length\)"):
        Dataset.load(tmp_path / "set")
    column.write_bytes(whole)
    header = json.loads((tmp_path / "set" / "dataset.json").read_text())
    (tmp_path / "set" / "dataset.json").write_text(json.dumps({**header, "format": 9}))
    with pytest.raises(DataError, match="has format 9, this fedrec reads 1"):
        Dataset.load(tmp_path / "set")
    (tmp_path / "set" / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        Dataset.load(tmp_path / "set")


def test_cleaned_rows_build_whatever_the_type_of_their_ids() -> None:
    rows, report = clean(RawRows(np.array([10, 9]), np.array([2.0, 10.0]), np.array([1.0, 1.0])), now=None)
    made = Dataset.build(rows, {}, {}, name="x", report=report)
    assert made.log.user_ids == ("9", "10")
