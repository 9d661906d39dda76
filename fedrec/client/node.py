"""`fedrec node`: a Flower SuperNode that hosts the clients of a data set or of device stores.

Everything about a node stands in its ``node.toml``. Flower starts a process for each message; it finds the file in the
node's configuration and makes the pool anew, so what was forgotten or recorded meanwhile counts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedrec.checkup import Finding, disk, is_private, look, port_answers
from fedrec.client.budget import LocalBudget
from fedrec.client.pool import ClientPool, Engine, LogPool
from fedrec.client.shelf import MOST_BYTES, FolderShelf
from fedrec.data.catalog import ItemCatalog
from fedrec.data.cleaning import Dataset
from fedrec.data.log import InteractionLog
from fedrec.data.sources import load_dataset
from fedrec.errors import ConfigError, RunError
from fedrec.interrupts import ending_with_parent
from fedrec.privacy.settings import NoPrivacy, Privacy
from fedrec.protocol.identities import Identities, SecurePolicy
from fedrec.protocol.signing import read_key
from fedrec.settings import parsed, read_toml

if TYPE_CHECKING:
    from fedrec.client.gateway.control import GatewayPool

SETTINGS, KEY = "node.toml", "fedrec-node"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
UNKNOWN = "the server does not know this node's key"
TRIES, PAUSE_SECONDS = 4, 10.0
"""A server registers keys when it starts; who comes a moment earlier is not refused for good."""
MOST_APART_SECONDS = 60.0
REASONS = {
    "Failed to activate SuperNode": f"{UNKNOWN}; register it there with `fedrec server add-node`",
    "certificate has expired": "the server's certificate has expired; make a new one there with `fedrec server renew`",
    "WRONG_VERSION_NUMBER": "what listens there speaks no TLS; is 'server' its address?",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not one that 'ca' vouches for, or the clock is wrong",
    "Connection refused": "nobody listens there; is the server running, and is 'server' its address?",
}
"""What Flower's words mean for a person."""


