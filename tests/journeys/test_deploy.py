"""The files for an installation name commands and options that exist; units pass systemd's own check where it is there.

What is not checked: that they run under systemd, Docker or nginx.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from fedrec.cli import app
from tests.support import FEDREC

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
