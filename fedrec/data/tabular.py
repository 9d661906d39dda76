"""Interactions and items from CSV and Parquet files: columns by name, ids as text, times as seconds."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fedrec.data.cleaning import RawRows
from fedrec.errors import DataError, nearest

Column = NDArray[Any]
NO_NUMBER = ("", "nan", "NaN", "NA", "null", "NULL", "None")
"""What stands in a file where a number is missing."""


class ColumnMapping(BaseModel):
    """Which column of a file holds what."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    user: str = Field(min_length=1)
    """Column of user ids."""
    item: str = Field(min_length=1)
    """Column of item ids."""
    time: str = Field(min_length=1)
    """Column of times."""
    value: str | None = None
    """Column of ratings or amounts."""
    event: str | None = None
    """Column that names what happened."""
    time_format: Literal["seconds", "milliseconds", "iso8601"] = "seconds"
    """Seconds or milliseconds since 1970 UTC, or ISO 8601 text (UTC where it names no zone); not used for a Parquet
    column that is itself of a time type."""

    def columns(self) -> list[str]:
        """Return the names of the columns that are read, without repetition."""
        return list(dict.fromkeys(c for c in (self.user, self.item, self.time, self.value, self.event) if c))


def import_csv(path: Path, mapping: ColumnMapping, delimiter: str | None = None) -> RawRows:
    """Return the rows of a CSV file with a header line, UTF-8, also gzipped (``.gz``).

    Args:
        path: the file.
        mapping: which column holds what.
        delimiter: one character; a tab for ``.tsv`` files and a comma for others if not given.

    Raises:
        DataError: the file is missing, empty or unreadable, a column is missing, or a time or value is not one.
    """
    return _rows(_read_csv(path, mapping.columns(), delimiter), mapping, path)


def import_parquet(path: Path, mapping: ColumnMapping) -> RawRows:
    """Return the rows of a Parquet file.

    Args:
        path: the file.
        mapping: which column holds what.

    Raises:
        DataError: as for `import_csv`, or pyarrow is not installed.
    """
    return _rows(_read_parquet(path, mapping.columns()), mapping, path)


def import_rows(path: Path, mapping: ColumnMapping) -> RawRows:
    """Return the rows of a Parquet file (by its name) or else of a CSV file. Raises as the two do."""
    return import_parquet(path, mapping) if _is_parquet(path) else import_csv(path, mapping)


