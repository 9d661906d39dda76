"""CSV and Parquet: the same rows by every reader, and one clear sentence for every mistake."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from fedrec.data.tabular import ColumnMapping, import_csv, import_items, import_parquet, import_rows
from fedrec.errors import DataError

PLAIN = ColumnMapping(user="who", item="what", time="when")
FULL = ColumnMapping(user="who", item="what", time="when", value="stars", event="did")
TEXT = 'who,what,when,stars,did\n007,"x, y",10,4.5,view\n,b,,,\n\nnull,"two\nlines",1e3,NaN,buy\n'


@pytest.fixture(params=["pyarrow", "csv module"])
def engine(request, monkeypatch) -> str:
    if request.param == "pyarrow":
        pytest.importorskip("pyarrow")
    else:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    return request.param


def write(folder: Path, text: str, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_every_cell_is_read_alike_by_both_readers(tmp_path, engine) -> None:
    rows = import_csv(write(tmp_path, TEXT), FULL)
    assert rows.user.tolist() == ["007", "", "null"]
    assert rows.item.tolist() == ["x, y", "b", "two\nlines"]
    assert rows.event.tolist() == ["view", "", "buy"]
    np.testing.assert_array_equal(rows.time, [10, np.nan, 1000])
    np.testing.assert_array_equal(rows.value, [4.5, np.nan, np.nan])


def test_columns_not_asked_for_are_not_read(tmp_path, engine) -> None:
    rows = import_csv(write(tmp_path, "what,junk,who,when\ni,%,u,1\n"), PLAIN)
    assert (rows.user.tolist(), rows.item.tolist(), rows.event, rows.value) == (["u"], ["i"], None, None)


def test_tabs_a_byte_order_mark_and_gzip_are_understood(tmp_path, engine) -> None:
    text = "\ufeffwho\twhat\twhen\nü\ti,j\t1\n"
    path = tmp_path / "rows.tsv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    for one in (path, write(tmp_path, text, "rows.tsv")):
        rows = import_csv(one, PLAIN)
        assert (rows.user.tolist(), rows.item.tolist()) == (["ü"], ["i,j"])
    rows = import_csv(write(tmp_path, "who;what;when\nu;i;1\n"), PLAIN, delimiter=";")
    assert rows.item.tolist() == ["i"]


@pytest.mark.parametrize(
    ("time_format", "text", "seconds"),
    [
        ("seconds", "1700000000", 1.7e9),
        ("milliseconds", "1700000000500", 1.7e9 + 0.5),
        ("iso8601", "2023-11-14T22:13:20Z", 1.7e9),
        ("iso8601", "2023-11-14T23:13:20+01:00", 1.7e9),
        ("iso8601", "2023-11-14 22:13:20", 1.7e9),
        ("iso8601", "2023-11-14", 1_699_920_000),
    ],
)
def test_time_formats(tmp_path, time_format, text, seconds) -> None:
    mapping = PLAIN.model_copy(update={"time_format": time_format})
    rows = import_csv(write(tmp_path, f"who,what,when\nu,i,{text}\nu,i,\n"), mapping)
    np.testing.assert_array_equal(rows.time, [seconds, np.nan])


def test_a_date_where_seconds_were_said_names_the_row_and_the_way_out(tmp_path, engine) -> None:
    path = write(tmp_path, "who,what,when\nu,i,3\nu,i,2023-11-14\n")
    with pytest.raises(DataError, match=r"Row 2 of column 'when' in .* holds '2023-11-14'.*iso8601"):
        import_csv(path, PLAIN)


def test_seconds_where_dates_were_said_are_refused(tmp_path) -> None:
    path = write(tmp_path, "who,what,when\nu,i,yesterday\n")
    mapping = PLAIN.model_copy(update={"time_format": "iso8601"})
    with pytest.raises(DataError, match=r"Row 1 of column 'when' .* 'yesterday', which is not an ISO 8601 time"):
        import_csv(path, mapping)


def test_a_wrong_column_is_named_with_those_there_are_and_the_nearest(tmp_path, engine) -> None:
    path = write(tmp_path, "whom,what,when\nu,i,1\n")
    with pytest.raises(DataError, match="has no column 'who', only 'whom', 'what', 'when'; did you mean 'whom'"):
        import_csv(path, PLAIN)


def test_a_column_name_that_stands_twice_is_refused(tmp_path, engine) -> None:
    with pytest.raises(DataError, match="has 2 columns 'who'; rename all but one"):
        import_csv(write(tmp_path, "who,who,what,when\nu,u,i,1\n"), PLAIN)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; there is nothing to import"),
        (b"who,what,when\n", "holds no rows below its header"),
        (b"\n\n", "has no column 'who'"),
        (b"who,what,when\n\xff\xfe,i,1\n", "Cannot read .* as a UTF-8 CSV file"),
        (b"who,what,when\nu,i\n", "Cannot read .* as a UTF-8 CSV file: .*3"),
    ],
)
def test_files_without_rows_in_them_are_refused(tmp_path, engine, content, message) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        import_csv(path, PLAIN)


def test_a_missing_file_and_a_folder_are_no_files(tmp_path, engine) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(DataError, match=r"No file at .*; check the path\."):
            import_csv(path, PLAIN)


def test_a_broken_gzip_file_is_refused(tmp_path, engine) -> None:
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(TEXT.encode() * 50)[:-20])
    with pytest.raises(DataError, match="Cannot read"):
        import_csv(path, FULL)


def test_the_mapping_is_strict() -> None:
    with pytest.raises(ValidationError, match="tim_format"):
        ColumnMapping(user="u", item="i", time="t", tim_format="seconds")
    with pytest.raises(ValidationError, match="seconds"):
        ColumnMapping(user="u", item="i", time="t", time_format="weeks")


def write_parquet(path: Path, **columns) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)
    return path


def test_parquet_keeps_large_ids_and_reads_typed_times(tmp_path) -> None:
    pa = pytest.importorskip("pyarrow")
    path = write_parquet(
        tmp_path / "rows.parquet",
        who=pa.array([2**60 + 1, None, 3]),
        what=pa.array([7.0, None, 8.0]),
        when=pa.array([1_700_000_000_000, 5, None], pa.timestamp("ms", tz="UTC")),
        stars=pa.array([4, None, 5], pa.int8()),
        did=pa.array(["view", None, "buy"]).dictionary_encode(),
    )
    rows = import_rows(path, FULL)
    assert rows.user.tolist() == [str(2**60 + 1), None, "3"]
    assert rows.item.tolist() == ["7", None, "8"]
    np.testing.assert_array_equal(rows.time, [1.7e9, 0.005, np.nan])
    np.testing.assert_array_equal(rows.value, [4, np.nan, 5])
    assert rows.event.tolist() == ["view", None, "buy"]


def test_parquet_times_may_be_dates_numbers_or_text(tmp_path) -> None:
    import datetime

    days = write_parquet(tmp_path / "days.parquet", who=["u"], what=["i"], when=[datetime.date(2023, 11, 14)])
    assert import_parquet(days, PLAIN).time.tolist() == [1_699_920_000]
    millis = write_parquet(tmp_path / "ms.parquet", who=["u"], what=["i"], when=[1500])
    assert import_parquet(millis, PLAIN.model_copy(update={"time_format": "milliseconds"})).time.tolist() == [1.5]
    text = write_parquet(tmp_path / "text.pq", who=["u"], what=["i"], when=["2023-11-14"])
    assert import_rows(text, PLAIN.model_copy(update={"time_format": "iso8601"})).time.tolist() == [1_699_920_000]


def test_parquet_mistakes_are_named(tmp_path) -> None:
    path = write_parquet(tmp_path / "rows.parquet", whom=["u"], what=["i"], when=[1])
    with pytest.raises(DataError, match="has no column 'who', only 'whom', 'what', 'when'; did you mean 'whom'"):
        import_parquet(path, PLAIN)
    with pytest.raises(DataError, match=r"Cannot read .* as a Parquet file"):
        import_parquet(write(tmp_path, TEXT, "rows.pq"), PLAIN)
    with pytest.raises(DataError, match="No file at"):
        import_parquet(tmp_path / "none.parquet", PLAIN)
    empty = write_parquet(tmp_path / "none.pq", who=[], what=[], when=[])
    with pytest.raises(DataError, match="holds no rows"):
        import_parquet(empty, PLAIN)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'fedrec\[sim\]'"):
        import_parquet(write(tmp_path, "x", "rows.parquet"), PLAIN)


def test_items_have_titles_and_split_attributes(tmp_path, engine) -> None:
    path = write(tmp_path, "id,title,attributes\n1,Toy Story (1995),Comedy| Animation |\n2,,\n", "items.csv")
    titles, attributes = import_items(path)
    assert titles == {"1": "Toy Story (1995)", "2": ""}
    assert attributes == {"1": ("Comedy", "Animation"), "2": ()}


def test_items_may_come_as_parquet_under_other_names(tmp_path) -> None:
    path = write_parquet(tmp_path / "items.parquet", sku=[5, 6], name=["A", None], tags=["x|y", None])
    titles, attributes = import_items(path, item="sku", title="name", attributes="tags")
    assert (titles, attributes) == ({"5": "A", "6": ""}, {"5": ("x", "y"), "6": ()})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1,A,x\n1,B,y\n", "Item '1' stands twice"),
        ("1,A,x\n ,B,y\n", "Item 2 in .* has no id in column 'id'"),
    ],
)
def test_items_need_one_line_and_an_id_each(tmp_path, lines, message) -> None:
    with pytest.raises(DataError, match=message):
        import_items(write(tmp_path, f"id,title,attributes\n{lines}"))
