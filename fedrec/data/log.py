"""`InteractionLog`: who did what with which item, and when, as columns sorted by (user, time)."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import DataError

COLUMNS = ("item", "time", "event", "value")
FORMAT = 1


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
    user_ids: tuple[str, ...]
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
        """[n] the user number of each row."""
        return np.repeat(np.arange(self.n_users, dtype=np.int32), self.counts)

    def history(self, user: int) -> NDArray[np.int32]:
        """Return the item numbers of one user, oldest first."""
        return self.item[self.offsets[user] : self.offsets[user + 1]]

    def first_place(self, users: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return at which place of a user's history an item first stands, 2**31 - 1 where it does not.

        Args:
            users: [c] user numbers.
            items: [c, k] item numbers.

        Returns:
            [c, k] places, counted from 0.
        """
        keys, rows = self._pairs
        wanted = np.asarray(users, np.int64)[:, None] * self._stride + items
        found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        there = (keys[found] == wanted) & (items < self._stride)
        return np.where(there, rows[found] - self.offsets[users][:, None], 2**31 - 1)

    @cached_property
    def _stride(self) -> int:
        return int(self.item.max(initial=0)) + 1

    @cached_property
    def _pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sorted numbers of all (user, item) pairs, and the first row of each."""
        keys, rows = np.unique(self.user.astype(np.int64) * self._stride + self.item, return_index=True)
        return keys, rows.astype(np.int64)

    def take_users(self, users: NDArray[np.int64]) -> InteractionLog:
        """Return a log of only these users, renumbered 0.. in the order given."""
        counts = self.counts[users]
        offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        rows = np.arange(int(offsets[-1])) + np.repeat(self.offsets[users] - offsets[:-1], counts)
        return InteractionLog(
            offsets,
            self.item[rows],
            self.time[rows],
            self.event[rows],
            self.value[rows],
            tuple(self.user_ids[int(u)] for u in users),
            self.event_kinds,
        )

    def digest(self) -> str:
        """Return the SHA-256 of the columns, in hexadecimal."""
        state = hashlib.sha256()
        for column in (self.offsets, self.item, self.time, self.event, self.value):
            state.update(np.ascontiguousarray(column).tobytes())
        state.update(json.dumps([self.user_ids, self.event_kinds]).encode())
        return state.hexdigest()

    def save(self, folder: Path) -> None:
        """Write the columns as ``.npy`` files and ``log.json`` into a new or empty folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("offsets", *COLUMNS):
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        header = {"format": FORMAT, "user_ids": self.user_ids, "event_kinds": self.event_kinds}
        (folder / "log.json").write_text(json.dumps(header), encoding="utf-8")

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
        if header.get("format") != FORMAT:
            raise DataError(f"'{path}' has format {header.get('format')}, this fedrec reads {FORMAT}; import it again.")
        columns = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("offsets", *COLUMNS)
        }
        return cls(**columns, user_ids=tuple(header["user_ids"]), event_kinds=tuple(header["event_kinds"]))