def import_items(
    path: Path, *, item: str = "id", title: str = "title", attributes: str = "attributes"
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return titles and attributes by item id from a CSV or Parquet file.

    Args:
        path: the file, one line an item.
        item: column of item ids.
        title: column of titles.
        attributes: column of tags, separated by '|'.

    Raises:
        DataError: as for `import_csv`, or an item stands twice or has no id.
    """
    names = [item, title, attributes]
    columns = _read_parquet(path, names) if _is_parquet(path) else _read_csv(path, names)
    ids, texts, tags = (["" if v is None else str(v).strip() for v in columns[name].tolist()] for name in names)
    if "" in ids:
        raise DataError(f"Item {ids.index('') + 1} in '{path}' has no id in column '{item}'; give each item one.")
    if len(set(ids)) < len(ids):
        twice = next(one for place, one in enumerate(ids) if one in ids[:place])
        raise DataError(f"Item '{twice}' stands twice in '{path}'; keep one line for each item.")
    split = (tuple(tag.strip() for tag in text.split("|") if tag.strip()) for text in tags)
    return dict(zip(ids, texts, strict=True)), dict(zip(ids, split, strict=True))


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in {".parquet", ".pq"}


def _rows(columns: dict[str, Column], mapping: ColumnMapping, path: Path) -> RawRows:
    if not len(columns[mapping.user]):
        raise DataError(f"'{path}' holds no rows below its header; there is nothing to import.")
    return RawRows(
        user=_ids(columns[mapping.user]),
        item=_ids(columns[mapping.item]),
        time=_seconds(columns[mapping.time], mapping, path),
        event=columns[mapping.event] if mapping.event else None,
        value=_numbers(columns[mapping.value], mapping.value, path, "") if mapping.value else None,
    )


def _ids(column: Column) -> Column:
    """Return ids so that a whole number reads '7', also where the file stores it as 7.0."""
    if column.dtype.kind == "f" and bool(
        (np.isnan(column) | (np.abs(column) < 2**53) & (column == np.rint(column))).all()
    ):
        return np.asarray([None if np.isnan(one) else str(int(one)) for one in column.tolist()], object)
    return column


def _seconds(column: Column, mapping: ColumnMapping, path: Path) -> NDArray[np.float64]:
    if column.dtype.kind == "M":
        return np.where(np.isnat(column), np.nan, column.astype("datetime64[us]").astype(np.int64) / 1e6)
    if mapping.time_format == "iso8601":
        return _each(
            column, _from_iso, f"'{mapping.time}' in '{path}'", "an ISO 8601 time such as 2024-05-31T12:00:00Z"
        )
    hint = "; for dates say that the time format is iso8601"
    numbers = _numbers(column, mapping.time, path, hint)
    return numbers / 1000.0 if mapping.time_format == "milliseconds" else numbers


def _numbers(column: Column, name: str, path: Path, hint: str) -> NDArray[np.float64]:
    if column.dtype.kind in "iufb":
        return column.astype(np.float64)
    return _each(column, float, f"'{name}' in '{path}'", f"a number{hint}")


def _each(column: Column, parse: Callable[[str], float], where: str, wanted: str) -> NDArray[np.float64]:
    """Return each text as a number, NaN where it is missing; the first that cannot be read is an error."""
    numbers = np.full(len(column), np.nan)
    for row, cell in enumerate(column.tolist()):
        text = "" if cell is None else str(cell).strip()
        if text in NO_NUMBER:
            continue
        try:
            numbers[row] = parse(text)
        except ValueError as error:
            raise DataError(f"Row {row + 1} of column {where} holds '{text[:60]}', which is not {wanted}.") from error
    return numbers


def _from_iso(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"No file at '{path}'; check the path.")
    if path.stat().st_size == 0:
        raise DataError(f"'{path}' is empty; there is nothing to import.")


def _check_columns(path: Path, present: Sequence[str], wanted: Iterable[str]) -> None:
    for name in wanted:
        if present.count(name) > 1:
            raise DataError(f"'{path}' has {present.count(name)} columns '{name}'; rename all but one.")
        if name not in present:
            listed = ", ".join(f"'{column}'" for column in present[:20]) + (", ..." if len(present) > 20 else "")
            raise DataError(f"'{path}' has no column '{name}', only {listed}{nearest(name, present) or '.'}")


def _read_csv(path: Path, names: list[str], delimiter: str | None = None) -> dict[str, Column]:
    """Return the named columns as text, by pyarrow if it is installed and else by the csv module."""
    _check_file(path)
    delimiter = delimiter or ("\t" if path.name.removesuffix(".gz").lower().endswith(".tsv") else ",")
    try:
        with _text(path) as lines:
            header = next((row for row in csv.reader(lines, delimiter=delimiter) if row), [])
        _check_columns(path, header, names)
        try:
            return _by_pyarrow(path, names, delimiter)
        except ImportError:
            return _by_csv_module(path, names, delimiter)
    except (ValueError, csv.Error, EOFError, OSError) as error:
        raise DataError(f"Cannot read '{path}' as a UTF-8 CSV file: {str(error).splitlines()[0]}.") from error


def _text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _by_pyarrow(path: Path, names: list[str], delimiter: str) -> dict[str, Column]:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    table = arrow_csv.read_csv(
        str(path),
        parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(
            include_columns=names, column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
        ),
    )
    return {name: table[name].to_numpy() for name in names}


def _by_csv_module(path: Path, names: list[str], delimiter: str) -> dict[str, Column]:
    with _text(path) as lines:
        reader = csv.reader(lines, delimiter=delimiter)
        rows = (row for row in reader if row)
        header = next(rows)
        places = [header.index(name) for name in names]
        cells: list[list[str]] = [[] for _ in names]
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(row)} columns, the header has {len(header)}")
            for column, place in zip(cells, places, strict=True):
                column.append(row[place])
    return {name: np.asarray(column, object) for name, column in zip(names, cells, strict=True)}


def _read_parquet(path: Path, names: list[str]) -> dict[str, Column]:
    """Return the named columns, each in an array of its kind: numbers, times or text."""
    _check_file(path)
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"Reading the Parquet file '{path}' needs pyarrow: pip install 'fedrec[sim]'.") from error
    try:
        _check_columns(path, parquet.read_schema(path).names, names)
        table = parquet.read_table(path, columns=names)
        return {name: _of_kind(table[name]) for name in names}
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"Cannot read '{path}' as a Parquet file: {str(error).splitlines()[0]}.") from error


def _of_kind(column: Any) -> Column:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("us"))
    if pa.types.is_integer(column.type) and column.null_count:
        # As text, not as float: ids above 2**53 would change.
        column = column.cast(pa.string())
    values: Column = column.to_numpy()
    return values
