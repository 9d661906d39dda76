"""Twenty devices as processes, their gateway, a SuperNode and a SuperLink with TLS: what `fedrec simulate` computes.

By the commands of docs/gateway.md: once with sums that the gateway adds up, once with masked ones, that it cannot read;
and both again with devices that are killed in the middle of a round.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from fedrec.client.gateway.control import GatewayPool
from fedrec.client.sdk import Device, Limits
from fedrec.client.shelf import FOLDER
from fedrec.errors import FedrecError
from fedrec.params import norm
from fedrec.protocol.secure import MaskReply
from fedrec.random import Key
from fedrec.server.deployment import DeploymentFolder
from fedrec.server.registry import Registry
from tests.fleet import free_port, processes, short_folder, until_seen
from tests.journeys.test_deployment import Started, audit, until
from tests.journeys.test_killed_mid_round import charges, kill
from tests.support import fedrec, to_toml

pytestmark = pytest.mark.slow

N, N_ITEMS = 20, 25
SETTINGS: dict[str, Any] = {
    "seed": 4,
    "split": {"kind": "leave_one_out"},
    "model": {"kind": "transformer", "dim": 8, "blocks": 1, "heads": 2, "length": 8, "dropout": 0.0,
              "softmax": {"kind": "full"}},
    "training": {
        "cohort": {"kind": "poisson", "expected": float(N)},
        "local": {"steps": 1, "learning_rate": 0.5, "clip_norm": 0.5},
        "base": {"rounds": 1},
    },
    "evaluation": {"ks": [10], "replicates": 10, "local_only": {"people": 0}},
}  # fmt: skip
MASKED: dict[str, Any] = {
    "mode": "distributed", "epsilon": 1e6, "delta": 1e-3, "noise": "seed", "calibrate": False, "metrics": "private",
    "count": 0.01, "fit": 0.01, "metrics_noise": 0.01, "population": N, "secure_sum": {"minimum": N // 2},
}  # fmt: skip
ADAPTERS: dict[str, Any] = {
    "model": {"kind": "text_transformer", "dim": 32, "blocks": 1, "heads": 2, "expand": 2, "length": 8, "dropout": 0.0,
              "residual": 2, "lora": 2, "train": "adapters", "features": {"rank": 20, "fourier": 0},
              "softmax": {"kind": "full"}},
    "training": {**SETTINGS["training"], "base": {"rounds": 2}},
}  # fmt: skip
OPEN = Limits(cohort_minimum=N // 2, epsilon=None)
STRICT = Limits(cohort_minimum=N // 2, epsilon=1e6, delta=0.1, masked=True, simulation=True)


def run(root: Path, *words: object) -> str:
    """Run a command that must succeed, and return what it prints."""
    done = fedrec(*words, root=root)
    assert done.returncode == 0, done.stderr
    return done.stdout


def people_in(root: Path) -> list[tuple[str, list[str]]]:
    """Write and import the histories of twenty people; return each in the order in which the import numbers them."""
    rows = []
    for n in range(N):
        items = Key.from_seed(n).child("history").numpy().permutation(N_ITEMS)[: 6 + n % 4]
        rows += [(f"p{n:02d}", f"i{item}", 1_600_000_000 + 100 * n + place) for place, item in enumerate(items)]
    with (root / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("user", "item", "time"), *rows])
    run(root, "data", "import", "rows.csv", "--user", "user", "--item", "item", "--time", "time", "--out", "data",
        "--name", "twenty")  # fmt: skip
    return [(name, [item for user, item, _ in rows if user == name]) for name in sorted({user for user, _, _ in rows})]


def devices_of(root: Path, gateway: Path, limits: Limits) -> list[Path]:
    """Add a device for each person at the gateway, and give it that person's history."""
    folders = []
    for name, items in people_in(root):
        run(root, "gateway", "add-device", gateway, name)
        run(root, "device", "enrol", f"devices/{name}", f"{name}.json")
        folders.append(root / "devices" / name)
        with Device(folders[-1], limits=limits) as one:
            for place, item in enumerate(items):
                one.record(item, time=1_600_000_000 + place)
    return folders


