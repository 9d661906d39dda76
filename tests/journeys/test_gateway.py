"""Twenty devices as processes, a gateway over TLS, Flower's two apps: what comes out is what one process computes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.client.app import client_app
from fedrec.client.device_pool import DevicePool
from fedrec.client.gateway.control import GatewayPool
from fedrec.client.keeping import kept_unsent
from fedrec.client.pool import ClientPool
from fedrec.client.sdk import Conditions, Device
from fedrec.data.slices import LastWindow
from fedrec.evaluation.asked import shapes_of
from fedrec.grid.in_process import InProcessGrid
from fedrec.models.build import build
from fedrec.models.configs import PopularityConfig, SampledSoftmax, TransformerConfig
from fedrec.models.recommender import get_params
from fedrec.protocol.link import Link
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import AnyTask, CooccurrenceTask, CountTask, FitTask, LocalTraining
from fedrec.random import Key
from fedrec.server.app import server_app
from fedrec.server.gather import Ask, Gathered, gather
from fedrec.server.round import Recipe, take_census
from fedrec.server.signed import SignedLink
from tests.fleet import CATALOG, N_ITEMS, SERVER, device, enrolled, free_port, made, processes, short_folder, until_seen
from tests.support import FEDREC, environment, small_experiment

N = 20
WINDOW = LastWindow(skip=1)
KEY = Key.from_seed(5)
FEATURES = KEY.numpy().standard_normal((N_ITEMS, 100)).astype(np.float32)
MODEL = TransformerConfig(
    dim=8, blocks=1, heads=2, expand=1, length=8, dropout=0.0, softmax=SampledSoftmax(negatives=8)
)  # fmt: skip
SKETCH = CooccurrenceTask(window=WINDOW, sketch="features", item_share=0.0, feature_share=0.8)
TASKS: dict[str, AnyTask] = {
    "count": CountTask(window=WINDOW, clip_norm=2.0),
    "sketch": SKETCH,
    "fit": FitTask(window=WINDOW, local=LocalTraining(steps=2, learning_rate=0.5, clip_norm=0.5)),
}


def plan_for(kind: str) -> Any:
    fit = kind == "fit"
    params = get_params(build(MODEL, N_ITEMS, KEY)) if fit else {}
    inputs = {"features": FEATURES} if kind == "sketch" else {}
    model = MODEL if fit else PopularityConfig()

    def plan(slots: Any) -> RoundPlan:
        return RoundPlan(0, 1, TASKS[kind], model, N_ITEMS, params, KEY, CATALOG.digest(), slots, inputs)

    return plan


def rounds(hosts: list[Any], kinds: list[str], signed: bool) -> dict[str, Gathered]:
    """Run rounds over Flower's apps on the in-process grid."""
    grid = InProcessGrid(client_app(lambda context: hosts[context.node_id - 2]), [{}] * len(hosts), {})
    found: dict[str, Gathered] = {}

    def main(link: Link, context: Any) -> None:
        asking = SignedLink(link, SERVER, cohort_minimum=1) if signed else link
        recipe = Recipe(small_experiment(), CATALOG.digest(), lambda: 0.0)
        roster = take_census(asking, WINDOW, recipe)
        for kind in kinds:
            ask = Ask(asking, roster, plan_for(kind), shapes_of(plan_for(kind)(np.zeros(0, np.int64))), 240.0)
            found[kind] = gather(ask)

    server_app(main)(grid, grid.server_context())
    return found


@contextmanager
def gateway(folder: Path, **changes: Any) -> Iterator[Any]:
    """Run `fedrec gateway run` in a process of its own."""
    from fedrec.evaluation.report import toml

    settings = made(folder, **changes)
    (folder / "gateway.toml").write_text(toml(settings.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(FEDREC), "gateway", "run", str(folder)], stdout=log, stderr=log)
        try:
            yield settings
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, (folder / "log").read_text()


def started(folder: Path) -> None:
    import time

    end = time.monotonic() + 60
    while b"listening" not in (folder / "log").read_bytes():
        assert time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.1)


@pytest.mark.slow
def test_twenty_processes_through_a_gateway_give_what_one_process_gives(tmp_path: Path) -> None:
    folders = [tmp_path / f"device {n}" for n in range(N)]
    with short_folder() as folder, gateway(folder, deadline_seconds=200.0) as settings:
        started(folder)
        opened = [device(place, enrolled(folder, settings, place.name), n) for n, place in enumerate(folders)]
        pool: ClientPool = DevicePool([one.store for one in opened], CATALOG)
        expected = rounds([pool], list(TASKS), signed=False)
        for one in opened:
            one.close()
        people = processes(folders, 400.0)
        try:
            until_seen(folder, N, 120)
            found = rounds([GatewayPool(folder)], list(TASKS), signed=True)
        finally:
            for one in people:
                one.terminate()
                one.communicate()
    for kind in TASKS:
        assert found[kind].refused == ()
        assert found[kind].n_clients == expected[kind].n_clients == N
        for name, value in expected[kind].sums.items():
            np.testing.assert_allclose(found[kind].sums[name], value, rtol=1e-4, atol=1e-5, err_msg=f"{kind} {name}")
        assert max(float(np.abs(value).max()) for value in expected[kind].sums.values()) > 0.01
    with Device(folders[3]) as one:
        assert [line["what"] for line in one.sent() if line["what"] != "check-in"] == ["count", "cooccurrence", "fit"]


