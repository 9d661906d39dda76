"""`Store`: one person's interactions on their own device, encrypted row by row, and a log of all that was ever sent.

    store.sqlite    one row per interaction, upload and refusal, each sealed with AES-GCM
    store.key       the key, mode 0600, where the system has no keyring

A row's table, its number and the seal's version are bound into its seal, so rows cannot be exchanged or moved. SQLite
writes ahead and waits for the disk: what `record` returned from survives a power cut.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from fedrec.client.keys import KeyPlace, key_place
from fedrec.client.sealing import Seal
from fedrec.clock import system_clock
from fedrec.errors import StoreError

SCHEMA = 2
DATABASE = "store.sqlite"
_ROWS = ("about", "interaction", "sent", "refused", "part")
_KEPT = "kept"
_TABLES = (*_ROWS, _KEPT)
_BUSY_SECONDS = 10.0


class Interaction(NamedTuple):
    """What happened: the row's number, the item's id, the kind of event, a value or None, seconds since 1970 UTC."""

    row: int
    item: str
    event: str
    value: float | None
    time: int


class Retention(BaseModel):
    """How much a device keeps; whatever is beyond is deleted, not only hidden."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    max_age_seconds: int | None = Field(default=None, ge=1)
    """Interactions that are older go; None: no limit."""
    max_count: int | None = Field(default=10_000, ge=1)
    """Only so many of the newest interactions stay; None: no limit."""


