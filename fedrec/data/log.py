"""`InteractionLog`: who did what with which item, and when, as columns sorted by (user, time)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import DataError

COLUMNS = ("item", "time", "event", "value")
USER_IDS = "user_ids.jsonl"
FORMAT = 2
LISTED_FORMAT = 1
"""The format before 2, which lists the user ids in ``log.json``; still read."""
NEVER = 2**31 - 1
DENSE_CELLS = 32
"""`first_place` lays out a table of histories by items while it has at most so many cells for each number it handles;
from there on, clearing the table costs more than sorting."""


class UserIds(Sequence[str]):
    """External ids of any number of users, kept as text and decoded only where asked for.

    The text holds one JSON string a line, so a file of it is readable, can be memory-mapped, and takes a million ids
    without making a million objects.

    >>> UserIds.of(("ann", "bob"))[1]
    'bob'
    """

    def __init__(self, text: NDArray[np.uint8]) -> None:
        """Index `text`, [n bytes] ASCII: one JSON string a line, each line ended."""
        self.text = text
        self._ends = np.flatnonzero(text == ord("\n"))

    @classmethod
    def of(cls, ids: Sequence[str]) -> UserIds:
        """Return the same ids in this form."""
        return ids if isinstance(ids, cls) else cls(np.frombuffer(id_lines(ids), np.uint8))

    @classmethod
    def load(cls, path: Path) -> UserIds:
        """Map a file of ids into memory."""
        empty = path.stat().st_size == 0  # a file of no bytes cannot be mapped
        return cls(np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, "r"))

    def __len__(self) -> int:
        """Return the number of ids."""
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        """Return one id, or a tuple of some."""
        if isinstance(place, slice):
            return tuple(self[i] for i in range(*place.indices(len(self))))
        which = range(len(self))[place]
        return str(json.loads(self._lines(which, which + 1)))

    def __iter__(self) -> Iterator[str]:
        """Go through the ids, decoding many at a time."""
        for start in range(0, len(self), 65_536):
            lines = self._lines(start, min(start + 65_536, len(self)))
            yield from json.loads(b"[" + lines.rstrip().replace(b"\n", b",") + b"]")

    def __eq__(self, other: object) -> bool:
        """Whether `other` holds the same ids in the same order, in this form or as a tuple."""
        if isinstance(other, UserIds):
            return bool(np.array_equal(self.text, other.text))
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        """Return the hash of the ids as a tuple, which they are equal to."""
        return hash(tuple(self))

    def __repr__(self) -> str:
        """Say how many ids there are."""
        return f"UserIds({len(self):,} ids)"

    def take(self, places: NDArray[np.int64]) -> UserIds:
        """Return the ids at these places."""
        start, end = self._start(places), self._ends[places] + 1
        return UserIds(self.text[_ranges(start, end - start)])

    def _start(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(places > 0, self._ends[places - 1] + 1, 0)

    def _lines(self, low: int, high: int) -> bytes:
        return self.text[self._ends[low - 1] + 1 if low else 0 : self._ends[high - 1] + 1].tobytes()


def id_lines(ids: Sequence[str]) -> bytes:
    r"""Return ids as the text of `UserIds`.

    >>> id_lines(["a", "two\nlines"])
    b'"a"\n"two\\nlines"\n'
    """
    return "".join(json.dumps(one) + "\n" for one in ids).encode("ascii")


def _ranges(start: NDArray[np.int64], width: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return all places from ``start[k]`` up to ``start[k] + width[k]``, one range after the other."""
    before = np.cumsum(width) - width
    places: NDArray[np.int64] = np.arange(int(width.sum())) + np.repeat(start - before, width)
    return places


