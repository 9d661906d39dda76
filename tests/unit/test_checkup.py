"""`fedrec doctor`: each finding says what is wrong and what to do."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

from fedrec.checkup import clock, disk, is_private, port_answers, port_is_free, python_and_packages


def test_a_port_that_is_taken_and_one_that_nobody_answers_at() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = port_is_free("127.0.0.1", port, "operations.port")
        assert (found.ok, found.fix) == (False, "end what listens there, or set operations.port to another port")
        assert port_answers(f"127.0.0.1:{port}").ok
    assert port_is_free("127.0.0.1", port, "port").ok
    found = port_answers(f"127.0.0.1:{port}")
    assert not found.ok
    assert "start it with `fedrec server run`" in found.fix
    assert not port_answers("nonsense").ok


def test_a_clock_a_disk_and_a_secret(tmp_path: Path) -> None:
    assert clock().ok
    assert "NTP" in clock(lambda: 0.0).fix
    assert disk(tmp_path / "not" / "yet", least=1).ok
    found = disk(tmp_path, least=1 << 60)
    assert (found.ok, found.fix.startswith("free some")) == (False, True)
    secret = tmp_path / "node.key"
    assert "is missing" in is_private(secret).said
    secret.write_text("x", encoding="utf-8")
    secret.chmod(0o644)
    assert is_private(secret).fix == f"chmod 600 '{secret}'"
    secret.chmod(0o600)
    assert is_private(secret).ok


def test_the_versions_here_are_right() -> None:
    assert all(one.ok for one in python_and_packages())


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedrec.cli", "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"python", "flwr", "clock", "disk"} <= {one["what"] for one in json.loads(done.stdout)["findings"]}
    bad = subprocess.run([*command[:4], "nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert "BAD  settings: " in bad.stdout
    assert "holds no deployment; make one with `fedrec server init`" in bad.stdout
