"""What `fedrec doctor` looks at anywhere: versions, clock, disk, ports. Each finding comes with what to do about it."""

from __future__ import annotations

import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fedrec.errors import FedrecError

LEAST_FREE_BYTES = 2 << 30
NEWS = 1_735_689_600
"""2025-01-01; a clock before it is wrong."""
FLOWER = ((1, 41), (1, 43))
"""From this version of Flower up to, and without, that one."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: the thing.
        ok: whether it is as it should be.
        said: what was found.
        fix: what to do about it; empty where nothing is wrong.
    """

    what: str
    ok: bool
    said: str
    fix: str = ""


def look(what: str, check: Callable[[], str], fix: str = "") -> Finding:
    """Return what a check says, or the reason and the fix if it raises.

    Args:
        what: the thing.
        check: returns what it found, or raises `FedrecError` with one sentence.
        fix: what to do where the sentence does not say it.
    """
    try:
        return Finding(what, True, check())
    except FedrecError as error:
        return Finding(what, False, str(error), fix or "see there")


def python_and_packages() -> list[Finding]:
    """Look at the versions of Python and of what a server or a node needs."""
    found = [
        Finding(
            "python", sys.version_info >= (3, 11), sys.version.split()[0], "" if sys.version_info >= (3, 11) else
            "install Python 3.11 or newer",
        )
    ]  # fmt: skip
    for package in ("torch", "flwr", "cryptography"):
        try:
            own = version(package)
        except PackageNotFoundError:
            found.append(Finding(package, False, "not installed", "pip install 'fedrec[server]'"))
            continue
        low, high = FLOWER
        numbers = tuple(int(part) for part in own.split("+")[0].split(".")[:2] if part.isdigit())
        right = package != "flwr" or low <= numbers < high
        found.append(Finding(package, right, own, "" if right else "pip install 'flwr>=1.41,<1.43'"))
    return found


def clock(now: Callable[[], float] = time.time) -> Finding:
    """Look whether the clock can be right; certificates and slices depend on it."""
    right = now() > NEWS
    said = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now()))
    return Finding("clock", right, said, "" if right else "set the clock, and keep it with an NTP service (chrony)")


def disk(folder: Path, least: int = LEAST_FREE_BYTES) -> Finding:
    """Look whether a folder can be written and has room."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    probe = place / ".fedrec-doctor"
    try:
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        return Finding("disk", False, f"'{place}' cannot be written ({error.strerror})", "change owner or permissions")
    said = f"{free / (1 << 30):.1f} GiB free at '{place}'"
    return Finding(
        "disk", free >= least, said, "" if free >= least else f"free some: {least >> 30} GiB should be there"
    )


def port_is_free(host: str, port: int, key: str) -> Finding:
    """Look whether a port can be listened at; `key` names the setting."""
    try:
        with socket.create_server((host, port)):
            return Finding(f"port {port}", True, f"free ({key})")
    except OSError as error:
        fix = f"end what listens there, or set {key} to another port"
        return Finding(f"port {port}", False, f"cannot listen at {host}:{port} ({error.strerror})", fix)


def port_answers(address: str) -> Finding:
    """Look whether somebody listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return Finding("server", True, f"{address} answers")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fix = "start it with `fedrec server run`, or correct 'server' in node.toml"
        return Finding("server", False, f"nobody answers at {address} ({reason})", fix)


def is_private(path: Path) -> Finding:
    """Look whether a secret file is there and closed to others."""
    if not path.is_file():
        return Finding(path.name, False, f"'{path}' is missing", "copy the folder that the server made, whole")
    closed = not path.stat().st_mode & 0o077
    return Finding(
        path.name, closed, "closed to others" if closed else "open to others", "" if closed else f"chmod 600 '{path}'"
    )


def as_document(findings: Iterable[Finding]) -> list[Mapping[str, object]]:
    """Return findings as JSON."""
    return [{"what": one.what, "ok": one.ok, "said": one.said, "fix": one.fix} for one in findings]
