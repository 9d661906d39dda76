"""Where uploads lie until a round is closed: on the disk, so that the gateway's memory does not grow with them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO, Any

from fedrec.errors import GatewayError


class Spool:
    """A folder of uploads, bounded in bytes; emptied when it is opened."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """Empty the folder, or make it."""
        self.folder, self._most = folder, most_bytes
        self.used = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()

    def put(self, name: str, data: bytes) -> Path:
        """Write a document of the gateway's own and return its path."""
        path = self.folder / name
        path.write_bytes(data)
        self.used += len(data)
        return path

    def take(self, n_bytes: int) -> None:
        """Count bytes that are about to be written.

        Raises:
            GatewayError: the spool is full.
        """
        if self.used + n_bytes > self._most:
            raise GatewayError("The gateway's spool is full; come back later.")
        self.used += n_bytes

    def drop(self, path: Path) -> None:
        """Remove a file."""
        try:
            size = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return
        self.used -= size


class Upload:
    """One answer on its way in: it can stop at any byte and go on from there.

    Attributes:
        path: where it lies.
        sha256: what it will be when it is whole.
        size: how many bytes it will have.
        offset: how many are there.
        complete: whether it is whole and its digest is right.
        busy: whether somebody is sending it now.
    """

    def __init__(self, spool: Spool, name: str, sha256: str, size: int) -> None:
        """Announce an upload; nothing is written yet."""
        self.path = spool.folder / name
        self.sha256, self.size = sha256, size
        self.offset, self.complete, self.busy = 0, False, False
        self._spool = spool
        self._hash: Any = hashlib.sha256()
        self._file: IO[bytes] | None = None

    def write(self, data: bytes) -> None:
        """Add the next bytes.

        Raises:
            GatewayError: there are more than were announced, or the spool is full.
        """
        if self.offset + len(data) > self.size:
            raise GatewayError(f"More than the {self.size:,} bytes came that were announced.")
        self._spool.take(len(data))
        if self._file is None:
            self._file = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", 0)
        self._file.write(data)
        self._hash.update(data)
        self.offset += len(data)

    def pause(self) -> None:
        """Let go of the file until more comes."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self.busy = False

    def finish(self) -> None:
        """Check the digest.

        Raises:
            GatewayError: it is another one; what came is thrown away.
        """
        self.pause()
        if self._hash.hexdigest() != self.sha256:
            self.drop()
            raise GatewayError("What came has another digest than was announced; it was changed on its way.")
        self.complete = True

    def drop(self) -> None:
        """Throw away what came."""
        self.pause()
        self._spool.drop(self.path)
        self.offset, self._hash = 0, hashlib.sha256()
