"""A thousand devices at one gateway at once, over real gRPC and TLS; and what the device core costs a phone.

The devices are light: one asyncio process speaks for all of them, each with its own connection, token and answer, and
signs nothing, computes nothing. The gateway is `fedrec gateway run` in a process of its own on the same machine. All
connect at the same time, check in, wait for the round, download the plan, upload a tally, and the server's side gets
the sum. What the core costs is measured in a fresh folder with `fedrec[device]` alone, which needs a package index; it
is left out where there is none.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.harness import Row, claim, run, unclaimed
from fedrec.client.gateway.control import GatewayPool
from fedrec.client.gateway.devices import Devices
from fedrec.client.sdk import Enrolment
from fedrec.data.catalog import ItemCatalog
from fedrec.data.slices import LastWindow
from fedrec.evaluation.report import toml
from fedrec.fleet import enrol
from fedrec.models.configs import PopularityConfig
from fedrec.protocol.gateway.v1 import gateway_pb2 as messages
from fedrec.protocol.plan import CensusRequest, RoundPlan
from fedrec.protocol.signing import Terms, public_key, sign
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import CountTask
from fedrec.random import Key
from fedrec.server.certificates import make_certificates, utc_clock
from fedrec.server.device_release import first_release

N_ITEMS = 3_706
"""As many as MovieLens-1M has: a tally is 15 KB."""
SERVICE = "fedrec.gateway.v1.Device"
CHUNK = 256 << 10
WINDOW = LastWindow(skip=0)
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Seen:
    """What the devices saw, in seconds."""

    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    uploads: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class Light:
    """One device that does as little as it can."""

    def __init__(self, enrolment: Enrolment, number: int, seen: Seen) -> None:
        """Name the gateway; nothing is sent yet."""
        credentials = grpc.ssl_channel_credentials(enrolment.root_certificates.encode())
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        self._channel = grpc.aio.secure_channel(enrolment.address, credentials, options)
        self._metadata = (("authorization", f"Bearer {enrolment.token}"),)
        self._number, self._seen = number, seen

    async def check_in(self, wait_seconds: float) -> Any:
        """Ask for something to do."""
        call = self._channel.unary_unary(
            f"/{SERVICE}/CheckIn", messages.CheckInRequest.SerializeToString, messages.CheckInReply.FromString
        )
        request = messages.CheckInRequest(tasks=["count"], wait_seconds=wait_seconds)
        return await call(request, metadata=self._metadata, timeout=180, wait_for_ready=True)

    async def timed_check_in(self, times: list[float]) -> None:
        """Check in, and note how long it took."""
        began = time.perf_counter()
        try:
            await self.check_in(0.0)
            times.append(time.perf_counter() - began)
        except grpc.RpcError as error:
            self._seen.failed.append(f"check-in: {error.code()} {error.details()}")

    async def take_part(self) -> None:
        """Wait for a task, download its plan, upload an answer."""
        try:
            while not (reply := await self.check_in(30.0)).HasField("assignment"):
                pass
            given = reply.assignment
            download = self._channel.unary_stream(
                f"/{SERVICE}/Download", messages.DownloadRequest.SerializeToString, messages.Chunk.FromString
            )
            digest = hashlib.sha256()
            async for chunk in download(messages.DownloadRequest(sha256=given.plan.sha256), metadata=self._metadata):
                digest.update(chunk.data)
            assert digest.hexdigest() == given.plan.sha256
            began = time.perf_counter()
            await self._upload(given.task)
            self._seen.uploads.append(time.perf_counter() - began)
        except (grpc.RpcError, AssertionError) as error:
            self._seen.failed.append(f"round: {error}")

    async def _upload(self, task: str) -> None:
        counts = np.zeros(N_ITEMS, np.float32)
        counts[self._number % N_ITEMS] = 1
        document = Tally({"counts": counts}, 1, {"clipped": 0.0}).to_bytes()
        header = messages.UploadHeader(task=task, sha256=hashlib.sha256(document).hexdigest(), size=len(document))

        async def parts() -> Any:
            yield messages.UploadPart(header=header)
            for start in range(0, len(document), CHUNK):
                yield messages.UploadPart(data=document[start : start + CHUNK])

        call = self._channel.stream_unary(
            f"/{SERVICE}/Upload", messages.UploadPart.SerializeToString, messages.UploadState.FromString
        )
        state = await call(parts(), metadata=self._metadata, timeout=180)
        assert state.complete

    async def close(self) -> None:
        """Hang up."""
        await self._channel.close()


def measure(quick: bool) -> list[Row]:
    """Return the rows."""
    n = 100 if quick else 1_000
    with TemporaryDirectory(prefix="gw") as name:
        rows = _gateway_rows(Path(name), n, quick)
    return [*rows, *_core_rows(quick)]


def _gateway_rows(folder: Path, n: int, quick: bool) -> list[Row]:
    key = Ed25519PrivateKey.generate()
    catalog = _catalog()
    enrolments = _prepare(folder, key, catalog, n)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedrec.cli", "gateway", "run", str(folder)], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert b"listening" in process.stdout.readline()
        threading.Thread(target=process.stdout.read, daemon=True).start()
        idle = _memory(process.pid)
        seen, memory, result, wall = asyncio.run(_devices(folder, key, catalog, enrolments, process.pid))
        left = sum(path.stat().st_size for path in (folder / "spool").iterdir())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    check: Any = unclaimed if quick else claim
    lost = n - int(result.sums["counts"].sum())
    for reason in sorted(set(seen.failed))[:3]:
        print(reason, file=sys.stderr)
    return [
        claim(f"devices of {n:,} at once that are not in the sum", float(lost + len(seen.failed)), "devices", "<=", 0),
        check("check-in on an open connection, p99", _p99(seen.later), "s", "<=", 2.0),
        Row("check-in on an open connection, median", float(np.median(seen.later)), "s"),
        Row("first check-in, TLS handshake included, p99", _p99(seen.first), "s"),
        Row("upload of a tally, p99", _p99(seen.uploads), "s"),
        Row("the round: all wait, download, upload, sum", wall, "s"),
        Row("memory of the gateway before anybody comes", idle / 2**20, "MiB"),
        check("memory of the gateway at its highest", memory / 2**20, "MiB", "<=", 400.0),
        Row("growth a device", (memory - idle) / n / 2**10, "KiB"),
        claim("left in the spool after the round", float(left), "bytes", "<=", 0),
    ]


def _prepare(folder: Path, key: Ed25519PrivateKey, catalog: ItemCatalog, n: int) -> list[Enrolment]:
    import socket

    from fedrec.client.gateway.settings import GatewaySettings

    make_certificates(folder, ["localhost"], utc_clock(), curve=ec.SECP256R1())
    (folder / "release").write_bytes(first_release(catalog, key))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = {"listen": f"127.0.0.1:{port}", "address": f"localhost:{port}", "trusted": [public_key(key).hex()],
            "release": "release", "deadline_seconds": 150.0, "margin_seconds": 0.0}  # fmt: skip
    (folder / "gateway.toml").write_text(toml(said), encoding="utf-8")
    devices, settings = Devices(folder), GatewaySettings.load(folder)
    found = [Enrolment.parse(enrol(folder, settings, devices, str(i)), str(i)) for i in range(n)]
    devices.close()
    return found


async def _devices(
    folder: Path, key: Ed25519PrivateKey, catalog: ItemCatalog, enrolments: Sequence[Enrolment], pid: int
) -> tuple[Seen, int, Tally, float]:
    seen = Seen()
    people = [Light(enrolment, number, seen) for number, enrolment in enumerate(enrolments)]
    await asyncio.gather(*(one.timed_check_in(seen.first) for one in people))
    await asyncio.gather(*(one.timed_check_in(seen.later) for one in people))
    pool = GatewayPool(folder)
    request = CensusRequest(window=WINDOW, catalog_digest=catalog.digest()).to_bytes()
    await asyncio.to_thread(pool.answer, "census", request)
    waiting = [asyncio.create_task(one.take_part()) for one in people]
    await asyncio.sleep(3.0)
    began = time.perf_counter()
    answer = await asyncio.to_thread(pool.answer, "run", _plan(key, catalog, len(people)))
    wall = time.perf_counter() - began
    await asyncio.gather(*waiting)
    memory = _memory(pid)
    await asyncio.gather(*(one.close() for one in people))
    return seen, memory, Tally.from_bytes(answer), wall


def _plan(key: Ed25519PrivateKey, catalog: ItemCatalog, n: int) -> bytes:
    slots = np.arange(n, dtype=np.int64)
    task, seed = CountTask(window=WINDOW), Key.from_seed(0)
    plan = RoundPlan(0, 0, task, PopularityConfig(), len(catalog), {}, seed, catalog.digest(), slots)
    until = int(time.time()) + 170
    terms = Terms(ledger="benchmark", cohort_minimum=1, epsilon=None, expires_at=until, nonce=os.urandom(16).hex())
    return sign("plan", plan.to_bytes(), key, terms)


def _catalog() -> ItemCatalog:
    names = tuple(str(i) for i in range(N_ITEMS))
    return ItemCatalog(names, names, ((),) * N_ITEMS, np.zeros(N_ITEMS, np.int64))


def _p99(times: list[float]) -> float:
    return float(np.quantile(times, 0.99)) if times else float("inf")


def _memory(pid: int) -> int:
    """Return the highest resident memory of a process so far, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")


