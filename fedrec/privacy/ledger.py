"""The ledger: what was paid for, on disk before anything is sent, over the whole life of a run."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fedrec.errors import BudgetExhausted, PrivacyError
from fedrec.privacy.accounting import check_epsilon, epsilon
from fedrec.privacy.events import AnyEvent, Event, GaussianEvent, MatrixEvent
from fedrec.random import Key

VERSION = 2
USER, ADD_OR_REMOVE = "user", "add or remove one person"
_START = "0" * 64
_ROUNDING = 1e-9
STRIDES = (256, 32, 4, 1)
"""So many charges of one kind are checked against the budget at once."""


class Entry(BaseModel):
    """One charge.

    Attributes:
        number: place in the ledger, from 1.
        name: what it paid for.
        attempt: 1, or how many times the same name was charged: a retry pays again.
        event: the release.
        clip_norm: L2 bound of one person's contribution, in the units of what was released.
        source: digest of all that the release is computed from, where noise and cohort come from a seed; None where
            they come from the operating system.
        chain: SHA-256 over this entry and the `chain` before it.
    """

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    number: int
    name: str
    attempt: int
    event: Event
    clip_norm: float | None
    source: str | None = None
    chain: str


class Charge:
    """A receipt: made by `PrivacyLedger.charge` alone, good for one release of the event that it names."""

    def __init__(self, entry: Entry, _made_by: object, used: int = 0) -> None:
        """Only the ledger makes receipts; `used` of the releases were taken before."""
        if _made_by is not _LEDGER:
            raise PrivacyError("A charge is made by PrivacyLedger.charge, which writes it down first.")
        self.entry = entry
        self._used = used

    def key(self, root: Key) -> Key:
        """Return the key of this charge's noise and cohort: another one for every attempt, so nothing is reused."""
        return root.child("charge", self.entry.name, self.entry.attempt)

    def use(self, noise_multiplier: float, clip_norm: float) -> None:
        """Spend one release of the receipt.

        Raises:
            PrivacyError: it paid for other noise or another clip norm, or is used up.
        """
        event = self.entry.event
        if event.noise_multiplier != noise_multiplier:
            raise PrivacyError(
                f"'{self.entry.name}' was charged with noise {event.noise_multiplier:g}, not {noise_multiplier:g}."
            )
        if self.entry.clip_norm is not None and self.entry.clip_norm != clip_norm:
            raise PrivacyError(
                f"'{self.entry.name}' was charged for clip norm {self.entry.clip_norm:g}, not {clip_norm:g}."
            )
        allowed = event.count if isinstance(event, GaussianEvent) else event.rounds
        if self._used >= allowed:
            raise PrivacyError(f"'{self.entry.name}' was released already; every release needs a charge of its own.")
        self._used += 1


_LEDGER = object()


