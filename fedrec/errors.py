"""Everything that can go wrong, as a tree.

FedrecError
  ConfigError      an experiment file says something impossible (unknown key, bad value, missing file)
  DataError        interactions or a catalogue cannot be read or make no sense
    UnknownItem    an item id that the catalogue does not hold
  ProtocolError    a message between server and node is malformed
    WireVersion    it is of another version of fedrec
    TallyRefused   a node's reply failed validation before it was folded
    PlanRefused    a device will not do what a plan asks
    TensorsMissing a plan names tensors that its receiver does not hold
  GatewayError     a gateway cannot be reached, or will not have a device
  StoreError       a device's store cannot be opened, read or written
  RegistryError    a release or a checkpoint cannot be written, found or trusted
    CorruptRelease its bytes do not match its digest
    OtherVersion   a checkpoint is of another version of fedrec
  PrivacyError     a privacy setting, a charge or a ledger makes no sense
    BudgetExhausted  the next release would spend more than the budget
    MaskingError   a masked sum is refused: too few clients, a replay, a forged or missing share
  RunError         a run cannot go on (no clients, no nodes, wrong experiment to resume)

Every message is one sentence that says what was wrong, where, and what to do. The command line prints it and exits 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FedrecError(Exception):
    """Base of every error that fedrec raises on purpose."""


class ConfigError(FedrecError):
    """An experiment says something impossible."""


class DataError(FedrecError):
    """Interactions or a catalogue cannot be read or make no sense."""


class UnknownItem(DataError):
    """An item id that the catalogue does not hold."""


class ProtocolError(FedrecError):
    """A message between server and node is malformed or of another version."""


class WireVersion(ProtocolError):
    """A document is whole, but of another version of the wire format."""


class TallyRefused(ProtocolError):
    """A node's reply failed validation and was not folded."""


class PlanRefused(ProtocolError):
    """A device will not do what a plan asks; nothing was sent."""


class TensorsMissing(ProtocolError):
    """A plan names tensors that are not here; nothing was done, and whoever sent it can send them.

    Attributes:
        digests: their SHA-256, in hexadecimal.
    """

    def __init__(self, digests: Iterable[str]) -> None:
        """Name what is missing."""
        self.digests = tuple(digests)
        super().__init__(f"{len(self.digests)} tensors that the plan names are not here; ask its sender for them.")


class GatewayError(FedrecError):
    """A gateway cannot be reached, or will not have a device or what it sends."""


class StoreError(FedrecError):
    """A device's store cannot be opened, read or written."""


class RegistryError(FedrecError):
    """A release or a checkpoint cannot be written, found or trusted."""


class CorruptRelease(RegistryError):
    """The bytes of a release do not match the digest in its manifest."""


class OtherVersion(RegistryError):
    """A checkpoint is whole, but of another version of fedrec."""


class PrivacyError(FedrecError):
    """A privacy setting, a charge or a ledger makes no sense."""


class BudgetExhausted(PrivacyError):
    """The next release would spend more than the budget; nothing was sent."""


class MaskingError(PrivacyError):
    """A masked sum is refused; nothing of it was opened."""


class RunError(FedrecError):
    """A run cannot start or go on."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word closest to `word`, or an empty string.

    >>> nearest("sead", ["seed", "name"])
    "; did you mean 'seed'?"
    """
    matches = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def need(*packages: str) -> None:
    """Raise a clear error if an optional part of fedrec is not installed."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise FedrecError(f"This verb needs {' and '.join(missing)}; install them with: pip install 'fedrec[sim]'.")
