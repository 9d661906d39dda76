"""The same experiment on Flower's own engine, with nodes in processes of Ray, gives the same releases as in-process."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest

from fedrec.server.registry import Registry
from tests.support import environment, fedrec, release_files, same_bytes, small_project, without_clock

pytest.importorskip("ray", reason="Flower's simulation engine needs ray")

APP = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """Start a SuperLink of our own, since the one that `flwr run` starts has a fixed port and outlives it."""
    root = tmp_path_factory.mktemp("ray")
    home = root / "flwr"
    home.mkdir()
    port, control = free_ports(2)
    connection = f'[superlink]\ndefault = "ours"\n\n[superlink.ours]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(connection, encoding="utf-8")
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environ = environment(root) | QUIET | {"FLWR_HOME": str(home), "PATH": path}
    command = [
        str(BIN / "flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess",
        "--host", "127.0.0.1", "--port", str(port), "--control-api-address", f"127.0.0.1:{control}",
    ]  # fmt: skip
    with (root / "superlink.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=root, env=environ, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while not healthy(port):
            assert process.poll() is None, (root / "superlink.log").read_text()
            assert time.monotonic() < end, (root / "superlink.log").read_text()
            time.sleep(0.2)
        yield root, environ
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except (URLError, OSError):
        return False


def flwr(*arguments: object, root: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "flwr"), *(str(argument) for argument in arguments)],
        cwd=root, env=environ, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip


def run_on_ray(root: Path, environ: dict[str, str], **config: Any) -> tuple[str, str]:
    """Run our app on two nodes; return what was logged, and how Flower says that it ended."""
    settings = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    federation = "num-supernodes=2 client-resources-num-cpus=1"
    shown = flwr("run", APP, "--stream", "--federation-config", federation, "-c", settings, root=root, environ=environ)
    log = shown.stdout + shown.stderr
    started = re.search(r"Successfully started run (\d+)", log)
    assert started, log
    listed = flwr("ls", "--run-id", started[1], "--format", "json", root=root, environ=environ)
    return log, json.loads(listed.stdout)["runs"][0]["status"]


ADAPTERS: dict[str, Any] = {
    "kind": "text_transformer", "dim": 32, "blocks": 1, "heads": 2, "expand": 2, "length": 8, "residual": 2, "lora": 2,
    "train": "adapters", "features": {"rank": 20, "fourier": 0}, "softmax": {"kind": "sampled", "negatives": 8},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"model": ADAPTERS}], ids=["all is trained", "most is frozen"])
def test_in_process_and_ray_publish_the_same_releases(
    flower: tuple[Path, dict[str, str]], tmp_path: Path, changes: dict[str, Any]
) -> None:
    root, environ = tmp_path, flower[1]
    toml = small_project(root, runtime__nodes=2, **changes)
    here = fedrec("simulate", toml, "--out", "here", "--registry", "here-registry", root=root)
    assert here.returncode == 0, here.stderr
    log, status = run_on_ray(
        root, environ, experiment=str(toml), nodes=2, out=str(root / "there"), registry=str(root / "there-registry")
    )
    assert status == "finished:completed", log
    assert f"fedrec: report at {root / 'there' / 'small' / '001' / 'report.html'}" in log

    reports = [json.loads((root / place / "small/001/report.json").read_text()) for place in ("here", "there")]
    a, b = (without_clock(report["releases"]) for report in reports)
    for ours, theirs in zip(a, b, strict=True):
        for row, groups in ours["rows"].items():
            for group, found in groups.items():
                for name, estimate in found["metrics"].items():
                    other = theirs["rows"][row][group]["metrics"][name]
                    assert estimate == {k: v if v is None else pytest.approx(v, rel=1e-4) for k, v in other.items()}
    registries = Registry(root / "here-registry"), Registry(root / "there-registry")
    for version in (1, 2, 3):
        ours, theirs = (registry.load(version).params for registry in registries)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-7)

    # Stronger: every byte. It holds where both engines run on one machine with one thread each.
    assert all(same_bytes(*(registry.load(version).params for registry in registries)) for version in (1, 2, 3))
    assert release_files(root / "here-registry") == release_files(root / "there-registry")
    assert a == b
    assert without_clock(reports[0]["rounds"]) == without_clock(reports[1]["rounds"])


@pytest.mark.slow
def test_a_run_that_cannot_go_on_says_why_and_is_marked_as_failed(flower: tuple[Path, dict[str, str]]) -> None:
    """The exit code of `flwr run --stream` is 0 even then, so the status is what tells."""
    root, environ = flower
    places = {"out": str(root / "none"), "registry": str(root / "none-registry")}
    log, status = run_on_ray(root, environ, experiment=str(root / "no-such.toml"), **places)
    assert f"fedrec: the run failed: No experiment '{root / 'no-such.toml'}'" in log
    assert status == "finished:failed"
    assert not (root / "none").exists()