class PrivacyLedger:
    """Every charge of a run's life, in a file that is only ever appended to.

    One line of JSON an entry, chained by SHA-256, written and synced before `charge` returns. The file is locked while
    it is open. A torn last line, which a crash can leave, belongs to a charge that never returned, so nothing was sent
    for it, and it is cut off.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        epsilon: float | None,
        delta: float,
        unit: str = USER,
        adjacency: str = ADD_OR_REMOVE,
    ) -> None:
        """Open the ledger, or start it.

        Args:
            path: the file; None keeps it in memory, for tests and benchmarks.
            epsilon: the budget; None: no limit, only a record.
            delta: probability that the guarantee may fail with.
            unit: what is protected.
            adjacency: what two worlds that must look alike differ in.

        Raises:
            PrivacyError: the budget or delta makes no sense, they or the unit are not what the file was started with,
                the file is damaged, or another process has it open.
        """
        if epsilon is not None:
            check_epsilon(epsilon)
        if not 0 < delta < 1:
            raise PrivacyError(f"delta must lie between 0 and 1, not {delta:g}.")
        self.budget, self.delta = epsilon, delta
        self.unit, self.adjacency = unit, adjacency
        self._entries: list[Entry] = []
        self._attempts: dict[str, int] = {}
        self._room: dict[AnyEvent, int] = {}
        self._left: list[Entry] = []
        self._file: IO[bytes] | None = None
        self._path = path
        if path is not None:
            self._file = _locked(path)
            try:
                self._load(path)
            except PrivacyError:
                self.close()
                raise

    @classmethod
    def read(cls, path: Path) -> PrivacyLedger:
        """Return a ledger to look at: nothing can be charged to it, and its owner may go on writing.

        Raises:
            PrivacyError: there is none, or it is damaged.
        """
        if not path.is_file():
            raise PrivacyError(f"There is no privacy ledger at '{path}'.")
        header, entries, _ = _parse(path.read_bytes(), path)
        if header is None:
            raise PrivacyError(f"'{path}' is no privacy ledger.")
        found = cls(
            None,
            epsilon=header["epsilon"],
            delta=header["delta"],
            unit=header["unit"],
            adjacency=header["adjacency"],
        )
        found._path = path
        found._entries = entries
        return found

    def charge(self, name: str, event: AnyEvent, clip_norm: float | None = None, source: str | None = None) -> Charge:
        """Write down that a release is paid for, and return the receipt.

        With a source, a charge that a killed process left for the same release is found again, once, instead of being
        paid twice: the same seed, question and people give the same cohort and the same noise, so the same bytes.

        Args:
            name: what it is for; the same name again is a retry, which pays again.
            event: the release.
            clip_norm: the bound that the mechanism will use.
            source: digest of all that the release is computed from; None wherever fresh noise is drawn.

        Raises:
            BudgetExhausted: all charges with this one would pass the budget; nothing is written.
            PrivacyError: the ledger was opened for reading, or the disk refuses.
        """
        if self._path is not None and self._file is None:
            raise PrivacyError(f"The ledger '{self._path}' was opened for reading only.")
        left = self._found(name, event, clip_norm, source)
        if left is not None:
            return Charge(left, _LEDGER)
        self._check(name, event)
        attempt = self._attempts.get(name, 0) + 1
        body: dict[str, Any] = {
            "number": len(self._entries) + 1,
            "name": name,
            "attempt": attempt,
            "clip_norm": clip_norm,
            "source": source,
        }
        body["event"] = event.model_dump(mode="json")
        entry = Entry(**body, chain=_chained(self._entries[-1].chain if self._entries else _START, body))
        self._append(entry.model_dump(mode="json"))
        self._entries.append(entry)
        self._attempts[name] = attempt
        if event in self._room:
            self._room[event] -= 1
        for other in [known for known in self._room if known != event]:
            del self._room[other]
        return Charge(entry, _LEDGER)

    @property
    def path(self) -> Path | None:
        """The file; None for a ledger in memory."""
        return self._path

    def last(self, name: str) -> Entry | None:
        """Return the newest charge of this name, None if there is none."""
        return next((entry for entry in reversed(self._entries) if entry.name == name), None)

    def reopened(self, entry: Entry, used: int) -> Charge:
        """Return the receipt of a stage of correlated noise that a process left which died.

        Args:
            entry: the charge, as the ledger holds it.
            used: rounds of it that may have been released.

        Raises:
            PrivacyError: the ledger does not hold it, or it paid for anything but a stage.
        """
        if not isinstance(entry.event, MatrixEvent) or entry not in self._entries:
            raise PrivacyError(f"'{entry.name}' is no stage that this ledger paid for; a retry pays again.")
        return Charge(entry, _LEDGER, used)

    def entries(self) -> tuple[Entry, ...]:
        """Return every charge, oldest first."""
        return tuple(self._entries)

    def spent(self) -> float:
        """Return the epsilon of all charges together."""
        return epsilon([entry.event for entry in self._entries], self.delta)

    def close(self) -> None:
        """Let go of the file; nothing can be charged any more."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> PrivacyLedger:
        """Return the ledger, to be closed at the end of the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.close()

    def _found(self, name: str, event: AnyEvent, clip_norm: float | None, source: str | None) -> Entry | None:
        """Take the charge that another process left for this very release, None if there is none."""
        if source is None:
            return None
        wanted = (name, event, clip_norm, source)
        found = next((e for e in self._left if (e.name, e.event, e.clip_norm, e.source) == wanted), None)
        if found is not None:
            self._left.remove(found)
        return found

    def _check(self, name: str, event: AnyEvent) -> None:
        """Raise `BudgetExhausted` unless the event fits; how many of its kind fit is asked for many at once."""
        if self.budget is None:
            return
        if self._room.get(event, 0) < 1:
            self._room[event] = self._fitting(event)
        if self._room[event] < 1:
            after = epsilon([*(entry.event for entry in self._entries), event], self.delta)
            raise BudgetExhausted(
                f"The privacy budget is spent: '{name}' would bring epsilon from {self.spent():.4g} to {after:.4g}, "
                f"above {self.budget:g} at delta {self.delta:g}; nothing was sent. The last release stands; "
                "a larger budget is a new promise, so it needs a new run."
            )

    def _fitting(self, event: AnyEvent) -> int:
        """Return a number of this event that the budget has room for; 0 if it has none."""
        past = [entry.event for entry in self._entries]

        def fits(n: int) -> bool:
            if isinstance(event, GaussianEvent):
                more: list[AnyEvent] = [event.model_copy(update={"count": event.count * n})]
            else:
                more = [event] * n
            limit = (self.budget or 0.0) * (1 + _ROUNDING)
            return epsilon([*past, *more], self.delta, "rdp") <= limit or epsilon([*past, *more], self.delta) <= limit

        return next((n for n in STRIDES if fits(n)), 0)

    def _append(self, document: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(document, sort_keys=True).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise PrivacyError(f"Cannot write the privacy ledger '{self._path}': {error.strerror}.") from error

    def _load(self, path: Path) -> None:
        header, entries, sound = _parse(path.read_bytes(), path)
        if header is None:
            self._truncate(0)
            self._append({"fedrec-ledger": VERSION, "unit": self.unit, "adjacency": self.adjacency,
                          "epsilon": self.budget, "delta": self.delta})  # fmt: skip
            _sync_folder(path.parent)
            return
        if (header["epsilon"], header["delta"]) != (self.budget, self.delta):
            raise PrivacyError(
                f"The ledger '{path}' was started with epsilon {header['epsilon']} and delta {header['delta']}, not "
                f"{self.budget} and {self.delta}; a budget cannot be changed while it is being spent."
            )
        if (header["unit"], header["adjacency"]) != (self.unit, self.adjacency):
            raise PrivacyError(
                f"The ledger '{path}' protects the unit '{header['unit']}' ({header['adjacency']}), not '{self.unit}' "
                f"({self.adjacency}); what was promised cannot be changed while it is being spent."
            )
        self._truncate(sound)
        self._entries, self._left = entries, list(entries)
        for entry in entries:
            self._attempts[entry.name] = entry.attempt

    def _truncate(self, size: int) -> None:
        assert self._file is not None
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)


def _locked(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+")
    except OSError as error:
        raise PrivacyError(f"Cannot open the privacy ledger '{path}': {error.strerror}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise PrivacyError(f"The ledger '{path}' is in use by another process; a budget has one spender.") from error
    return file


def _parse(raw: bytes, path: Path) -> tuple[dict[str, Any] | None, list[Entry], int]:
    """Return header, entries, and how many bytes are sound; only a torn last line is forgiven."""
    lines = raw.split(b"\n")
    complete, rest = lines[:-1], lines[-1]
    if not complete:
        return None, [], 0
    try:
        header = json.loads(complete[0])
        if header["fedrec-ledger"] != VERSION:
            raise PrivacyError(
                f"The ledger '{path}' is of version {header['fedrec-ledger']}, this fedrec knows {VERSION}."
            )
        entries: list[Entry] = []
        chain = _START
        for line in complete[1:]:
            entry = Entry.model_validate_json(line)
            body = entry.model_dump(mode="json", exclude={"chain"})
            chain = _chained(chain, body)
            if entry.chain != chain or entry.number != len(entries) + 1:
                raise PrivacyError(f"The ledger '{path}' was changed at entry {len(entries) + 1}; restore it.")
            entries.append(entry)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise PrivacyError(f"The ledger '{path}' is damaged: {str(error).splitlines()[0]}.") from error
    return header, entries, len(raw) - len(rest)


def _chained(before: str, body: dict[str, Any]) -> str:
    return hashlib.sha256((before + json.dumps(body, sort_keys=True)).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
