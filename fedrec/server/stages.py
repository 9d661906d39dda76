"""Stages of correlated noise: paid for once, their secret in the run's folder, and no row of noise used twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fedrec.errors import PrivacyError
from fedrec.params import Array
from fedrec.privacy.events import MatrixEvent
from fedrec.privacy.ledger import Charge, PrivacyLedger
from fedrec.privacy.matrix import BandedMechanism, BandedStrategy, CorrelatedNoise
from fedrec.privacy.noise import Shape
from fedrec.random import Key
from fedrec.server.files import read_file, write_atomically

NOISE = "noise.json"
"""File in a run's folder; whoever reads it can subtract the noise of the stage that is under way."""


class _Record(BaseModel):
    """What outlives the process.

    Attributes:
        name: of the stage.
        chain: of the ledger's entry that paid for it.
        first: the round of the slice that takes row 0.
        begun: rows that may have been used.
        coefficients: of the strategy.
        key: of the rows; empty once the last row was begun, for nothing needs it then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    chain: str
    first: int
    begun: int
    coefficients: tuple[float, ...]
    key: str


class Stage:
    """One stage: its mechanism, its receipt, and the rows of noise that are left."""

    def __init__(self, record: _Record, mechanism: BandedMechanism, charge: Charge, path: Path | None) -> None:
        """Go on after the rows that were begun."""
        self.mechanism = mechanism
        self.charge = charge
        self.name = record.name
        self._record = record
        self._path = path
        self._noise: CorrelatedNoise | None = None

    def begin(self, round_number: int, shapes: Mapping[str, Shape]) -> dict[str, Array] | None:
        """Write down that a round is begun, and return its row of noise; None if it was begun before.

        A round that was begun when the server died is never repeated: its sum may have been seen with its noise, and a
        second sum with the same row would give away the difference of the two. Leaving it out is only forgetting.
        """
        number = round_number - self._record.first
        if number < self._record.begun:
            return None
        if self._noise is None:
            self._noise = CorrelatedNoise(self.mechanism.strategy, Key.from_hex(self._record.key), shapes)
        last = number + 1 == self.mechanism.strategy.rounds
        self._record = self._record.model_copy(
            update={"begun": number + 1, "key": "" if last else self._record.key},
        )
        self.save()
        return self._noise.row(number)

    def save(self) -> None:
        """Write the record, readable by its owner alone."""
        if self._path is not None:
            write_atomically(self._path, self._record.model_dump_json().encode(), mode=0o600)


class Stages:
    """The stages of a run, one at a time."""

    def __init__(self, ledger: PrivacyLedger, root: Key | None) -> None:
        """Keep records beside the ledger; keys come from `root` in a simulation, else from the operating system."""
        self._ledger = ledger
        self._root = root
        self._path = None if ledger.path is None else ledger.path.with_name(NOISE)
        self._live: Stage | None = None

    def at(self, name: str, round_number: int, make: Callable[[], BandedMechanism]) -> Stage:
        """Return the stage of this name: the one under way, or the one that a killed process left, or one newly paid.

        Args:
            name: what the ledger calls the stage.
            round_number: the round that is asked for.
            make: gives the mechanism of a stage that begins with this round, if one must be paid for.

        Raises:
            BudgetExhausted: a new stage would pass the budget; nothing was sent.
            PrivacyError: the record is damaged.
        """
        if self._live is None or self._live.name != name:
            self._live = self._left(name) or self._paid(name, round_number, make())
        return self._live

    def _left(self, name: str) -> Stage | None:
        raw = None if self._path is None else read_file(self._path)
        entry = self._ledger.last(name)
        if raw is None or entry is None or not isinstance(entry.event, MatrixEvent) or entry.clip_norm is None:
            return None
        try:
            record = _Record.model_validate_json(raw)
        except ValidationError as error:
            raise PrivacyError(
                f"The record of correlated noise '{self._path}' is damaged; delete it, and the rest of the stage is "
                "paid for anew."
            ) from error
        if record.chain != entry.chain:
            return None
        event = entry.event
        strategy = BandedStrategy(record.coefficients, event.rounds, event.min_separation)
        mechanism = BandedMechanism(entry.clip_norm, event.noise_multiplier, strategy)
        return Stage(record, mechanism, self._ledger.reopened(entry, record.begun), self._path)

    def _paid(self, name: str, first: int, mechanism: BandedMechanism) -> Stage:
        charge = self._ledger.charge(name, mechanism.event(), clip_norm=mechanism.clip_norm)
        key = Key(os.urandom(32)) if self._root is None else charge.key(self._root)
        record = _Record(
            name=name,
            chain=charge.entry.chain,
            first=first,
            begun=0,
            coefficients=mechanism.strategy.coefficients,
            key=key.hex(),
        )
        stage = Stage(record, mechanism, charge, self._path)
        stage.save()
        return stage
