"""From raw rows to a `Dataset`: what is dropped and why, how users and items are numbered, and the saved folder."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedrec.data.catalog import ItemCatalog
from fedrec.data.log import InteractionLog
from fedrec.errors import DataError

FORMAT = 1
LATEST = 2**53
"""Seconds beyond which a float64 no longer holds every whole second; later times are impossible."""
REASONS = {
    "missing": "with a missing user, item or time",
    "impossible_time": "with an impossible time",
    "infinite_value": "with an infinite value",
    "duplicate": "that repeat another row",
    "repeat": "that repeat a (user, item) pair",
    "below_k_core": "below the k-core",
}


@dataclass(frozen=True, eq=False)
class RawRows:
    """Interactions as a source gave them, in its order: one array per column.

    Attributes:
        user: [n] external ids, text or any objects with a text form; None, NaN or blank where missing.
        item: [n] external ids, likewise.
        time: [n] float64 seconds since 1970 UTC, or an order index; NaN where missing.
        event: [n] names of what happened, or None if the source does not say.
        value: [n] float64 ratings or amounts, NaN where missing, or None if the source has none.
    """

    user: NDArray[Any]
    item: NDArray[Any]
    time: NDArray[np.float64]
    event: NDArray[Any] | None = None
    value: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        """Check that the columns have one length."""
        lengths = {n: len(c) for n, c in vars(self).items() if c is not None}
        if len(set(lengths.values())) > 1:
            raise DataError(f"The raw columns differ in length: {lengths}; each row needs a value in every column.")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.user)

    def take(self, rows: NDArray[Any]) -> RawRows:
        """Return the rows of a mask or of indices, in that order."""
        return RawRows(
            self.user[rows],
            self.item[rows],
            self.time[rows],
            None if self.event is None else self.event[rows],
            None if self.value is None else self.value[rows],
        )


@dataclass(frozen=True)
class CleaningReport:
    """How many rows came in, how many are left, and why the others went.

    Attributes:
        rows_in: rows before cleaning.
        rows_out: rows after it.
        dropped: reason (a key of `REASONS`) to how many rows it removed; the reasons are tried in that order.
    """

    rows_in: int
    rows_out: int
    dropped: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {"rows_in": self.rows_in, "rows_out": self.rows_out, "dropped": dict(self.dropped)}

    def summary(self) -> str:
        """Return one sentence for a person.

        >>> CleaningReport(1200, 1000, {"missing": 150, "duplicate": 50, "repeat": 0}).summary()
        'Kept 1,000 of 1,200 rows; dropped 150 with a missing user, item or time and 50 that repeat another row.'
        """
        parts = [f"{n:,} {REASONS.get(reason, reason)}" for reason, n in self.dropped.items() if n]
        kept = f"Kept {self.rows_out:,} of {self.rows_in:,} rows"
        if not parts:
            return f"{kept}; nothing was dropped."
        listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
        return f"{kept}; dropped {listed}."


def clean(
    rows: RawRows,
    min_user_interactions: int = 0,
    min_item_interactions: int = 0,
    *,
    now: int | None,
    repeats: Literal["keep", "first"] = "keep",
) -> tuple[RawRows, CleaningReport]:
    """Drop rows that cannot be used and rows that were not asked for; the others keep their order.

    Args:
        rows: what the source gave.
        min_user_interactions: least number of rows a user must have (k-core, repeated with items until stable).
        min_item_interactions: least number of rows an item must have.
        now: seconds since 1970 UTC; later rows are impossible. None: no clock applies (order-only data).
        repeats: for several rows of one (user, item) at different times, keep them all or only the first in time.

    Returns:
        The rows that are left, with ids as text, and the report.

    Raises:
        DataError: no row is left.
    """
    dropped = dict.fromkeys(REASONS, 0)
    user, no_user = _as_text(rows.user)
    item, no_item = _as_text(rows.item)
    time = np.asarray(rows.time, np.float64)
    event = None if rows.event is None else _as_text(rows.event)[0]
    left = RawRows(user, item, time, event, rows.value)

    def drop(reason: str, bad: NDArray[np.bool_]) -> None:
        nonlocal left
        dropped[reason] = int(bad.sum())
        if dropped[reason]:
            left = left.take(~bad)

    drop("missing", no_user | no_item | np.isnan(time))
    latest = LATEST if now is None else min(now, LATEST)
    drop("impossible_time", (left.time < 0) | (left.time > latest))
    if left.value is not None:
        drop("infinite_value", np.isinf(left.value))
    user_code, item_code = (np.unique(ids, return_inverse=True)[1] for ids in (left.user, left.item))
    same_event = () if left.event is None else (np.unique(left.event, return_inverse=True)[1],)
    first = _first_of((user_code, item_code, left.time, *same_event))
    drop("duplicate", ~first)
    if repeats == "first":
        user_code, item_code = user_code[first], item_code[first]
        drop("repeat", ~_first_of((user_code, item_code), then=left.time))
    drop("below_k_core", ~k_core(left, min_user_interactions, min_item_interactions))
    report = CleaningReport(len(rows), len(left), dropped)
    if not len(left):
        raise DataError(f"No interaction is left after cleaning: {report.summary()} Check the columns and the limits.")
    return left, report


def _as_text(column: NDArray[Any]) -> tuple[NDArray[np.str_], NDArray[np.bool_]]:
    """Return the column as text without blanks at the ends, and where it is missing."""
    column = np.asarray(column)
    missing = np.zeros(len(column), bool)
    if column.dtype.kind == "O":
        missing = np.asarray((column == None) | (column != column), bool)  # noqa: E711, PLR0124
        column = np.where(missing, "", column)
    elif column.dtype.kind == "f":
        missing = np.isnan(column)
    text = np.strings.strip(column.astype(str))
    return text, missing | (text == "")


def _first_of(keys: tuple[NDArray[Any], ...], then: NDArray[Any] | None = None) -> NDArray[np.bool_]:
    """Mark the first row of every distinct combination of `keys`: first by `then`, ties by place."""
    n = len(keys[0])
    order = np.lexsort((*(() if then is None else (then,)), *reversed(keys)))
    new = np.zeros(n, bool)
    new[:1] = True
    for key in keys:
        new[1:] |= key[order][1:] != key[order][:-1]
    first = np.zeros(n, bool)
    first[order[new]] = True
    return first


def k_core(rows: RawRows, min_user: int, min_item: int) -> NDArray[np.bool_]:
    """Mark the rows of the largest set in which every user and every item has enough rows."""
    kept = np.ones(len(rows), bool)
    if min_user <= 1 and min_item <= 1:
        return kept
    codes = [np.unique(ids, return_inverse=True)[1] for ids in (rows.user, rows.item)]
    while True:
        before = int(kept.sum())
        for code, least in zip(codes, (min_user, min_item), strict=True):
            kept &= (np.bincount(code[kept], minlength=len(code)) >= least)[code]
        if int(kept.sum()) == before:
            return kept


@dataclass(frozen=True)
class Dataset:
    """Interactions and items that are ready to use, and where they came from.

    Attributes:
        name: what to call it.
        log: all interactions.
        catalog: all items, in order of arrival.
        report: what cleaning did.
        provenance: source, sha256, terms, and time_unit: "seconds", or "order" where `log.time` only orders one
            person's rows and says nothing across people.
    """

    name: str
    log: InteractionLog
    catalog: ItemCatalog
    report: CleaningReport
    provenance: dict[str, str]

    @classmethod
    def build(
        cls,
        rows: RawRows,
        titles: Mapping[str, str],
        attributes: Mapping[str, tuple[str, ...]],
        first_seen: Mapping[str, int] | None = None,
        *,
        name: str,
        report: CleaningReport,
        provenance: Mapping[str, str] | None = None,
    ) -> Dataset:
        """Number users and items, and put cleaned rows into a log and a catalogue.

        Items stand in order of arrival, ties in natural order of their ids (by number if every id is a number). An
        item arrives at `first_seen`, or at its first interaction if that is earlier or nothing is given. An item that
        nobody touched and that has no `first_seen` comes last and arrives with the last interaction. In order-only
        data every touched item is there from the start. Users are numbered by first interaction, ties likewise.

        Args:
            rows: what `clean` returned.
            titles: item id to title; an item without one shows its id.
            attributes: item id to tags. Items named here or in `titles` join the catalogue even if nobody touched them.
            first_seen: item id to seconds since 1970 UTC.
            name: what to call the data set.
            report: what `clean` returned.
            provenance: source, sha256, terms, time_unit ("seconds" if not given).
        """
        provenance = {"time_unit": "seconds", **(provenance or {})}
        time = np.floor(rows.time).astype(np.int64)
        user_ids, user = _numbered(rows.user, time)
        touched, code = np.unique(rows.item.astype(str), return_inverse=True)
        arrival = np.full(len(touched), time.min())
        if provenance["time_unit"] == "seconds":
            arrival = _first_time(code, time, len(touched))
        seen = {str(item): int(first) for item, first in zip(touched, arrival, strict=True)}
        end, given = int(time.max()), first_seen or {}
        joined = {
            item: min((times[item] for times in (seen, given) if item in times), default=end)
            for item in {*seen, *titles, *attributes}
        }
        rank = {item: place for place, item in enumerate(_natural(joined))}
        ids = sorted(joined, key=lambda item: (joined[item], item not in seen and item not in given, rank[item]))
        catalog = ItemCatalog(
            tuple(ids),
            tuple(titles.get(item) or item for item in ids),
            tuple(tuple(sorted(set(attributes.get(item, ())))) for item in ids),
            np.asarray([joined[item] for item in ids], np.int64),
        )
        number = np.asarray([catalog.number_of[str(item)] for item in touched], np.int64)[code]
        # A stable sort by the unrounded time keeps the order of events within one second.
        order = np.argsort(rows.time, kind="stable")
        kinds, event = _events(rows)
        log = InteractionLog.from_rows(
            user[order],
            number[order],
            time[order],
            user_ids,
            event[order],
            None if rows.value is None else rows.value[order].astype(np.float32),
            kinds,
        )
        return cls(name, log, catalog, report, provenance)

    def save(self, folder: Path) -> None:
        """Write the data set to `folder`, whole or not at all; an older data set there is replaced.

        Raises:
            DataError: the folder holds something else, or cannot be written.
        """
        taken = any(folder.iterdir()) if folder.is_dir() else folder.exists()
        if taken and not (folder / "dataset.json").is_file():
            raise DataError(
                f"'{folder}' holds something else; choose a new or empty folder for the data set '{self.name}'."
            )
        header = {
            "format": FORMAT,
            "name": self.name,
            "report": self.report.to_dict(),
            "provenance": self.provenance,
            "digests": {"log": self.log.digest(), "catalog": self.catalog.digest()},
        }
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
                made = Path(beside) / "new"
                self.log.save(made)
                self.catalog.save(made)
                (made / "dataset.json").write_text(json.dumps(header, indent=2), encoding="utf-8")
                if folder.exists():
                    os.replace(folder, Path(beside) / "old")
                os.replace(made, folder)
        except OSError as error:
            raise DataError(f"Cannot write the data set '{self.name}' to '{folder}': {error.strerror}.") from error

    @classmethod
    def load(cls, folder: Path) -> Dataset:
        """Open a saved data set; the log's columns are memory-mapped.

        Raises:
            DataError: the folder holds none, one of another format, or a damaged one.
        """
        path = folder / "dataset.json"
        if not path.is_file():
            raise DataError(f"No data set at '{folder}'; make one with `fedrec data import` or `fedrec data fetch`.")
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            if header["format"] != FORMAT:
                raise DataError(f"'{path}' has format {header['format']}, this fedrec reads {FORMAT}; make it again.")
            log, catalog = InteractionLog.load(folder), ItemCatalog.load(folder)
            if not len(log.time) == len(log.event) == len(log.value) == len(log.item) == int(log.offsets[-1]):
                raise ValueError("columns differ in length")
            return cls(header["name"], log, catalog, CleaningReport(**header["report"]), header["provenance"])
        except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
            raise DataError(
                f"The data set at '{folder}' is damaged ({error}); delete the folder, make it again."
            ) from error


def _natural(ids: Iterable[str]) -> list[str]:
    """Return ids by number if every one is a number, else as text.

    >>> _natural(["10", "9", "1"]), _natural(["10", "9", "a"])
    (['1', '9', '10'], ['10', '9', 'a'])
    """
    listed = sorted(ids)
    return sorted(listed, key=int) if all(item.isdecimal() for item in listed) else listed


def _first_time(code: NDArray[np.int64], time: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Return the [n] earliest time of each code."""
    first = np.full(n, np.iinfo(np.int64).max, np.int64)
    np.minimum.at(first, code, time)
    return first


def _numbered(column: NDArray[Any], time: NDArray[np.int64]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return ids in order of first time, ties in natural order, and the [n] number of each row's id."""
    ids, code = np.unique(column.astype(str), return_inverse=True)
    first = _first_time(code, time, len(ids))
    place = {item: rank for rank, item in enumerate(_natural(ids.tolist()))}
    order = np.lexsort((np.asarray([place[item] for item in ids.tolist()]), first))
    number = np.empty(len(ids), np.int64)
    number[order] = np.arange(len(ids))
    return tuple(ids[order].tolist()), number[code]


def _events(rows: RawRows) -> tuple[tuple[str, ...], NDArray[np.int8]]:
    """Return the names of the events, sorted, and the [n] index of each row's; an unnamed one is an interaction."""
    if rows.event is None:
        return ("interaction",), np.zeros(len(rows), np.int8)
    names = rows.event.astype(str)
    kinds, event = np.unique(np.where(names == "", "interaction", names), return_inverse=True)
    if len(kinds) > 127:
        raise DataError(
            f"The event column holds {len(kinds):,} different events, at most 127 fit; is it the right one?"
        )
    return tuple(kinds.tolist()), event.astype(np.int8)
