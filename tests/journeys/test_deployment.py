"""The real thing on loopback: a SuperLink with TLS and three authenticated nodes, by the commands of docs/operate.md.

A Flower exchange takes about ten seconds, so these are few.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedrec.server.certificates import make_certificates, make_node_key, utc_clock
from fedrec.server.deployment import DeploymentFolder
from fedrec.server.flower import start_superlink, write_app
from fedrec.server.supervisor import answers
from tests.support import FEDREC, environment, fedrec, release_files, small_project
from tests.twins.test_ray import free_ports

SMALL: dict[str, Any] = {
    "training__base__rounds": 2, "split__later": 0, "evaluation__local_only__people": 0, "runtime__nodes": 3,
    "training__timeout_seconds": 60.0,
}  # fmt: skip


def until(true: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.3)


class Started:
    """`fedrec` in the background; its output goes to a file."""

    def __init__(self, root: Path, name: str, *arguments: object) -> None:
        self.log = root / f"{name}.log"
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [str(FEDREC), *map(str, arguments)],
                cwd=root, env=environment(root), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            )  # fmt: skip

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(timeout=90)


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, DeploymentFolder]:
    toml = small_project(tmp_path, **SMALL)
    port, metrics = free_ports(2)
    made = fedrec(
        "server", "init", "dep", "--experiment", toml, "--data", tmp_path / "data", "--nodes", 3,
        "--port", port, "--metrics-port", metrics, root=tmp_path,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return tmp_path, DeploymentFolder(tmp_path / "dep")


@pytest.fixture
def superlink(place: tuple[Path, DeploymentFolder]) -> Iterator[tuple[Path, DeploymentFolder, subprocess.Popen[bytes]]]:
    root, folder = place
    folder.prepare()
    write_app(folder)
    process = start_superlink(folder)
    yield root, folder, process
    process.terminate()
    process.wait(timeout=60)


def audit(folder: DeploymentFolder) -> list[dict[str, Any]]:
    path = folder.path / "log" / "audit.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def kinds(folder: DeploymentFolder) -> list[str]:
    return [record["kind"] for record in audit(folder)]


@pytest.mark.slow
def test_three_nodes_learn_and_a_killed_superlink_and_a_killed_server_change_no_byte(
    place: tuple[Path, DeploymentFolder],
) -> None:
    root, folder = place
    here = fedrec("simulate", root / "small.toml", "--out", "here", "--registry", "here-registry", root=root)
    assert here.returncode == 0, here.stderr
    with ExitStack() as stack:
        server = Started(root, "server", "server", "run", "dep")
        stack.callback(server.end)
        nodes = [Started(root, f"node-{n}", "node", f"dep/nodes/node-{n}") for n in (1, 2, 3)]
        for node in nodes:
            stack.callback(node.end)
        until(lambda: "slice" in kinds(folder), 240, server.said())
        status = json.loads(fedrec("server", "status", "dep", "--json", root=root).stdout)
        assert (status["running"], status["answers"]) == (True, True)
        port = folder.settings.operations.port
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            assert json.load(reply)["up"] is True

        superlink = json.loads(folder.state("children.json").read_text())[0][0]
        os.kill(superlink, signal.SIGKILL)
        until(lambda: "resumed" in kinds(folder), 240, server.said())
        assert any("the SuperLink died" in str(record.get("what")) for record in audit(folder))

        server.process.kill()
        server.process.wait()
        server = Started(root, "server", "server", "run", "dep")
        stack.callback(server.end)
        until(lambda: "release" in kinds(folder), 400, server.said())
        assert server.process.wait(timeout=120) == 0, server.said()
        assert [record["kind"] for record in audit(folder)][-2:] == ["finished", "server stopped"]
        for node in nodes:
            assert node.end() == 0, node.said()
    assert release_files(folder.path / "registry") == release_files(root / "here-registry")
    assert fedrec("server", "status", "dep", root=root).returncode == 3


@pytest.mark.slow
def test_who_does_not_belong_is_refused_with_the_reason(
    superlink: tuple[Path, DeploymentFolder, subprocess.Popen[bytes]],
) -> None:
    root, folder, _ = superlink
    until(lambda: answers(folder), 60, "no SuperLink")
    stranger = folder.path / "nodes" / "node-1"
    make_node_key(stranger / "node.key")  # a key that nobody registered
    result = fedrec("node", stranger, root=root)
    assert result.returncode == 1
    address = folder.server_address
    assert f"fedrec: The node was stopped: {address}: the server does not know this node's key" in result.stderr

    seen = fedrec("doctor", stranger, root=root)
    assert "ok   clock: " in seen.stdout
    assert "s from the server's" in seen.stdout
    assert seen.returncode == 0, seen.stdout

    with pytest.raises(OSError):  # plain text gets no answer
        urllib.request.urlopen(f"http://{address}/health", timeout=5)

    make_certificates(folder.path / "others", ["127.0.0.1"], utc_clock())
    (stranger / "ca.crt").write_bytes((folder.path / "others" / "ca.crt").read_bytes())
    result = fedrec("node", stranger, root=root)
    assert result.returncode == 1
    assert f"fedrec: {address}: the server's certificate is not one that 'ca' vouches for" in result.stderr


@pytest.mark.slow
def test_an_expired_certificate_is_refused_by_the_server_and_by_nodes(place: tuple[Path, DeploymentFolder]) -> None:
    root, folder = place
    long_ago = utc_clock() - timedelta(days=400)
    make_certificates(folder.path / "certificates", ["127.0.0.1"], long_ago, days=30)
    refused = fedrec("server", "run", "dep", root=root)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "server.crt' expired on " in refused.stderr
    assert "`fedrec server renew` makes a new one" in refused.stderr
    folder.prepare()
    write_app(folder)
    process = start_superlink(folder)
    try:
        until(lambda: b"Uvicorn running" in (folder.path / "log/superlink.log").read_bytes(), 60, "no SuperLink")
        result = fedrec("node", folder.path / "nodes" / "node-1", root=root)
        assert result.returncode == 1
        assert "the server's certificate has expired; make a new one there with `fedrec server renew`" in result.stderr
        seen = fedrec("doctor", folder.path / "nodes" / "node-1", root=root)
        assert seen.returncode == 1
        assert "BAD  certificate: " in seen.stdout
    finally:
        process.terminate()
        process.wait(timeout=60)
    assert fedrec("server", "renew", "dep", root=root).returncode == 0
    assert fedrec("doctor", "dep", root=root).returncode == 0