class Spy(threading.Thread):
    """Whoever sits at the gateway: keeps every upload that ever lies in its spool."""

    def __init__(self, spool: Path) -> None:
        super().__init__(daemon=True)
        self.spool, self.seen, self.over = spool, dict[str, bytes](), threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.002):
            for path in self.spool.glob("*.part"):
                try:
                    data = path.read_bytes()
                except OSError:
                    continue
                if len(data) > len(self.seen.get(path.name, b"")):
                    self.seen[path.name] = data

    def masked_vectors(self) -> list[Any]:
        found = []
        for data in self.seen.values():
            try:
                found.append(MaskReply.from_bytes(data).total)
            except FedrecError:
                continue
        return found


Meanwhile = Callable[[Path, list[subprocess.Popen[str]]], None]


def calm(gateway: Path, people: list[subprocess.Popen[str]]) -> None:
    """Let the run be."""


def killing(n: int, verb: str, kind: str | None) -> Meanwhile:
    """Kill so many devices as soon as they are all asked such a thing."""

    def work(gateway: Path, people: list[subprocess.Popen[str]]) -> None:
        def asked() -> bool:
            return any((one["verb"], one["kind"]) == (verb, kind) for one in GatewayPool(gateway).status()["open"])

        until(asked, 400, f"nobody was asked to {verb}")
        for one in people[:n]:
            kill(one)

    return work


