"""The files for an installation name commands and options that exist; units pass systemd's own check where it is there.

Their start lines run as they stand, in a folder in place of the system's; what holds a unit in its sandbox does not.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import ssl
import subprocess
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fedrec.cli import app
from fedrec.server.deployment import DeploymentFolder
from tests.fleet import free_port, short_folder
from tests.journeys.test_deployment import SMALL, Started, kinds, until
from tests.journeys.test_killed_mid_round import kill
from tests.support import FEDREC, fedrec, small_project

DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return document


def commands() -> list[list[str]]:
    """Return the words after `fedrec` of every command in the files, those in comments included."""
    server = compose()["services"]["server"]
    found = [server["command"], server["healthcheck"]["test"][2:]]
    for path in DEPLOY.iterdir():
        text = path.read_text(encoding="utf-8").replace("\\\n#", "")
        lines = re.findall(r"(?:bin/fedrec|[:;] fedrec|run --rm server) ([^\n;]+)", text)
        found += [line.split() for line in lines]
    return found


def test_every_command_exists_with_its_options() -> None:
    verbs = set()
    for words in commands():
        shown = CliRunner().invoke(
            app, [*(word for word in words[:2] if word.isalpha()), "--help"], env={"COLUMNS": "200"}
        )
        assert shown.exit_code == 0, words
        verbs.add(" ".join(word for word in words[:2] if word.isalpha()))
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, words
    assert verbs >= {"server run", "server init", "server status", "node", "gateway run", "gateway init"}


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_finds_nothing_wrong_with_a_unit(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze")
    here = tmp_path / unit.name
    here.write_text(unit.read_text(encoding="utf-8").replace("/opt/fedrec/bin/fedrec", str(FEDREC)), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_proxy_shows_the_fleet_and_nothing_else() -> None:
    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    assert re.findall(r"location (\S+) {", text) == ["/v1/fleet/", "/"]
    assert re.findall(r"location / {(.*?)}", text) == [" return 404; "]
    proxy = compose()["services"]["proxy"]
    assert proxy["network_mode"] == "service:server", "Flower stays on the loopback that only the proxy shares"
    assert compose()["services"]["server"]["ports"] == ["443:443"]


def settings_of(unit: Path) -> dict[str, str]:
    """Return the settings of a unit; each stands in it once."""
    lines = [line for line in unit.read_text(encoding="utf-8").splitlines() if "=" in line and line[0] != "#"]
    return dict(line.split("=", 1) for line in lines)


def as_systemd_starts(unit: Path, lib: Path) -> subprocess.Popen[bytes]:
    """Start what a unit says, with its environment and nothing else's, in `lib` instead of /var/lib/fedrec."""
    settings = settings_of(unit)
    line = settings["ExecStart"].replace("/opt/fedrec/bin/fedrec", str(FEDREC)).replace("/var/lib/fedrec", str(lib))
    given = dict(pair.split("=", 1) for pair in settings.get("Environment", "").split())
    with (lib / f"{unit.stem}.log").open("ab") as log:
        return subprocess.Popen(
            shlex.split(line), cwd="/", env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **given}, umask=0o077,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip


