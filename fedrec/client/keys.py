"""Where the key of a device's store is kept: in the system's keyring, or in a file that only its owner may read."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Protocol

from fedrec.errors import StoreError

KEY_BYTES = 32
KEY_FILE = "store.key"
_SERVICE = "fedrec"


class KeyPlace(Protocol):
    """A place for one 32-byte key."""

    def read(self) -> bytes | None:
        """Return the key, or None where there is none."""
        ...

    def create(self) -> bytes:
        """Draw a key from the operating system's generator, keep it durably, and return it."""
        ...

    def destroy(self) -> None:
        """Make the key unreadable for ever; nothing happens where there is none."""
        ...


class KeyFile:
    """A key in a file of mode 0600."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is read yet."""
        self.path = path

    def read(self) -> bytes | None:
        """Return the key, or None where there is no file.

        Raises:
            StoreError: others may read the file, or it does not hold a key.
        """
        if not self.path.exists():
            return None
        mode = stat.S_IMODE(self.path.stat().st_mode)
        if os.name == "posix" and mode & 0o077:
            raise StoreError(f"Others may read the key file '{self.path}' (mode {mode:04o}); run `chmod 600` on it.")
        key = self.path.read_bytes()
        if len(key) != KEY_BYTES:
            raise StoreError(f"The key file '{self.path}' holds {len(key)} bytes instead of {KEY_BYTES}; restore it.")
        return key

    def create(self) -> bytes:
        """Draw a key and write it to the disk under its final name only when it is whole.

        Raises:
            StoreError: the file cannot be written.
        """
        key, new = secrets.token_bytes(KEY_BYTES), self.path.with_suffix(".new")
        try:
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(key)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise StoreError(f"Cannot write the key file '{self.path}': {error.strerror}.") from error
        return key

    def destroy(self) -> None:
        """Overwrite the key, then remove the file.

        Raises:
            StoreError: the file cannot be overwritten.
        """
        try:
            if self.path.exists():
                with self.path.open("r+b") as file:
                    file.write(secrets.token_bytes(KEY_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
                self.path.unlink()
                sync_folder(self.path.parent)
        except OSError as error:
            raise StoreError(f"Cannot destroy the key file '{self.path}': {error.strerror}.") from error


class SystemKeyring:
    """A key in the system's keyring, through the `keyring` package."""

    def __init__(self, name: str) -> None:
        """Name the entry."""
        self.name = name

    def read(self) -> bytes | None:
        """Return the key, or None where the keyring has none."""
        import keyring

        found = keyring.get_password(_SERVICE, self.name)
        return None if found is None else bytes.fromhex(found)

    def create(self) -> bytes:
        """Draw a key and put it into the keyring."""
        import keyring

        key = secrets.token_bytes(KEY_BYTES)
        keyring.set_password(_SERVICE, self.name, key.hex())
        return key

    def destroy(self) -> None:
        """Delete the entry."""
        import keyring

        if keyring.get_password(_SERVICE, self.name) is not None:
            keyring.delete_password(_SERVICE, self.name)


def key_place(folder: Path) -> KeyPlace:
    """Return the key file of `folder` if it is there, else the system's keyring if there is one that works."""
    file = KeyFile(folder / KEY_FILE)
    if file.path.exists():
        return file
    try:
        import keyring
        from keyring.backends.fail import Keyring as NoKeyring
    except ImportError:
        return file
    return file if isinstance(keyring.get_keyring(), NoKeyring) else SystemKeyring(str(folder.resolve()))


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, so that a created or removed file stays so after a power cut."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
