"""`Devices`: who may speak to a gateway. Tokens are kept as hashes, in SQLite."""

from __future__ import annotations

import base64
import hashlib
import secrets
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from fedrec.errors import ConfigError, GatewayError

DATABASE = "devices.sqlite"
TOKEN_BYTES = 32
_TABLE = """CREATE TABLE IF NOT EXISTS device(
  number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, token BLOB NOT NULL UNIQUE,
  added INTEGER NOT NULL, revoked INTEGER, seen REAL, strikes INTEGER NOT NULL DEFAULT 0)"""


@dataclass
class Known:
    """One device: its number, its name, whether it was revoked, when it was last seen and how often it misbehaved."""

    number: int
    name: str
    revoked: bool
    seen: float | None
    strikes: int


class Devices:
    """The devices of one gateway; any number of processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        """Open the list of `folder`, or start it.

        Raises:
            GatewayError: the disk refuses.
        """
        self._path = folder / DATABASE
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            self._db = sqlite3.connect(self._path, timeout=10.0, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(_TABLE)
        except (sqlite3.Error, OSError) as error:
            raise GatewayError(f"Cannot use '{self._path}': {error}.") from error
        self._version = -1
        self._by_token: dict[bytes, Known] = {}
        self._by_number: dict[int, Known] = {}

    def add(self, name: str, now: int) -> str:
        """Add a device and return its token, which is shown this once and kept as a hash.

        Raises:
            ConfigError: the name is taken or empty.
        """
        if not name or len(name) > 200:
            raise ConfigError("A device needs a name of 1 to 200 characters.")
        token = base64.urlsafe_b64encode(secrets.token_bytes(TOKEN_BYTES)).decode().rstrip("=")
        try:
            self._db.execute("INSERT INTO device(name, token, added) VALUES (?, ?, ?)", (name, hashed(token), now))
        except sqlite3.IntegrityError as error:
            raise ConfigError(f"There is a device '{name}' already; revoked names are not used again.") from error
        return token

    def revoke(self, name: str, now: int) -> None:
        """Refuse a device from now on.

        Raises:
            ConfigError: there is no such device.
        """
        done = self._db.execute("UPDATE device SET revoked = ? WHERE name = ? AND revoked IS NULL", (now, name))
        if not done.rowcount:
            raise ConfigError(f"There is no device '{name}' that could be revoked.")

    def holder(self, token: str) -> Known | None:
        """Return whose token this is, None if nobody's."""
        self._refresh()
        return self._by_token.get(hashed(token))

    def all(self) -> list[Known]:
        """Return every device, in the order in which they were added."""
        self._refresh()
        return list(self._by_number.values())

    def present(self, since: float, strikes: int) -> list[Known]:
        """Return the devices that were seen since a time, are not revoked and have fewer strikes."""
        return [
            one
            for one in self.all()
            if not one.revoked and one.seen is not None and one.seen >= since and one.strikes < strikes
        ]

    def strike(self, number: int) -> None:
        """Note that a device sent something that was not asked for."""
        self._by_number[number].strikes += 1
        self._db.execute("UPDATE device SET strikes = strikes + 1 WHERE number = ?", (number,))

    def flush(self) -> None:
        """Write down when devices were last seen."""
        seen = [(one.seen, one.number) for one in self._by_number.values() if one.seen is not None]
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("UPDATE device SET seen = ? WHERE number = ?", seen)
        self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the list."""
        self._db.close()

    def _refresh(self) -> None:
        """Read the list again if another connection, or this one's `add`, changed it."""
        version = self._db.execute("PRAGMA data_version").fetchone()[0] + self._db.total_changes * 1_000_003
        if version == self._version:
            return
        self._version = version
        rows = self._db.execute("SELECT number, name, token, revoked, seen, strikes FROM device ORDER BY number")
        found: dict[bytes, Known] = {}
        for number, name, token, revoked, seen, strikes in rows.fetchall():
            before = self._by_number.get(number)
            last = seen if before is None or before.seen is None else max(before.seen, seen or 0.0)
            found[token] = Known(number, name, revoked is not None, last, strikes)
        self._by_token = found
        self._by_number = {one.number: one for one in found.values()}


def hashed(token: str) -> bytes:
    """Return what is kept of a token: 32 random bytes need no slow hash."""
    return hashlib.sha256(token.encode()).digest()
