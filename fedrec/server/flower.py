"""Flower's own programs: how a deployment starts a SuperLink and talks to it, by the documented command line alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedrec import __version__
from fedrec.errors import RunError
from fedrec.server.deployment import APP, FLOWER, LOG, NODES, DeploymentFolder
from fedrec.server.files import make_folder, mend

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""No telemetry, no look for updates, no installation of anything while running."""
CONNECTION = "fedrec"
PYPROJECT = """\
[project]
name = "fedrec"
version = "{version}"
description = "fedrec, as it is installed on the server and on each node"

[tool.flwr.app]
publisher = "fedrec"
fab-include = ["fedrec/server/app.py", "fedrec/client/app.py"]

[tool.flwr.app.components]
serverapp = "fedrec.server.app:app"
clientapp = "fedrec.client.app:app"

[tool.flwr.app.config]
deployment = ""
attempt = 0
"""


def program(name: str) -> str:
    """Return the path of one of Flower's programs.

    Raises:
        RunError: Flower is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise RunError(f"'{name}' is not installed; install the server with: pip install 'fedrec[server]'.")
    return found


def environment(folder: DeploymentFolder) -> dict[str, str]:
    """Return the environment of Flower's programs: quiet, and everything they keep in the deployment's folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **QUIET, "FLWR_HOME": str(folder.path / FLOWER), "PATH": path}


def write_app(folder: DeploymentFolder) -> None:
    """Write the Flower app that runs are made of, and the connection that Flower's command line needs.

    The app holds two small files; everything else is the fedrec that is installed on the server and on each node.

    Raises:
        RegistryError: the disk refuses.
    """
    app = folder.path / APP
    for room in ("server", "client"):
        make_folder(app / "fedrec" / room)
        spec = find_spec(f"fedrec.{room}")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        source = Path(spec.submodule_search_locations[0]) / "app.py"
        mend(app / "fedrec" / room / "app.py", source.read_bytes())
    mend(app / "pyproject.toml", PYPROJECT.format(version=__version__).encode())
    make_folder(folder.path / FLOWER)
    connection = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f"address = {json.dumps(folder.server_address)}\n"
        f"root-certificates = {json.dumps(str(folder.certificate('ca.crt')))}\n"
    )
    mend(folder.path / FLOWER / "config.toml", connection.encode())


def start_superlink(folder: DeploymentFolder) -> subprocess.Popen[bytes]:
    """Start a SuperLink with TLS, node authentication and a database; it logs to ``log/superlink.log``."""
    settings = folder.settings
    command = [
        program("flower-superlink"), "--enable-supernode-auth", "--disable-runtime-dependency-installation",
        "--ssl-certfile", str(folder.certificate("server.crt")),
        "--ssl-keyfile", str(folder.certificate("server.key")),
        "--ssl-ca-certfile", str(folder.certificate("ca.crt")),
        "--host", settings.host, "--port", str(settings.port),
        "--database", str(folder.state("superlink.sqlite")),
    ]  # fmt: skip
    with (folder.path / LOG / "superlink.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=folder.path, env=environment(folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def flwr(folder: DeploymentFolder, *arguments: str, timeout_seconds: float = 60.0) -> dict[str, Any]:
    """Run ``flwr ... --format json`` and return what it prints.

    Raises:
        RunError: it failed, with what it said.
    """
    command = [program("flwr"), *arguments, "--format", "json"]
    try:
        done = subprocess.run(
            command, cwd=folder.path, env=environment(folder), capture_output=True, text=True, check=False,
            timeout=timeout_seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RunError(f"Flower did not answer '{' '.join(arguments[:2])}' in {timeout_seconds:.0f} s.") from error
    start = done.stdout.find("{")
    try:
        found = json.loads(done.stdout[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        found = {}
    if done.returncode or not found or found.get("success") is False:
        said = str(found.get("error-message") or (done.stderr or done.stdout).strip()[-400:]).replace("\n", " ")
        raise RunError(f"Flower refused '{' '.join(arguments[:2])}': {said or 'it said nothing'}.")
    return dict(found)


def register_nodes(folder: DeploymentFolder) -> list[str]:
    """Register every ``nodes/NAME.pub`` that Flower does not know yet, and return the names of the new ones.

    Raises:
        RunError: Flower refuses.
    """
    known = folder.state("registered.json")
    done: dict[str, str] = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
    new = []
    for path in sorted((folder.path / NODES).glob("*.pub")):
        line = path.read_text(encoding="utf-8").strip()
        if line in done:
            continue
        try:
            answer = flwr(folder, "supernode", "register", str(path), CONNECTION)
            done[line] = str(answer.get("node-id", ""))
            new.append(path.stem)
        except RunError as error:
            if "already" not in str(error).lower():
                raise
            done[line] = ""
    mend(known, json.dumps(done, indent=1).encode())
    return new


def submit(folder: DeploymentFolder, attempt: int) -> str:
    """Submit the run that carries the deployment on, and return Flower's number of it.

    Raises:
        RunError: Flower refuses.
    """
    config = f"deployment={json.dumps(str(folder.path))} attempt={attempt}"
    answer = flwr(folder, "run", str(folder.path / APP), CONNECTION, "--run-config", config, timeout_seconds=120.0)
    return str(answer["run-id"])


def run_status(folder: DeploymentFolder, run: str) -> str:
    """Return how Flower says that a run stands, for example "running" or "finished:failed".

    Raises:
        RunError: Flower does not answer.
    """
    answer = flwr(folder, "ls", CONNECTION, "--run-id", run)
    return str(answer["runs"][0]["status"])
