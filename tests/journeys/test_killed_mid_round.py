"""Processes killed in the middle of a round over a real SuperLink: a node with all its children, devices of a gateway.

The round is closed at its deadline with who is left, or abandoned; the ledger holds the charges it would hold anyway.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fedrec.privacy.ledger import PrivacyLedger
from fedrec.server.deployment import DeploymentFolder
from fedrec.server.run import LEDGER
from tests.journeys.test_deployment import SMALL, Started, audit, kinds, until
from tests.support import fedrec, release_files, small_project
from tests.twins.test_ray import free_ports

pytestmark = pytest.mark.slow

PRIVATE = {"mode": "central", "epsilon": 1e4, "delta": 1e-3, "calibrate": False}


def kill(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that it started, as a power cut does."""
    family = [process.pid]
    for pid in family:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            family += map(int, task.read_text().split())
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def charges(folder: Path) -> list[tuple[str, str]]:
    """Return what the one ledger below a folder was charged for, and how much."""
    [path] = folder.rglob(LEDGER)
    return [(entry.name, repr(entry.event)) for entry in PrivacyLedger.read(path).entries()]


@pytest.mark.parametrize(
    ("change", "closes"),
    [({"privacy": PRIVATE}, True), ({"training__minimum_share": 1.0}, False)],
    ids=["private", "a share is needed"],
)
def test_a_node_killed_in_the_middle_of_a_round(tmp_path: Path, change: dict[str, Any], closes: bool) -> None:
    settings = {**SMALL, "training__timeout_seconds": 45.0, "training__cohort__expected": 30.0, **change}
    toml = small_project(tmp_path, **settings | {"training__base__rounds": 3})
    port, metrics = free_ports(2)
    options = ("--experiment", toml, "--data", tmp_path / "data", "--nodes", 3)
    made = fedrec("server", "init", "dep", *options, "--port", port, "--metrics-port", metrics, root=tmp_path)
    assert made.returncode == 0, made.stderr
    folder = DeploymentFolder(tmp_path / "dep")
    with ExitStack() as stack:
        server = Started(tmp_path, "server", "server", "run", "dep")
        stack.callback(server.end)
        nodes = [Started(tmp_path, f"node-{n}", "node", f"dep/nodes/node-{n}") for n in (1, 2, 3)]
        for node in (nodes[0], nodes[2]):
            stack.callback(node.end)
        until(lambda: "round" in kinds(folder), 400, server.said())  # so the next one has begun
        kill(nodes[1].process)
        until(lambda: server.process.poll() is not None, 500, server.said())
    assert server.process.returncode == 0, server.said()
    rounds = [record for record in audit(folder) if record["kind"] == "round"]
    assert [record["round"] for record in rounds] == [0, 1, 2]
    asked, answered = rounds[1]["cohort"], rounds[1]["clients"]
    assert rounds[0]["clients"] == rounds[0]["cohort"] == asked
    assert 0 < answered < asked
    refused = [record for record in audit(folder) if record["kind"] == "refused" and "round" in record]
    for record in rounds[1:]:
        assert record["clients"] == answered
        assert record["seconds"] < 45 + 30, "the deadline, and what Flower takes to tell"
        whole = record["cohort"] == answered  # once the SuperLink knows that it is gone, it is not asked
        why = {one["node"]: one["reason"] for one in refused if one["round"] == record["round"]}
        assert ("partition 000001" in why) == (not whole)
        assert (record["update_norm"] > 0) == (closes or whole)
        abandoned = f"the round is abandoned: {answered} of the {asked} clients it needs answered"
        assert why.get("all") == (None if closes or whole else abandoned)
    if closes:
        here = fedrec("simulate", toml, "--out", "here", "--registry", "here-registry", root=tmp_path)
        assert here.returncode == 0, here.stderr
        assert charges(tmp_path / "dep") == charges(tmp_path / "here"), "as if everybody had answered"
    assert release_files(folder.path / "registry"), "a release comes all the same"