@pytest.mark.slow
def test_the_start_lines_of_the_units_run_and_end_as_the_units_say(tmp_path: Path) -> None:
    toml = small_project(tmp_path, **SMALL | {"training__base__rounds": 1, "runtime__nodes": 1})
    with short_folder() as lib, ExitStack() as stack:
        init = ("server", "init", lib / "deployment", "--experiment", toml, "--data", tmp_path / "data", "--nodes", 1)
        key = fedrec("releases", "key", "signing.key", root=tmp_path).stdout.strip()
        gateway = ("gateway", "init", lib / "gateway", "--trust", key, "--port", free_port())
        for command in ((*init, "--port", free_port(), "--metrics-port", 0), gateway):
            done = fedrec(*command, root=tmp_path)
            assert done.returncode == 0, done.stderr
        folder = DeploymentFolder(lib / "deployment")
        shutil.copytree(folder.path / "nodes" / "node-1", lib / "node")
        before = set(lib.iterdir())
        running = {unit.stem: as_systemd_starts(unit, lib) for unit in UNITS}
        for process in running.values():
            stack.callback(process.kill)
        until(lambda: fedrec("gateway", "status", lib / "gateway", root=tmp_path).returncode == 0, 60, "no gateway")
        until(lambda: "release" in kinds(folder), 300, (lib / "fedrec-server.log").read_text())
        kill(running["fedrec-node"])  # Restart=always; KillMode=control-group takes its SuperNode along
        running["fedrec-node"] = again = as_systemd_starts(DEPLOY / "fedrec-node.service", lib)
        stack.callback(again.kill)
        until(lambda: running["fedrec-server"].poll() is not None, 60, "the life of the trial is over")
        assert running["fedrec-server"].returncode == 0, "Restart=on-failure lets it rest"
        for name, process in running.items():
            if process.poll() is None:
                process.terminate()
            ended = process.wait(timeout=int(settings_of(DEPLOY / f"{name}.service")["TimeoutStopSec"]))
            assert ended in (0, -signal.SIGTERM), name  # the latter where it had hardly begun
        logs = {lib / f"{unit.stem}.log" for unit in UNITS}
        assert set(lib.iterdir()) == before | logs, "each keeps to the folder that ReadWritePaths names"


@pytest.mark.slow
def test_behind_the_proxy_a_node_takes_part_and_nothing_but_the_fleet_answers(tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("no nginx")
    toml = small_project(tmp_path, **SMALL | {"training__base__rounds": 1, "runtime__nodes": 1})
    port, public = free_port(), free_port()
    init = ("server", "init", "dep", "--experiment", toml, "--data", tmp_path / "data", "--nodes", 1, "--port", port)
    done = fedrec(*init, "--public", f"127.0.0.1:{public}", "--metrics-port", 0, root=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, etc = DeploymentFolder(tmp_path / "dep"), tmp_path / "etc"
    etc.mkdir()
    for name, mine in (("public.crt", "server.crt"), ("public.key", "server.key"), ("ca.crt", "ca.crt")):
        shutil.copy(folder.path / "certificates" / mine, etc / name)
    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    changes = [
        ("listen 443", f"listen 127.0.0.1:{public}"),
        ("/etc/fedrec/", f"{etc}/"),
        ("127.0.0.1:8443", f"127.0.0.1:{port}"),
    ]
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    kinds_of_files = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {tmp_path}/nginx-{kind};" for kind in kinds_of_files)
    text = text.replace("http {", f"http {{ {places} access_log off;", 1)
    (etc / "nginx.conf").write_text(text, encoding="utf-8")
    log = tmp_path / "nginx.log"
    command = [nginx, "-p", tmp_path, "-e", log, "-c", etc / "nginx.conf", "-g", f"daemon off; pid {tmp_path}/pid;"]
    with ExitStack() as stack:
        proxy = subprocess.Popen(command)
        stack.callback(proxy.wait, 30)
        stack.callback(proxy.terminate)
        server = Started(tmp_path, "server", "server", "run", "dep")
        stack.callback(server.end)
        node = Started(tmp_path, "node", "node", "dep/nodes/node-1")
        stack.callback(node.end)
        until(lambda: "slice" in kinds(folder), 240, f"see {server.log} and {log}")
        trusted = ssl.create_default_context(cafile=str(etc / "ca.crt"))
        for path in ("/", "/health", "/v1/control/", "/v1/control/ListRuns", "/v1/fleet/../control/", "/v1/runtime/"):
            with pytest.raises(urllib.error.HTTPError, match="404") as refused:
                urllib.request.urlopen(f"https://127.0.0.1:{public}{path}", timeout=10, context=trusted)
            assert "nginx" in refused.value.headers["server"], path
            refused.value.close()
        until(lambda: server.process.poll() is not None, 300, server.said())
    assert server.process.returncode == 0, server.said()
    assert "release" in kinds(folder)