@dataclass(frozen=True, eq=False)
class InteractionLog:
    """Frozen columns of interactions, grouped by user and ordered by time within a user.

    Row r belongs to the user u with ``offsets[u] <= r < offsets[u + 1]``. Users and items are internal numbers; the
    external ids stand in `user_ids` and in the `ItemCatalog`.

    Attributes:
        offsets: [n_users + 1] int64, where each user's rows start (CSR).
        item: [n] int32 item numbers.
        time: [n] int64 seconds since 1970 UTC, or any non-decreasing order where only the order is known.
        event: [n] int8 index into `event_kinds`.
        value: [n] float32, for example a rating; NaN where there is none.
        user_ids: [n_users] external ids.
        event_kinds: what the numbers in `event` mean.
    """

    offsets: NDArray[np.int64]
    item: NDArray[np.int32]
    time: NDArray[np.int64]
    event: NDArray[np.int8]
    value: NDArray[np.float32]
    user_ids: Sequence[str]
    event_kinds: tuple[str, ...] = ("interaction",)

    @classmethod
    def from_rows(
        cls,
        user: NDArray[np.int64],
        item: NDArray[np.int64],
        time: NDArray[np.int64],
        user_ids: tuple[str, ...],
        event: NDArray[np.int8] | None = None,
        value: NDArray[np.float32] | None = None,
        event_kinds: tuple[str, ...] = ("interaction",),
    ) -> InteractionLog:
        """Sort rows by (user, time), ties in the order given (stable), and group them.

        Args:
            user: [n] user numbers below ``len(user_ids)``.
            item: [n] item numbers.
            time: [n] seconds since 1970 UTC.
            user_ids: external id of every user number.
            event: [n] index into `event_kinds`; all 0 if not given.
            value: [n] ratings or amounts; all NaN if not given.
            event_kinds: names of the events.

        Raises:
            DataError: the columns differ in length or there are no rows.
        """
        n = len(user)
        if n == 0:
            raise DataError("The log holds no interaction, so there is nothing to learn from; check the source file.")
        if not len(item) == len(time) == n:
            raise DataError(f"Columns differ in length: {n} users, {len(item)} items, {len(time)} times.")
        order = np.lexsort((time, user))
        counts = np.bincount(user, minlength=len(user_ids))
        return cls(
            offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
            item=np.asarray(item)[order].astype(np.int32),
            time=np.asarray(time)[order].astype(np.int64),
            event=np.zeros(n, np.int8) if event is None else np.asarray(event)[order].astype(np.int8),
            value=np.full(n, np.nan, np.float32) if value is None else np.asarray(value)[order].astype(np.float32),
            user_ids=user_ids,
            event_kinds=event_kinds,
        )

    def __len__(self) -> int:
        """Return the number of interactions."""
        return len(self.item)

    @property
    def n_users(self) -> int:
        """How many users the log knows, those without rows included."""
        return len(self.offsets) - 1

    @property
    def counts(self) -> NDArray[np.int64]:
        """[n_users] how many rows each user has."""
        return np.diff(self.offsets)

    @cached_property
    def user(self) -> NDArray[np.int32]:
        """[n] the user number of each row; as long as the log itself, so no code that must scale reads it."""
        return np.repeat(np.arange(self.n_users, dtype=np.int32), self.counts)

    def history(self, user: int) -> NDArray[np.int32]:
        """Return the item numbers of one user, oldest first."""
        return self.item[self.offsets[user] : self.offsets[user + 1]]

    def first_place(self, users: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return at which place of a user's history an item first stands, `NEVER` (2**31 - 1) where it does not.

        Only the histories of these users are read.

        Args:
            users: [c] user numbers.
            items: [c, k] item numbers.

        Returns:
            [c, k] places, counted from 0.
        """
        start = self.offsets[users]
        width = self.offsets[np.asarray(users) + 1] - start
        before = np.cumsum(width) - width
        had = self.item[_ranges(start, width)]
        stride = int(max(had.max(initial=0), items.max(initial=0))) + 1
        base = np.arange(len(start), dtype=np.int64) * stride
        keys, wanted = np.repeat(base, width) + had, base[:, None] + items
        if len(start) * stride <= DENSE_CELLS * (len(keys) + wanted.size):
            rows = _first_dense(keys, wanted, len(start) * stride)
        else:
            rows = _first_sorted(keys, wanted)
        return np.where(rows == NEVER, NEVER, rows - before[:, None])

    def take_users(self, users: NDArray[np.int64]) -> InteractionLog:
        """Return a log of only these users, renumbered 0.. in the order given."""
        width = self.counts[users]
        rows = _ranges(self.offsets[users], width)
        ids = self.user_ids
        return InteractionLog(
            np.concatenate(([0], np.cumsum(width))).astype(np.int64),
            self.item[rows],
            self.time[rows],
            self.event[rows],
            self.value[rows],
            ids.take(users) if isinstance(ids, UserIds) else tuple(ids[int(u)] for u in users),
            self.event_kinds,
        )

    def digest(self) -> str:
        """Return the SHA-256 of the columns, in hexadecimal; equal content gives the same, mapped or in memory."""
        state = hashlib.sha256()
        for column in (self.offsets, self.item, self.time, self.event, self.value):
            state.update(np.ascontiguousarray(column).view(np.uint8).data)
        ids = UserIds.of(self.user_ids).text.tobytes()[:-1].replace(b"\n", b", ")
        state.update(b"[[" + ids + b"], " + json.dumps(self.event_kinds).encode() + b"]")
        return state.hexdigest()

    def save(self, folder: Path) -> None:
        """Write the columns as ``.npy`` files, ``user_ids.jsonl`` and ``log.json`` into a new or empty folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("offsets", *COLUMNS):
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        (folder / USER_IDS).write_bytes(UserIds.of(self.user_ids).text.tobytes())
        (folder / "log.json").write_text(header_text(self.event_kinds), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> InteractionLog:
        """Open a saved log; the columns are memory-mapped and read only where touched.

        Raises:
            DataError: the folder holds no log, or one of another format.
        """
        path = folder / "log.json"
        if not path.is_file():
            raise DataError(f"No interaction log at '{os.fspath(folder)}'; make one with `fedrec data import`.")
        header = json.loads(path.read_text(encoding="utf-8"))
        if header.get("format") not in (LISTED_FORMAT, FORMAT):
            raise DataError(
                f"'{path}' has format {header.get('format')}, this fedrec reads {LISTED_FORMAT} and {FORMAT}; "
                "import it again."
            )
        columns = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("offsets", *COLUMNS)
        }
        listed = header["format"] == LISTED_FORMAT
        ids = tuple(header["user_ids"]) if listed else UserIds.load(folder / USER_IDS)
        if len(ids) != len(columns["offsets"]) - 1:
            raise DataError(
                f"'{path}' names {len(ids):,} users where the columns hold {len(columns['offsets']) - 1:,}."
            )
        return cls(**columns, user_ids=ids, event_kinds=tuple(header["event_kinds"]))


def header_text(event_kinds: tuple[str, ...]) -> str:
    """Return what ``log.json`` holds."""
    return json.dumps({"format": FORMAT, "event_kinds": event_kinds})


def _first_dense(keys: NDArray[np.int64], wanted: NDArray[np.int64], n_cells: int) -> NDArray[np.int64]:
    """Return the first place in `keys` of each of the `wanted`, all below `n_cells`; `NEVER` where there is none."""
    table = np.full(n_cells, NEVER, np.int32)
    table[keys[::-1]] = np.arange(len(keys), dtype=np.int32)[::-1]  # of equal keys, the last one written stays
    return table[wanted].astype(np.int64)


def _first_sorted(keys: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Do what `_first_dense` does, by sorting: its slow twin, whose cost does not grow with the number of items."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    found = np.minimum(np.searchsorted(ordered, wanted), max(len(keys) - 1, 0))
    if not len(keys):
        return np.full(wanted.shape, NEVER, np.int64)
    return np.where(ordered[found] == wanted, order[found], NEVER)