SLOWLY = """
import sys, time
from pathlib import Path
import fedrec.client.gateway_client as gateway_client
from fedrec.client.sdk import Conditions, Device
upload = gateway_client.GatewayClient.upload
def slowly(data):
    print("chunk", flush=True)
    time.sleep(0.05)
    return data
def in_pieces(self, unsent):
    gateway_client.CHUNK_BYTES = 1024
    upload(self, unsent, slowly)
gateway_client.GatewayClient.upload = in_pieces
device = Device(Path(sys.argv[1]))
while True:
    print(device.participate(Conditions(), wait_seconds=5).why, flush=True)
"""


def test_a_device_that_is_killed_while_it_sends_goes_on_and_sends_nothing_twice(tmp_path: Path) -> None:
    import threading

    with short_folder() as folder, gateway(folder) as settings:
        started(folder)
        one = device(tmp_path / "device", enrolled(folder, settings, "a"), 0)
        pool: ClientPool = DevicePool([one.store], CATALOG)
        expected = rounds([pool], ["sketch"], signed=False)["sketch"]
        one.close()
        command = [sys.executable, "-c", SLOWLY, str(tmp_path / "device")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
        until_seen(folder, 1)
        found: list[Gathered] = []
        asking = threading.Thread(
            target=lambda: found.append(rounds([GatewayPool(folder)], ["sketch"], signed=True)["sketch"])
        )
        asking.start()
        assert process.stdout is not None
        chunks = 0
        while chunks < 5:
            chunks += process.stdout.readline().strip() == "chunk"
        process.kill()
        process.communicate()
        with Device(tmp_path / "device") as again:
            kept = kept_unsent(again.store)
            assert kept is not None, "what was being sent is on the disk"
            came = again.participate(Conditions(), wait_seconds=0)
            assert came.outcome == "answered"
            assert kept_unsent(again.store) is None
            assert [line["what"] for line in again.sent()].count("cooccurrence") == 1
        asking.join(60)
    assert found[0].n_clients == 1
    for name, value in expected.sums.items():
        np.testing.assert_array_equal(found[0].sums[name], value)


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path: Path) -> None:
    """An operator and a device on the command line, as docs/gateway.md tells it."""

    def fedrec(*words: object) -> subprocess.CompletedProcess[str]:
        command = [str(FEDREC), *(str(word) for word in words)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=60
        )

    CATALOG.save(tmp_path / "catalog")
    key = fedrec("releases", "key", "signing.key").stdout.strip()
    assert len(key) == 64
    assert "exists already" in fedrec("releases", "key", "signing.key").stderr
    signed = fedrec("releases", "sign", "--first", "--catalog", "catalog", "--key", "signing.key", "--out", "release")
    assert signed.returncode == 0, signed.stderr
    port = free_port()
    with short_folder() as folder:
        made_ = fedrec("gateway", "init", folder, "--trust", key, "--port", port, "--release", "release")
        assert made_.returncode == 0, made_.stderr
        assert "no public key" in fedrec("gateway", "init", tmp_path / "b", "--trust", "x").stderr
        assert fedrec("gateway", "add-device", folder, "phone", "--out", "phone.json").returncode == 0
        assert (tmp_path / "phone.json").stat().st_mode & 0o77 == 0
        assert "already" in fedrec("gateway", "add-device", folder, "phone", "--out", "other.json").stderr
        assert "No gateway runs" in fedrec("gateway", "status", folder).stderr
        assert fedrec("device", "enrol", "phone", "phone.json").returncode == 0
        assert fedrec("device", "record", "phone", "i3").returncode == 0
        assert "nobody listens there" in fedrec("device", "participate", "phone", "--always", "--wait", 0).stderr
        with (folder / "log").open("wb") as log:
            command = [str(FEDREC), "gateway", "run", str(folder)]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(tmp_path))
        started(folder)
        came = fedrec("device", "participate", "phone", "--always", "--wait", 0)
        assert came.stdout == "There was nothing to do.\n", came.stderr
        assert "Item 0" in fedrec("device", "recommend", "phone", "--why").stdout
        assert '"seen": 1' in fedrec("gateway", "status", folder, "--json").stdout
        assert fedrec("gateway", "revoke-device", folder, "phone").returncode == 0
        assert "was revoked" in fedrec("device", "participate", "phone", "--always", "--wait", 0).stderr
        assert '"cohort_minimum":50' in fedrec("device", "limit", "phone", "--cohort", 50, "--json").stdout
        assert "check-in" in fedrec("device", "log", "phone").stdout
        assert fedrec("device", "forget", "phone", "--item", "i3").stdout == "1 interactions are forgotten.\n"
        assert fedrec("device", "export", "phone").stdout == ""
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