class Store:
    """The history of one person in one folder; for one thread of any number of processes.

    Attributes:
        folder: where it is.
        retention: how much is kept.
        number: a random number that names the device's random streams; it says nothing about the person.
    """

    def __init__(
        self,
        folder: Path,
        *,
        retention: Retention | None = None,
        keys: KeyPlace | None = None,
        now: Callable[[], int] = system_clock,
    ) -> None:
        """Open the store of `folder`, or make one there.

        Args:
            folder: made, for its owner alone, if it is not there.
            retention: how much is kept; the default limits if not given.
            keys: where the key is; see `key_place` if not given.
            now: the clock, in seconds since 1970 UTC.

        Raises:
            StoreError: the key is missing, wrong or open to others, or the file is damaged or of another schema.
        """
        self.folder = folder
        self.retention = retention or Retention()
        self._now = now
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"Cannot make the folder '{folder}': {error.strerror}.") from error
        self._path = folder / DATABASE
        self._keys = keys or key_place(folder)
        key = self._keys.read()
        if key is None and self._has_rows():
            raise StoreError(
                f"The key of the store in '{folder}' is gone, so nothing in it can be read; restore the key, or call "
                "`fedrec.client.store.destroy` to begin anew."
            )
        self._seal = Seal(self._path, self._keys.create() if key is None else key)
        self._db = self._connect()
        try:
            self.number = self._prepare()
            self.prune()
        except BaseException:
            self._db.close()
            raise

    def record(self, item: str, event: str = "interaction", value: float | None = None, time: int | None = None) -> int:
        """Keep one interaction and return its row number; it is on the disk when this returns.

        Args:
            item: external id.
            event: what happened.
            value: for example a rating; must be finite.
            time: seconds since 1970 UTC; now, if not given.

        Raises:
            StoreError: the disk refuses, or the value is not finite.
        """
        fields = [item, event, value, self._now() if time is None else int(time)]
        row = self._append("interaction", fields)
        limit = self.retention.max_count
        if limit is not None and self._count("interaction") > limit:
            self.prune()
        return row

    def history(self) -> list[Interaction]:
        """Return what is kept, oldest first; equal times in the order of recording.

        Raises:
            StoreError: a row is damaged.
        """
        rows = [Interaction(row, *fields) for row, fields in self._read("interaction")]
        kept = self._within(sorted(rows, key=lambda one: (one.time, one.row)))
        return kept

    def prune(self) -> int:
        """Delete what is beyond the retention limits; return how many interactions that were."""
        rows = [Interaction(row, *fields) for row, fields in self._read("interaction")]
        kept = {one.row for one in self._within(sorted(rows, key=lambda one: (one.time, one.row)))}
        return self._delete([one.row for one in rows if one.row not in kept])

    def forget(self, items: Collection[str] | None = None, since: int | None = None) -> int:
        """Delete the interactions with these items, or from this time on, or both; return how many.

        Deleted rows are overwritten, in the database and in its write-ahead log.

        Args:
            items: item ids; None: whatever the item.
            since: seconds since 1970 UTC, included; None: whatever the time.

        Raises:
            StoreError: neither is given, or the disk refuses.
        """
        if isinstance(items, str):
            items = (items,)
        if items is None and since is None:
            raise StoreError("Say what to forget: items, a time, or both; `forget_everything` forgets all.")
        gone = [
            one.row
            for one in self.history()
            if (items is None or one.item in items) and (since is None or one.time >= since)
        ]
        return self._delete(gone)

    def forget_everything(self) -> None:
        """Destroy the key, overwrite and remove the database; the store cannot be used afterwards.

        The key goes first: a device that loses power half-way holds nothing that can be read.

        Raises:
            StoreError: the key cannot be destroyed or the disk refuses.
        """
        self._keys.destroy()
        with self._said():
            for table in _TABLES:
                self._db.execute(f"DELETE FROM {table}")
            self._flush()
            self._db.execute("VACUUM")
            self._flush()
        self.close()
        destroy(self.folder, self._keys)

    def export_history(self) -> str:
        """Return what is kept as JSON lines with the keys item, event, value and time."""
        return "".join(
            json.dumps({"item": one.item, "event": one.event, "value": one.value, "time": one.time}) + "\n"
            for one in self.history()
        )

    def log_sent(self, entry: dict[str, Any]) -> int:
        """Note that something is about to leave the device; call it before it does."""
        return self._append("sent", {"at": self._now(), **entry})

    def sent(self) -> list[dict[str, Any]]:
        """Return a line for everything that ever left the device, oldest first.

        Raises:
            StoreError: a line is damaged.
        """
        return [fields for _, fields in self._read("sent")]

    def log_repeated(self, entry: dict[str, Any]) -> None:
        """Note something that is sent again and again, as one line that says how often and when last."""
        with self.together() as db:
            last = db.execute("SELECT row, sealed FROM sent ORDER BY row DESC LIMIT 1").fetchone()
            if last is not None:
                found = self._seal.content("sent", last[0], last[1])
                if {key: found.get(key) for key in entry} == entry and "times" in found:
                    found |= {"last": self._now(), "times": found["times"] + 1}
                    db.execute(
                        "UPDATE sent SET sealed = ? WHERE row = ?", (self._seal.row("sent", last[0], found), last[0])
                    )
                    return
            self.log_sent({**entry, "times": 1, "last": self._now()})

    def log_refused(self, entry: dict[str, Any]) -> int:
        """Note something that the device would not do, and why."""
        return self._append("refused", {"at": self._now(), **entry})

    def refused(self) -> list[dict[str, Any]]:
        """Return a line for everything that the device refused, oldest first.

        Raises:
            StoreError: a line is damaged.
        """
        return [fields for _, fields in self._read("refused")]

    def take_part(self, entry: dict[str, Any]) -> int:
        """Note what the device takes part in, for its own privacy ledger and so that it answers nothing twice."""
        return self._append("part", {"at": self._now(), **entry})

    def parts(self) -> list[dict[str, Any]]:
        """Return all that the device took part in, oldest first.

        Raises:
            StoreError: a line is damaged.
        """
        return [fields for _, fields in self._read("part")]

    def keep(self, name: str, data: bytes) -> None:
        """Keep some bytes under a name, in place of what was kept under it.

        Raises:
            StoreError: the disk refuses.
        """
        sealed = self._seal.sealed(_KEPT, name, data)
        with self.together() as db:
            db.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (name, sealed))

    def kept(self, name: str) -> bytes | None:
        """Return what is kept under a name, None if nothing is.

        Raises:
            StoreError: it is damaged.
        """
        with self._said():
            row = self._db.execute("SELECT sealed FROM kept WHERE name = ?", (name,)).fetchone()
        return None if row is None else self._seal.opened(_KEPT, name, row[0])

    def drop(self, name: str) -> None:
        """Keep nothing under this name any more."""
        with self.together() as db:
            db.execute("DELETE FROM kept WHERE name = ?", (name,))

    @contextmanager
    def together(self) -> Iterator[sqlite3.Connection]:
        """Let everything that is written in the block be on the disk at its end, or nothing of it."""
        if self._db.in_transaction:
            yield self._db
        else:
            with self._transaction() as db:
                yield db

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def _has_rows(self) -> bool:
        return self._path.exists() and self._path.stat().st_size > 0

    def _connect(self) -> sqlite3.Connection:
        with self._said():
            self._path.touch(mode=0o600)
            db = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)
            try:
                for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
                    db.execute(f"PRAGMA {pragma}")
            except BaseException:
                db.close()
                raise
            return db

    def _prepare(self) -> int:
        """Make the tables, or check that this is our schema and our key; return the device's number."""
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA:
                raise StoreError(f"'{self._path}' has schema {version}, this fedrec reads {SCHEMA}; update fedrec.")
            if version < SCHEMA:
                for table in _ROWS:  # AUTOINCREMENT: a number is never used twice, so no seal fits two rows
                    columns = "row INTEGER PRIMARY KEY AUTOINCREMENT, sealed BLOB NOT NULL"
                    db.execute(f"CREATE TABLE IF NOT EXISTS {table}({columns})")
                db.execute(f"CREATE TABLE {_KEPT}(name TEXT PRIMARY KEY, sealed BLOB NOT NULL)")
                db.execute(f"PRAGMA user_version = {SCHEMA}")
            if version == 0:
                self._insert("about", {"number": secrets.randbelow(1 << 62)})
        about = list(self._read("about"))
        if len(about) != 1:
            raise StoreError(f"'{self._path}' is damaged: it does not say what it is; restore it from a backup.")
        return int(about[0][1]["number"])

    def _append(self, table: str, content: Any) -> int:
        with self.together():
            return self._insert(table, content)

    def _insert(self, table: str, content: Any) -> int:
        last = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
        row = (last[0] if last else 0) + 1
        self._db.execute(f"INSERT INTO {table} VALUES (?, ?)", (row, self._seal.row(table, row, content)))
        return int(row)

    def _read(self, table: str) -> Iterator[tuple[int, Any]]:
        with self._said():
            rows = self._db.execute(f"SELECT row, sealed FROM {table} ORDER BY row").fetchall()
        for row, sealed in rows:
            yield row, self._seal.content(table, row, sealed)

    def _within(self, rows: list[Interaction]) -> list[Interaction]:
        if self.retention.max_age_seconds is not None:
            oldest = self._now() - self.retention.max_age_seconds
            rows = [one for one in rows if one.time >= oldest]
        return rows if self.retention.max_count is None else rows[-self.retention.max_count :]

    def _count(self, table: str) -> int:
        return int(self._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    def _delete(self, rows: list[int]) -> int:
        if rows:
            with self._transaction() as db:
                db.executemany("DELETE FROM interaction WHERE row = ?", [(row,) for row in rows])
            with self._said():
                self._flush()
        return len(rows)

    def _flush(self) -> None:
        """Empty the write-ahead log, which still holds pages as they were before they were overwritten."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._said():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(
                f"Cannot use '{self._path}': {error}; restore it from a backup or free its disk."
            ) from error


def destroy(folder: Path, keys: KeyPlace | None = None) -> None:
    """Destroy the key of the store in `folder` and remove its files, whether or not it can still be read.

    Raises:
        StoreError: a file cannot be removed.
    """
    (keys or key_place(folder)).destroy()
    try:
        for name in (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm"):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"Cannot remove the store in '{folder}': {error.strerror}.") from error