class NodeSettings(BaseModel):
    """One node. Paths start at the folder of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(default="node", max_length=200)
    """What the node is called in the server's records; it orders the nodes, so let it be unlike any other."""
    server: str
    """``host:port`` of the server, or of the proxy in front of it."""
    ca: str = "ca.crt"
    """The certificate that vouches for the server."""
    key: str = "node.key"
    """The node's private key; it never leaves the node."""
    data: str | None = None
    """A folder that `fedrec data import` wrote: a person a user."""
    stores: tuple[str, ...] = ()
    """Folders of device stores, one a person."""
    gateway: str | None = None
    """Folder of a gateway that runs on this machine (`fedrec gateway run`): its devices are the node's people."""
    catalog: str | None = None
    """Folder with the public ``catalog.json`` that the server numbers items by; None: that of `data`."""
    share: tuple[int, int] | None = None
    """Host only every n-th person of `data`, from number i on: ``[i, n]``; for trials."""
    engine: Engine = "batched"
    """Train clients in blocks, or one after the other."""
    threads: int = Field(default=1, ge=1)
    """torch threads."""
    privacy: Privacy = NoPrivacy()
    """In mode "local": what the clients here insist on, whatever the server asks for."""
    ledgers: str = "ledgers"
    """Where the clients' own ledgers are kept in mode "local"."""
    tensors: str = "tensors"
    """Where the tensors are kept that plans name and do not carry again, such as the frozen part of a model."""
    tensors_bytes: int = Field(default=MOST_BYTES, ge=0)
    """What they may take on the disk; those that were used longest ago make room, and are sent again when needed."""
    identity: str | None = None
    """In mode "distributed": an Ed25519 key in PEM with which the node signs who takes part; None: it signs nothing."""
    identities: str | None = None
    """The public keys of the nodes that the clients here take part with, and for how many clients each speaks, as JSON;
    None: whomever the server introduces."""
    seeded_noise: bool = False
    """Take noise from a seed if the server says so: for trials, it protects nobody."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if [self.data is None, not self.stores, self.gateway is None].count(False) != 1:
            raise ValueError("say where the people's histories are: give one of 'data', 'stores' and 'gateway'")
        if self.stores and self.catalog is None:
            raise ValueError("stores know no catalogue; give 'catalog'")
        if self.share is not None and not 0 <= self.share[0] < self.share[1]:
            raise ValueError("'share' is [i, n] with 0 <= i < n")
        return self

    @classmethod
    def load(cls, path: Path) -> NodeSettings:
        """Read a ``node.toml``.

        Raises:
            ConfigError: there is none, or it makes no sense.
        """
        return parsed(cls, node_toml(path), str(path))


def node_toml(path: Path) -> dict[str, Any]:
    """Return the document of a ``node.toml``.

    Raises:
        ConfigError: there is none, or it is no TOML.
    """
    return read_toml(path, f"'{path}' is missing; `fedrec server init` and `add-node` write one for each node.")


def hosted_policy(path: Path) -> SecurePolicy:
    """Return on what the node of a ``node.toml`` insists in secure sums.

    Raises:
        ConfigError: it makes no sense, or a key cannot be read.
    """
    settings, folder = NodeSettings.load(path), path.parent
    return SecurePolicy(
        None if settings.identity is None else read_key(folder / settings.identity),
        None if settings.identities is None else Identities.load(folder / settings.identities),
        settings.seeded_noise,
    )


def hosted_shelf(path: Path) -> FolderShelf:
    """Return where the node of a ``node.toml`` keeps tensors.

    Raises:
        ConfigError: the file makes no sense.
    """
    settings = NodeSettings.load(path)
    return FolderShelf(path.parent / settings.tensors, settings.tensors_bytes)


def hosted_pool(path: Path) -> ClientPool | GatewayPool:
    """Return the pool that a ``node.toml`` describes, or the way to its gateway.

    Raises:
        FedrecError: it makes no sense, or the data is not there.
    """
    settings, folder = NodeSettings.load(path), path.parent
    if settings.gateway is not None:
        from fedrec.client.gateway.control import GatewayPool

        return GatewayPool(folder / settings.gateway)
    budget = LocalBudget.of(settings.privacy, folder / settings.ledgers)
    catalog = None if settings.catalog is None else ItemCatalog.load(folder / settings.catalog)
    if settings.stores:
        from fedrec.client.device_pool import DevicePool
        from fedrec.client.store import Store

        assert catalog is not None
        stores = [Store(folder / store) for store in settings.stores]
        return DevicePool(stores, catalog, name=settings.name, budget=budget)
    assert settings.data is not None
    local = folder / settings.data
    dataset = load_dataset(str(local) if local.exists() else settings.data)
    if settings.share is not None:
        index, n = settings.share
        return LogPool.partition(dataset.log, dataset.catalog, index, n, settings.engine, budget)
    log = dataset.log if catalog is None else renumbered(dataset, catalog)
    ids = np.array([person_number(settings.name, one) for one in log.user_ids], np.int64)
    return LogPool(log, catalog or dataset.catalog, name=settings.name, ids=ids, engine=settings.engine, budget=budget)


def person_number(node: str, user: str) -> int:
    """Return a number for a person's random streams that no other node's people have, but by a chance of 2^-63.

    It never leaves the node.
    """
    return int.from_bytes(hashlib.sha256(f"{node}\0{user}".encode()).digest()[:8], "little") >> 1


def renumbered(dataset: Dataset, catalog: ItemCatalog) -> InteractionLog:
    """Return a data set's log with items numbered by the public catalogue; interactions with other items are left out.

    Raises:
        ConfigError: none of its items is in the catalogue.
    """
    log = dataset.log
    known = catalog.number_of
    number = np.array([known.get(item, -1) for item in dataset.catalog.ids], np.int64)
    item = number[log.item]
    kept = item >= 0
    if not kept.any():
        raise ConfigError(
            f"None of the items of '{dataset.name}' is in the public catalogue of {len(catalog):,} items; do both name "
            "items by the same ids?"
        )
    return InteractionLog.from_rows(
        np.asarray(log.user, np.int64)[kept], item[kept], np.asarray(log.time)[kept], tuple(log.user_ids),
        np.asarray(log.event)[kept], np.asarray(log.value)[kept], log.event_kinds,
    )  # fmt: skip


def run_node(folder: Path, say: Callable[[str], None]) -> None:
    """Run Flower's SuperNode for the node in `folder` until it is told to end.

    Args:
        folder: holds ``node.toml``, the CA certificate and the node's key.
        say: gets each line that Flower logs.

    Raises:
        FedrecError: the node cannot start, or the server refuses it, with the reason.
    """
    path = folder.absolute() / SETTINGS
    settings = NodeSettings.load(path)
    for name in (settings.ca, settings.key):
        if not (path.parent / name).is_file():
            raise ConfigError(f"'{path.parent / name}' is missing; copy the node's whole folder from the server.")
    key = path.parent / settings.key
    if key.stat().st_mode & 0o077:
        raise ConfigError(f"'{key}' is open to others; close it with: chmod 600 '{key}'.")
    hosted_pool(path)  # a mistake in the data shows now, and not at the first message
    _check_certificate(settings, path.parent / settings.ca)
    for left in reversed(range(TRIES)):
        problem = _served(settings, path, say)
        if problem is None:
            return
        if not left or UNKNOWN not in problem:
            raise RunError(f"The node was stopped: {problem}")
        say(f"fedrec: {problem} Trying again in {PAUSE_SECONDS:.0f} s, for a server that just started may learn it.")
        time.sleep(PAUSE_SECONDS)


def _served(settings: NodeSettings, path: Path, say: Callable[[str], None]) -> str | None:
    """Run the SuperNode until it ends, and return why if nobody asked it to."""
    process = start_supernode(settings, path)
    heard: list[str] = []
    asked: list[int] = []

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            heard[:] = [*heard[-40:], line.rstrip()]
            say(line.rstrip())

    def end(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        process.terminate()

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        code = process.wait()
        listener.join(1.0)  # a child of Flower's may outlive it and hold the pipe
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)
    return None if asked or code == 0 else reason(heard, settings)


def _check_certificate(settings: NodeSettings, ca: Path) -> None:
    """Refuse a server whose certificate does not hold: Flower would try again and again without a word.

    Raises:
        RunError: with the reason. Where nobody answers yet nothing is raised, for the node may be the first.
    """
    try:
        _vouched(settings, ca)
    except RunError as error:
        if isinstance(error.__cause__, ssl.SSLError):
            raise


def reason(heard: list[str], settings: NodeSettings) -> str:
    """Return what Flower's last words mean, in one sentence."""
    text = "\n".join(heard)
    for words, meaning in REASONS.items():
        if words in text:
            return f"{settings.server}: {meaning}" + ("" if meaning.endswith("?") else ".")
    return f"Flower said: {' '.join(line.strip() for line in heard if line.strip())[-300:]}"


