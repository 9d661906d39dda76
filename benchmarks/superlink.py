"""A private run over a real SuperLink with TLS and two nodes, killed again and again: the same releases and ledger."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.federation import dataset, experiment
from benchmarks.harness import Row, claim, progress, run
from fedrec.evaluation.report import toml
from fedrec.server.run import LEDGER

SEED = 7
LONGEST_SECONDS = 1500
FEDREC = [sys.executable, "-m", "fedrec.cli"]


def released(registry: Path) -> dict[str, bytes]:
    """Return every published file by its path."""
    files = sorted(path for path in (registry / "releases").rglob("*") if path.is_file())
    return {str(path.relative_to(registry)): path.read_bytes() for path in files}


def ledger(runs: Path) -> list[bytes]:
    """Return the ledgers of all runs below a folder; there should be one."""
    return [path.read_bytes() for path in sorted(runs.rglob(LEDGER))]


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def fedrec(root: Path, *arguments: object) -> None:
    """Run a command to its end."""
    subprocess.run([*FEDREC, *map(str, arguments)], cwd=root, check=True, capture_output=True)


def started(root: Path, name: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Run a command in the background."""
    with (root / f"{name}.log").open("ab") as log:
        return subprocess.Popen([*FEDREC, *map(str, arguments)], cwd=root, stdout=log, stderr=log)


def measure(quick: bool) -> Sequence[Row]:
    """Kill the SuperLink, the ServerApp or the whole server at random moments of one run."""
    n, rng = (1 if quick else 5), random.Random(SEED)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        dataset().save(root / "data")
        settings = experiment(rounds=2, noise="seed").model_dump(mode="json")
        settings |= {"data": {"source": str(root / "data")}, "split": settings["split"] | {"later": 0}}
        settings["runtime"] |= {"nodes": 2}
        settings["training"] |= {"timeout_seconds": 60.0}
        (root / "faults.toml").write_text(toml(settings), encoding="utf-8")
        fedrec(root, "simulate", "faults.toml", "--out", "here", "--registry", "here-registry")
        options = ("--experiment", "faults.toml", "--data", "data", "--nodes", 2, "--metrics-port", 0)
        fedrec(root, "server", "init", "dep", *options, "--port", free_port())
        nodes = [started(root, f"node-{i}", "node", f"dep/nodes/node-{i}") for i in (1, 2)]
        server = started(root, "server", "server", "run", "dep")
        killed: list[str] = []
        try:
            for _ in progress(range(n), "kills"):
                _wait(root, rng.uniform(15.0, 60.0))
                victim = rng.choice(("SuperLink", "ServerApp", "server"))
                if server.poll() is not None:
                    break
                if victim == "server":
                    server.kill()
                    server.wait()
                    server = started(root, "server", "server", "run", "dep")
                elif (pid := _pid(root, victim)) is not None:
                    os.kill(pid, signal.SIGKILL)
                killed.append(victim)
            code = server.wait(timeout=LONGEST_SECONDS)
        finally:
            for process in (server, *nodes):
                if process.poll() is None:
                    process.terminate()
                process.wait(timeout=90)
        same = released(root / "dep" / "registry") == released(root / "here-registry")
        paid = ledger(root / "dep"), ledger(root / "here")
        resumed = sum(record["kind"] == "resumed" for record in _audit(root))
    return [
        Row(f"SIGKILLs of {', '.join(killed)}", len(killed), "kills"),
        Row("times that the run was resumed", resumed, "times"),
        claim("the server ended in good order", float(code == 0), "", ">=", 1),
        claim("releases as in-process without a kill, in bytes", float(same), "", ">=", 1),
        Row("entries of the ledger of the run without a kill", len(b"".join(paid[1]).splitlines()), "entries"),
        claim("ledger as in-process without a kill, in bytes", float(paid[0] == paid[1] != []), "", ">=", 1),
    ]


def _audit(root: Path) -> list[dict[str, Any]]:
    path = root / "dep" / "log" / "audit.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def _wait(root: Path, seconds: float) -> None:
    """Wait until a run is under way again, and then so many seconds, or until it is over."""
    end = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < end:
        kinds = [record["kind"] for record in _audit(root)]
        if "finished" in kinds or (kinds and kinds[-1] not in ("died", "server started", "run submitted")):
            break
        time.sleep(0.5)
    over = time.monotonic() + seconds
    while time.monotonic() < over and not any(record["kind"] == "release" for record in _audit(root)):
        time.sleep(0.5)


def _pid(root: Path, what: str) -> int | None:
    """Return the process id of the SuperLink or the ServerApp, if there is one."""
    try:
        children = json.loads((root / "dep" / "state" / "children.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    place = 0 if what == "SuperLink" else 1
    return int(children[place][0]) if len(children) > place else None


if __name__ == "__main__":
    raise SystemExit(run("superlink", __doc__ or "", measure))