CORE = """
import json, sys, time
began = time.process_time()
from fedrec.client.sdk import Conditions, Device
seconds = time.process_time() - began
import tempfile, pathlib
import fedrec.client.gateway_client, fedrec.client.participation
device = Device(pathlib.Path(tempfile.mkdtemp()) / "device", release=pathlib.Path(sys.argv[1]).read_bytes(),
                trusted=[bytes.fromhex(sys.argv[2])])
for i in range(100):
    device.record(str(i))
found = device.recommend(10)
kib = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, kib * 1024, len(found), "torch" in sys.modules]))
"""


def _core_rows(quick: bool) -> list[Row]:
    """Return what the device core takes in a fresh environment, if one can be made."""
    if quick:
        return []
    with TemporaryDirectory(prefix="core") as name:
        folder = Path(name)
        place = folder / "site"
        wheel = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--target", str(place), "--constraint",
                 str(ROOT / "constraints.txt"), f"{ROOT}[device]"]  # fmt: skip
        if subprocess.run(wheel, cwd=folder, check=False).returncode:
            print("No package index: the rows of the device core are left out.", file=sys.stderr)
            return []
        shutil.rmtree(place / "bin", ignore_errors=True)
        size = sum(
            path.stat().st_size for path in place.rglob("*") if path.is_file() and "__pycache__" not in path.parts
        )
        key = Ed25519PrivateKey.generate()
        (folder / "release").write_bytes(first_release(_catalog(), key))
        found: list[list[Any]] = []
        for _ in range(6):
            command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(place)!r})\n" + CORE]
            done = subprocess.run(
                [*command, str(folder / "release"), public_key(key).hex()],
                cwd=folder, env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                check=True,
            )  # fmt: skip
            found.append(json.loads(done.stdout))
    seconds, memory = min(one[0] for one in found[1:]), max(one[1] for one in found)
    assert not any(one[3] for one in found)
    return [
        claim("device core: processor time of importing fedrec.client.sdk, best of five", seconds, "s", "<=", 0.4),
        claim("device core: memory after 100 records and a recommendation", memory / 1e6, "MB", "<=", 120.0),
        claim("device core: installed with all that it needs, without torch", size / 1e6, "MB", "<=", 130.0),
    ]


if __name__ == "__main__":
    sys.exit(run("gateway", "A thousand light devices at one gateway, and the cost of the device core", measure))