def start_supernode(settings: NodeSettings, path: Path) -> subprocess.Popen[str]:
    """Start the SuperNode; its output can be read."""
    beside = Path(sys.executable).parent / "flower-supernode"
    found = str(beside) if beside.is_file() else shutil.which("flower-supernode")
    if found is None:
        raise RunError("'flower-supernode' is not installed; install the node with: pip install 'fedrec[server]'.")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        found, "--superlink", settings.server, "--root-certificates", str(path.parent / settings.ca),
        "--auth-supernode-private-key", str(path.parent / settings.key), "--port", str(port),
        "--node-config", f'{KEY}="{path}"',
    ]  # fmt: skip
    home = {"FLWR_HOME": str(path.parent / "flower"), "OMP_NUM_THREADS": str(settings.threads)}
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return subprocess.Popen(
        command, cwd=path.parent, env={**os.environ, **QUIET, **home, "PATH": search}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=ending_with_parent(),  # noqa: PLW1509 (it does one system call)
    )  # fmt: skip


def checkup(folder: Path) -> list[Finding]:
    """Look at everything that a node needs, and say what to do about what is wrong."""
    path = folder.absolute() / SETTINGS
    found = [look("settings", lambda: f"'{NodeSettings.load(path).name}'", f"edit '{path}'")]
    if not found[0].ok:
        return found
    settings = NodeSettings.load(path)

    def hosted() -> str:
        hosted_pool(path)
        where = settings.data or settings.gateway or f"{len(settings.stores)} stores"
        return f"'{settings.name}' hosts people of {where}"

    return [
        *found,
        is_private(path.parent / settings.key),
        look("data", hosted, f"correct 'data', 'stores', 'gateway' or 'catalog' in '{path}'"),
        port_answers(settings.server),
        look("certificate", lambda: _vouched(settings, path.parent / settings.ca)),
        look("clock", lambda: _clock_beside(settings, path.parent / settings.ca), "set the clock, keep it with NTP"),
        disk(path.parent),
    ]


def _clock_beside(settings: NodeSettings, ca: Path) -> str:
    """Say how far the clock is from the server's, for Flower takes a node's time stamp for five minutes.

    Raises:
        RunError: too far, or the server does not answer.
    """
    import urllib.request
    from email.utils import parsedate_to_datetime
    from urllib.error import HTTPError

    request = urllib.request.Request(f"https://{settings.server}/health")
    try:
        context = ssl.create_default_context(cafile=str(ca))
        try:
            with urllib.request.urlopen(request, timeout=5, context=context) as reply:
                shown = reply.headers["Date"]
        except HTTPError as error:  # a proxy hides the page, and shows its clock all the same
            shown = error.headers["Date"]
            error.close()
        apart = abs(parsedate_to_datetime(str(shown)).timestamp() - time.time())
    except (OSError, ValueError, TypeError) as error:
        raise RunError("The server's clock cannot be read; see there") from error
    if apart > MOST_APART_SECONDS:
        raise RunError(f"{apart:.0f} s from the server's clock")
    return f"{apart:.0f} s from the server's"


def _vouched(settings: NodeSettings, ca: Path) -> str:
    """Say until when the server's certificate holds, by asking the server.

    Raises:
        RunError: it does not hold.
    """
    host, _, port = settings.server.rpartition(":")
    try:
        context = ssl.create_default_context(cafile=str(ca))
        with (
            socket.create_connection((host, int(port)), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            shown = secured.getpeercert() or {}
            return f"holds until {shown.get('notAfter', '?')}"
    except (OSError, ValueError) as error:
        raise RunError(reason([str(error)], settings)) from error
