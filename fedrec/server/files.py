"""Files that are either wholly there or not there at all, whenever the process or the machine dies.

A file is written under a temporary name beside its place, forced to the disk, and then renamed. The temporary names are
recognisable, so that what a killed writer left behind can be swept away and nothing else is ever touched.
The checkpoint of a run is such a file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedrec.errors import OtherVersion, ProtocolError, RegistryError, WireVersion
from fedrec.params import Array, Params, digest
from fedrec.protocol import wire

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.fedrec-tmp")


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file so that a reader sees its old bytes or all of its new ones, and so that they survive a power cut.

    Args:
        path: the file; its folder must exist.
        data: the new content.
        mode: permissions, from which the process's mask is taken.

    Raises:
        RegistryError: the disk is full, the place may not be written, or the system refused otherwise. The old file is
            untouched then and no temporary file is left.
    """
    temp = temporary(path)
    try:
        _write(temp, data, mode)
        os.replace(temp, path)
        _sync(path.parent)
    except OSError as error:
        raise refusal(path, error) from error
    finally:
        with suppress(OSError):
            temp.unlink()


def make_folder(path: Path) -> None:
    """Make a folder, and the folders above it, where they are missing.

    Raises:
        RegistryError: as `write_atomically`.
    """
    try:
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            _sync(path.parent)
    except OSError as error:
        raise refusal(path, error) from error


def publish_folder(temp: Path, final: Path) -> None:
    """Give a complete folder its final name in one step.

    Args:
        temp: a folder that `temporary` named, on the same disk as `final`.
        final: its new name, which nothing may have yet but an empty folder.

    Raises:
        RegistryError: as `write_atomically`; `temp` is left as it was.
    """
    try:
        _sync(temp)
        os.rename(temp, final)
        _sync(final.parent)
    except OSError as error:
        raise refusal(final, error) from error


def place_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files that appears complete; where it is there already, mend the files that differ.

    Raises:
        RegistryError: as `write_atomically`.
    """
    if folder.is_dir():
        for name, data in files.items():
            mend(folder / name, data)
        return
    temp = temporary(folder)
    try:
        make_folder(temp)
        for name, data in files.items():
            write_atomically(temp / name, data)
        publish_folder(temp, folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def mend(path: Path, data: bytes) -> None:
    """Write a file unless it holds `data` already; errors as `write_atomically`."""
    if read_file(path) != data:
        write_atomically(path, data)


def read_file(path: Path) -> bytes | None:
    """Return the bytes of a file, or None if there is none.

    Raises:
        RegistryError: the system refuses to read it.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def is_file(path: Path) -> bool:
    """Return whether there is such a file; errors as `read_file`."""
    try:
        return path.is_file()
    except OSError as error:
        raise _unreadable(path, error) from error


def temporary(path: Path) -> Path:
    """Return a new temporary name beside `path`, hidden, that `sweep` recognises."""
    # Only a name, so it need not repeat in a resumed run: the system's randomness keeps two processes apart.
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.fedrec-tmp")


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left directly in `folder`: temporary files and folders of `name`, or all of them.

    Call it only where no other writer can be at work. What cannot be removed stays: it harms nobody.
    """
    with suppress(OSError):
        for path in list(folder.iterdir()):
            match = _TEMPORARY.fullmatch(path.name)
            if match is None or name not in (None, match["name"]):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()


def refusal(path: Path, error: OSError) -> RegistryError:
    """Return the error that tells a person in one sentence why `path` could not be written and what to do."""
    if error.errno in _FULL:
        return RegistryError(f"The disk is full: cannot write '{path}'; free some space there, then run again.")
    reason = error.strerror or type(error).__name__
    if error.errno in _FORBIDDEN:
        return RegistryError(
            f"No permission to write '{path}' ({reason}); change the permissions or choose another folder."
        )
    return RegistryError(f"Cannot write '{path}' ({reason}); check the path and the disk, then run again.")


def save_checkpoint(path: Path, header: dict[str, Any], tensors: Params) -> None:
    """Write all that a resume needs into one file; a run has one writer.

    Args:
        path: the file; its folder is made if it is missing.
        header: what JSON can hold.
        tensors: named arrays.

    Raises:
        RegistryError: as `write_atomically`.
    """
    text = json.dumps(header, sort_keys=True)
    make_folder(path.parent)
    sweep(path.parent, path.name)
    sealed = {"header": text, "digest": _seal(text, tensors)}
    _keep(path)
    write_atomically(path, wire.pack("checkpoint", sealed, tensors))


def _keep(path: Path) -> None:
    """Let the checkpoint that is about to be replaced live on as the one before it; its bytes are not copied."""
    if not path.is_file():
        return
    temp = temporary(path)
    try:
        os.link(path, temp)
        os.replace(temp, previous(path))
    except OSError as error:
        raise refusal(path, error) from error
    finally:
        with suppress(OSError):
            temp.unlink()


def previous(path: Path) -> Path:
    """Return where the checkpoint before that of `path` is kept."""
    return path.with_name(f"{path.name}.previous")


def load_last_good(path: Path) -> tuple[dict[str, Any], dict[str, Array], str | None]:
    """Return the newest checkpoint that is whole, and a note if that is the one before the last.

    Raises:
        RegistryError: there is none, or neither is whole.
    """
    try:
        return *load_checkpoint(path), None
    except RegistryError as error:
        if not path.is_file() or not previous(path).is_file():
            raise
        try:
            header, tensors = load_checkpoint(previous(path))
        except RegistryError:
            raise error from None
        return header, tensors, f"The checkpoint '{path}' is damaged; the run goes on from the one before it."


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return ``(header, tensors)`` as `save_checkpoint` was given them.

    Raises:
        OtherVersion: it is of another version of fedrec.
        RegistryError: there is no such file, it may not be read, or one of its bytes has changed.
    """
    document = read_file(path)
    if document is None:
        raise RegistryError(f"No checkpoint at '{path}'; start the run anew or give the folder of the one to resume.")
    try:
        sealed, tensors = wire.unpack("checkpoint", document)
        if _seal(sealed["header"], tensors) != sealed["digest"]:
            raise ProtocolError("The digest does not match.")
        return json.loads(sealed["header"]), tensors
    except WireVersion as error:
        raise OtherVersion(
            f"The checkpoint '{path}' is of another version of fedrec; go on with the fedrec that began the run, or "
            "delete it to start the run anew."
        ) from error
    except (ProtocolError, LookupError, TypeError, AttributeError) as error:
        raise RegistryError(
            f"The checkpoint '{path}' is damaged; restore it from a backup, or delete it to start the run anew."
        ) from error


def _seal(header: str, tensors: Params) -> str:
    return hashlib.sha256(f"{digest(tensors)}|{header}".encode()).hexdigest()


def _unreadable(path: Path, error: OSError) -> RegistryError:
    return RegistryError(f"Cannot read '{path}' ({error.strerror}); check its permissions and the disk.")


def _write(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        rest = memoryview(data)
        while rest:  # one call writes at most 2 GiB
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
