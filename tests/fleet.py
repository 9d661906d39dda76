"""A gateway in a thread of this process, or its own process, with real TLS and real devices, for the tests."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedrec.client.conditions import Conditions
from fedrec.client.gateway.control import GatewayPool
from fedrec.client.gateway.devices import Devices
from fedrec.client.gateway.service import serve
from fedrec.client.gateway.settings import GatewaySettings, Pace
from fedrec.client.sdk import Device, Enrolment, Limits
from fedrec.data.catalog import ItemCatalog
from fedrec.errors import FedrecError
from fedrec.fleet import enrol
from fedrec.protocol.signing import public_key
from fedrec.random import Key
from fedrec.server.certificates import make_certificates
from fedrec.server.device_release import first_release

SERVER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
N_ITEMS = 20
CATALOG = ItemCatalog(
    tuple(f"i{n}" for n in range(N_ITEMS)), tuple(f"Item {n}" for n in range(N_ITEMS)), ((),) * N_ITEMS,
    np.zeros(N_ITEMS, np.int64),
)  # fmt: skip
ANYWHERE = Conditions()
OPEN = Limits(cohort_minimum=1, epsilon=None)
ALWAYS = Conditions(charging=True, unmetered=True, idle=True)


@contextmanager
def short_folder() -> Iterator[Path]:
    """Return a folder whose path is short enough for a socket."""
    with TemporaryDirectory(prefix="gw") as name:
        yield Path(name)


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def made(folder: Path, certified: datetime | None = None, days: int = 30, **changes: Any) -> GatewaySettings:
    """Make certificates and a release in a folder and return the settings of its gateway."""
    make_certificates(folder, ["localhost"], certified or datetime.now(UTC), days, ec.SECP256R1())
    (folder / "release").write_bytes(first_release(CATALOG, SERVER))
    port = free_port()
    said: dict[str, Any] = {
        "listen": f"127.0.0.1:{port}", "address": f"localhost:{port}", "trusted": (public_key(SERVER).hex(),),
        "release": "release", "pace": Pace(least_seconds=0.2, per_second=1000.0), "deadline_seconds": 30.0,
        "margin_seconds": 0.0,
    }  # fmt: skip
    return GatewaySettings(**(said | changes))


@contextmanager
def running(folder: Path, settings: GatewaySettings) -> Iterator[list[dict[str, Any]]]:
    """Serve a gateway in a thread; yields the lines that it says."""
    lines: list[dict[str, Any]] = []
    begun, ended = threading.Event(), threading.Event()
    stop: list[Callable[[], object]] = []
    failed: list[BaseException] = []

    def say(line: dict[str, Any]) -> None:
        lines.append(line)
        if line["event"] == "listening":
            begun.set()

    async def main() -> None:
        event, loop = asyncio.Event(), asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(event.set))
        await serve(folder, settings, say, event)

    def work() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failed.append(error)
        finally:
            begun.set()
            ended.set()

    threading.Thread(target=work, daemon=True).start()
    assert begun.wait(20)
    if failed:
        raise failed[0]
    try:
        yield lines
    finally:
        stop[0]()
        assert ended.wait(20)


def enrolled(folder: Path, settings: GatewaySettings, name: str) -> Enrolment:
    """Add a device at a gateway."""
    devices = Devices(folder)
    try:
        return Enrolment.parse(enrol(folder, settings, devices, name), name)
    finally:
        devices.close()


def device(folder: Path, enrolment: Enrolment, number: int, limits: Limits = OPEN) -> Device:
    """Return an enrolled device with a history that depends on its number alone."""
    found = Device(folder, enrolment=enrolment, limits=limits, senses=lambda: ALWAYS)
    for time_, item in enumerate(history(number)):
        found.record(item, time=time_)
    return found


def history(number: int) -> list[str]:
    draws = Key.from_seed(number).child("history").numpy()
    return [f"i{n}" for n in draws.integers(0, N_ITEMS, 6 + number % 5)]


def until_seen(folder: Path, n: int, seconds: float = 60.0) -> None:
    """Return when so many devices have checked in."""
    end = time.monotonic() + seconds
    while GatewayPool(folder).status()["seen"] < n:
        assert time.monotonic() < end, "the devices did not come"
        time.sleep(0.1)


PARTICIPATE = """
import sys, time
from pathlib import Path
from fedrec.client.sdk import Conditions, Device
from fedrec.errors import FedrecError
device = Device(Path(sys.argv[1]))
until = time.monotonic() + float(sys.argv[2])
while time.monotonic() < until:
    try:
        came = device.participate(Conditions(), wait_seconds=5)
        print(came.outcome, came.why, flush=True)
        time.sleep(min(came.come_back_seconds, 0.5))
    except FedrecError as error:
        print("error", error, flush=True)
        time.sleep(0.5)
"""


def processes(folders: list[Path], seconds: float) -> list[subprocess.Popen[str]]:
    """Start a process for each device, which takes part again and again."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, "-c", PARTICIPATE], subprocess.PIPE
    return [
        subprocess.Popen([*command, str(folder), str(seconds)], stdout=pipe, stderr=pipe, text=True, env=environment)
        for folder in folders
    ]


class PoolLink:
    """A `Link` to gateways' control sockets, as the ClientApp of each node uses it."""

    def __init__(self, pools: dict[int, Any]) -> None:
        self.pools = pools

    def nodes(self) -> list[int]:
        return list(self.pools)

    def exchange(self, verb: Any, documents: Any, timeout_seconds: float | None, freight: Any = None) -> Any:
        from fedrec.protocol.link import Reply

        parcels = {} if freight is None else {sha256: freight.get(sha256) for sha256 in freight.parcels}
        for node, document in documents.items():
            try:
                yield Reply(node, self.pools[node].answer(verb, document, parcels))
            except FedrecError as error:
                yield Reply(node, None, str(error))