@contextmanager
def deployed(
    root: Path,
    limits: Limits,
    privacy: dict[str, Any] | None,
    timeout_seconds: float = 120.0,
    meanwhile: Meanwhile = calm,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[tuple[DeploymentFolder, Any]]:
    """Run a whole life of the experiment through a gateway; yields the deployment, the devices and the spy."""
    document = {"name": "twenty", **SETTINGS, **changes, "data": {"source": str(root / "data")}}
    document["training"] = document["training"] | {"timeout_seconds": timeout_seconds}
    (root / "twenty.toml").write_text(to_toml(document if privacy is None else document | {"privacy": privacy}))
    with short_folder() as gateway:
        key, port = run(root, "releases", "key", "signing.key").strip(), free_port()
        shutil.rmtree(gateway)
        run(root, "gateway", "init", gateway, "--trust", key, "--port", port, "--release", root / "release.fedrec")
        folders = devices_of(root, gateway, limits)
        run(root, "releases", "sign", "--first", "--catalog", "data", "--key", "signing.key", "--out", "release.fedrec")
        run(root, "server", "init", "dep", "--experiment", "twenty.toml", "--catalog", "data", "--nodes", 0,
            "--port", free_port(), "--metrics-port", 0, "--signing-key", "signing.key")  # fmt: skip
        with (root / "dep" / "server.toml").open("a", encoding="utf-8") as file:  # its last table is [signing]
            file.write(f"cohort_minimum = {N // 2}\n")
        run(root, "server", "add-node", "dep", "gateway")
        place = DeploymentFolder(root / "dep")
        started, people, spy = [], [], Spy(gateway / "spool")
        try:
            started.append(Started(root, "gateway", "gateway", "run", gateway))
            until(lambda: "listening" in started[0].said(), 60, started[0].said())
            people = processes(folders, 1500.0)
            until_seen(gateway, N, 200)
            spy.start()
            started.append(Started(root, "server", "server", "run", "dep"))
            started.append(Started(root, "node", "node", "dep/nodes/gateway", "--gateway", gateway))
            server = started[1].process
            meanwhile(gateway, people)
            until(lambda: server.poll() is not None, 1200, started[1].said())
            status = json.loads(run(root, "gateway", "status", gateway, "--json"))
        finally:
            spy.over.set()
            for one in people:
                one.terminate()
            said = [one.communicate()[0] for one in people]
            for process in reversed(started):
                process.end()
        assert server.returncode == 0, (started[1].said(), said[0])
        yield place, (folders, status, spy)


def test_unmasked_the_release_is_that_of_a_simulation(tmp_path: Path) -> None:
    with deployed(tmp_path, OPEN, None) as (place, (folders, status, _)):
        simulated(tmp_path, place, 1e-4)
        assert {(line["verb"], line["answered"]) for line in status["rounds"]} == {("run", N)}
        for folder in folders:
            with Device(folder) as one:
                what = {line["what"] for line in one.sent()}
                assert what == {"check-in", "count", "fit", "evaluate"}
                assert one.refused() == []


def test_frozen_tensors_reach_the_gateway_and_each_device_once(tmp_path: Path) -> None:
    with deployed(tmp_path, OPEN, None, changes=ADAPTERS) as (place, (folders, status, _)):
        simulated(tmp_path, place, 1e-4)
        assert {(line["verb"], line["answered"]) for line in status["rounds"]} == {("run", N)}
        first, second = (record["bytes_down"] for record in audit(place) if record["kind"] == "round")
        named = {path.name: path.stat().st_size for path in (folders[0] / FOLDER).iterdir()}
        assert len(named) >= 4
        assert first - second == sum(named.values())
        for folder in folders:
            assert {path.name for path in (folder / FOLDER).iterdir()} == named.keys()
            with Device(folder) as one:
                assert one.refused() == []


def test_masked_the_release_is_that_of_a_simulation_and_the_gateway_sees_no_contribution(tmp_path: Path) -> None:
    with deployed(tmp_path, STRICT, MASKED) as (place, (folders, status, spy)):
        simulated(tmp_path, place, 2e-2)
        assert {line["verb"] for line in status["rounds"]} == {"advertise", "share", "mask", "unmask"}
        assert {line["answered"] for line in status["rounds"]} == {N}
        for folder in folders:
            with Device(folder) as one:
                told = [line for line in one.sent() if line.get("verb") in ("run", "mask")]
                assert {line["what"] for line in told} == {"count", "fit", "evaluate"}
                assert all(line["masked"] for line in told)
                assert one.refused() == []
                assert one.privacy_spent().epsilon is not None
        vectors = [vector for vector in spy.masked_vectors() if len(vector) >= N_ITEMS]
        assert len(vectors) >= N, "of the 40 that lay there, most were seen"
        for vector in vectors:  # uniform over the ring, whatever was contributed
            share = vector.astype(np.float64) / 2.0 ** (8 * vector.itemsize)
            assert abs(share.mean() - 0.5) < 6 * np.sqrt(1 / 12 / len(share))
            assert abs(share.var() - 1 / 12) < 6 * np.sqrt(1 / 180 / len(share))


def test_devices_killed_in_the_middle_of_a_round_are_not_waited_for_beyond_its_deadline(tmp_path: Path) -> None:
    with deployed(tmp_path, OPEN, None, 90.0, killing(6, "run", "fit")) as (place, (_, status, _)):
        fit = next(line for line in status["rounds"] if line["kind"] == "fit")
        assert fit["asked"] == N
        assert N - 6 <= fit["answered"] < N
        [record] = [record for record in audit(place) if record["kind"] == "round"]
        assert record["clients"] == fit["answered"]
        assert record["seconds"] < 90 + 30
        assert record["update_norm"] > 0


def test_devices_killed_in_a_masked_sum_leave_a_right_sum_and_a_right_ledger(tmp_path: Path) -> None:
    with deployed(tmp_path, STRICT, MASKED, 120.0, killing(6, "mask", None)) as (place, (_, status, _)):
        masks = [line for line in status["rounds"] if line["verb"] == "mask"]
        assert N - 6 <= masks[0]["answered"] < masks[0]["asked"] == N
        assert {(line["asked"], line["answered"]) for line in masks[1:]} == {(N - 6, N - 6)}
        [record] = [record for record in audit(place) if record["kind"] == "round"]
        assert record["update_norm"] > 0
        run(tmp_path, "simulate", "twenty.toml", "--out", "here", "--registry", "here-registry")
        assert charges(tmp_path / "dep") == charges(tmp_path / "here"), "as if everybody had answered"


def simulated(root: Path, place: DeploymentFolder, tolerance: float) -> None:
    """Hold the release of the deployment to that of a simulation of the same experiment."""
    run(root, "simulate", "twenty.toml", "--out", "here", "--registry", "here-registry")
    here, there = Registry(root / "here-registry").load(1), place.registry.load(1)
    assert here.params.keys() == there.params.keys()
    assert norm(here.params) > 0.1
    for name, value in here.params.items():
        np.testing.assert_allclose(there.params[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
    [ours] = [one["all"]["metrics"]["ndcg@10"]["value"] for one in [there.manifest.metrics["release"]]]
    [theirs] = [one["all"]["metrics"]["ndcg@10"]["value"] for one in [here.manifest.metrics["release"]]]
    assert ours == pytest.approx(theirs, abs=max(0.02, tolerance))
