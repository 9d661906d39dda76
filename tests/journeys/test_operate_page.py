"""The commands of docs/operate.md, as they stand on the page, in an empty folder."""

from __future__ import annotations

import json
import re
import shlex
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedrec.server.deployment import DeploymentFolder
from tests.journeys.test_deployment import Started, kinds, until
from tests.support import fedrec, small_document, small_rows, to_toml, write_csv

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "operate.md"
ENDLESS = ("server run", "node")


def lines_of(heading: str) -> list[tuple[list[str], str]]:
    """Return (words, comment) of each command of the first block below a heading."""
    block = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("```bash\n", 1)[1].split("```", 1)[0]
    found = []
    for line in block.splitlines():
        command, _, comment = line.partition("#")
        words = shlex.split(command)
        assert words[0] == "fedrec", line
        found.append((words[1:], comment.strip()))
    return found


def free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_a_first_deployment_on_one_machine(tmp_path: Path) -> None:
    if not (free(8443) and free(9464)):
        pytest.skip("the ports of the page are taken on this machine")
    write_csv(tmp_path / "ratings.csv", small_rows())
    small = small_document(
        training__base__rounds=1, training__later__rounds=1, split__later=1, evaluation__local_only__people=0,
        training__timeout_seconds=60.0,
    )  # fmt: skip
    (tmp_path / "experiment.toml").write_text(to_toml(small), encoding="utf-8")
    commands = lines_of("A first deployment, on one machine")
    verbs = [re.match(r"[a-z -]*", " ".join(words)).group().strip() for words, _ in commands]  # type: ignore[union-attr]
    assert [verb.split(" dep")[0] for verb in verbs[1:]] == [
        "server init", "server run", "node", "node", "node", "server status", "server stop", "doctor",
    ]  # fmt: skip
    folder = DeploymentFolder(tmp_path / "dep")
    with ExitStack() as stack:
        running: list[Started] = []
        for words, _ in commands:
            if " ".join(words).startswith(ENDLESS):
                running.append(Started(tmp_path, f"{len(running)}", *words))
                stack.callback(running[-1].end)
                continue
            if words[:2] == ["server", "status"]:
                until(lambda: "release" in kinds(folder), 420, running[0].said())
            done = fedrec(*words, root=tmp_path)
            assert done.returncode == 0, (words, done.stdout, done.stderr)
            if words[:2] == ["server", "status"]:
                assert done.stdout.startswith("Runs at 127.0.0.1:8443; last: ")
            if words[:2] == ["server", "stop"]:
                assert done.stdout == "Stopped.\n"
                assert running[0].process.wait(timeout=30) == 0
    told = fedrec("releases", "list", "--registry", "dep/registry", "--json", root=tmp_path)
    assert len(json.loads(told.stdout)) >= 1
