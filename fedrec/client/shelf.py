"""`Shelf`: the parcels that a node or a device was sent, by digest, up to a bound in bytes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from fedrec.errors import ProtocolError
from fedrec.protocol.parcels import Held, check_parcel

MOST_BYTES = 1 << 30
"""So much a shelf keeps where nothing else is said; what was used longest ago makes room."""
FOLDER = "tensors"
"""What the folder of a shelf is called, below that of a node, a gateway or a device."""
_UNFINISHED = ".part"


class Shelf(Protocol):
    """Where parcels are kept. Nothing is promised: what is not there is sent again."""

    def get(self, sha256: str) -> bytes | None:
        """Return a parcel, its digest checked, or None."""
        ...

    def keep(self, sha256: str, parcel: bytes, spare: Collection[str] = ()) -> None:
        """Keep a parcel whose digest was checked, if there is room; what is in `spare` is not to make it."""
        ...


class MemoryShelf:
    """Keeps parcels in memory, for nodes that live in one process."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        """Start empty."""
        self._most, self._used = most_bytes, 0
        self._parcels: dict[str, bytes] = {}

    def get(self, sha256: str) -> bytes | None:
        """Return a parcel, or None."""
        parcel = self._parcels.pop(sha256, None)
        if parcel is not None:
            self._parcels[sha256] = parcel  # the last in the order is the last that was used
        return parcel

    def keep(self, sha256: str, parcel: bytes, spare: Collection[str] = ()) -> None:
        """Keep a parcel; what was used longest ago and is not in `spare` makes room."""
        if (len(parcel) > self._most and sha256 not in spare) or sha256 in self._parcels:
            return
        self._parcels[sha256] = parcel
        self._used += len(parcel)
        for oldest in [other for other in self._parcels if other != sha256 and other not in spare]:
            if self._used <= self._most:
                return
            self._used -= len(self._parcels.pop(oldest))


class FolderShelf:
    """Keeps parcels as files, for nodes whose processes come and go; several may use one folder at once.

    Attributes:
        folder: a file for each parcel, called by its digest.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        """Name the folder; it is made when there is something to keep."""
        self.folder, self._most = folder, most_bytes

    def get(self, sha256: str) -> bytes | None:
        """Return a parcel, or None; a file that the disk has changed is removed."""
        path = self.folder / sha256
        try:
            parcel = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        try:
            check_parcel(sha256, parcel)
        except ProtocolError:
            path.unlink(missing_ok=True)
            return None
        return parcel

    def keep(self, sha256: str, parcel: bytes, spare: Collection[str] = ()) -> None:
        """Keep a parcel; what was used longest ago makes room.

        Args:
            sha256: its digest.
            parcel: its bytes.
            spare: digests of parcels that are in use, and stay.
        """
        if len(parcel) > self._most and sha256 not in spare:
            return
        path = self.folder / sha256
        try:
            if not path.exists():
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                unfinished = self.folder / f"{_UNFINISHED}{secrets.token_hex(8)}"
                unfinished.write_bytes(parcel)
                unfinished.replace(path)
            self._tidy({sha256, *spare})
        except OSError:
            return  # a full disk costs a download the next time, and nothing else

    def _tidy(self, spare: Collection[str]) -> None:
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process tidies, too
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
        used = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if used <= self._most:
                return
            if path.name not in spare:
                path.unlink(missing_ok=True)
                used -= size


def stocked(shelf: Shelf, arrived: Mapping[str, bytes], spare: Collection[str] = ()) -> Held:
    """Return how to get a parcel, from those that have just arrived or from the shelf; the new ones are kept there.

    Args:
        shelf: where parcels are kept.
        arrived: those that came with a plan, by what they claim is their digest.
        spare: digests of parcels that are in use, and stay.

    Raises:
        ProtocolError: one has another digest than it claims; nothing of it is kept.
    """
    for sha256, parcel in arrived.items():
        check_parcel(sha256, parcel)
        shelf.keep(sha256, parcel, spare)

    def held(sha256: str) -> bytes | None:
        return arrived[sha256] if sha256 in arrived else shelf.get(sha256)

    return held
