"""AES-GCM around every row of a device's store: whose table, which number and which version is part of the seal."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedrec.errors import StoreError

SEAL = 1
NONCE_BYTES = 12


class Seal:
    """Seals and opens the rows of one store with its key."""

    def __init__(self, path: Path, key: bytes) -> None:
        """Take the key of the store; `path` names it in errors."""
        self._path, self._cipher = path, AESGCM(key)

    def row(self, table: str, row: int, content: Any) -> bytes:
        """Return a row's content, sealed.

        Raises:
            StoreError: it holds a number that is not finite.
        """
        try:
            text = json.dumps(content, allow_nan=False).encode()
        except ValueError as error:
            raise StoreError(f"Cannot record {content!r}: its value is not a finite number; give None.") from error
        return self.sealed(table, row, text)

    def content(self, table: str, row: int, sealed: bytes) -> Any:
        """Return what `row` sealed; errors as `opened`."""
        return json.loads(self.opened(table, row, sealed))

    def sealed(self, table: str, row: int | str, data: bytes) -> bytes:
        """Return bytes, sealed for their place."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, data, _bound(table, row))

    def opened(self, table: str, row: int | str, sealed: bytes) -> bytes:
        """Return what `sealed` sealed for this place.

        Raises:
            StoreError: it was changed or moved, or the key is another one.
        """
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _bound(table, row))
        except (InvalidTag, ValueError, TypeError) as error:
            what = (
                "the key is not the one that it was written with"
                if table == "about"
                else f"row {row} of '{table}' was changed"
            )
            raise StoreError(f"Cannot read '{self._path}': {what}; restore the key or a backup.") from error


def _bound(table: str, row: int | str) -> bytes:
    return f"fedrec|{SEAL}|{table}|{row}".encode()
