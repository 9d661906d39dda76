"""A run that is killed, whenever it is, goes on to the same bytes as one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import FEDREC, environment, fedrec, release_files, small_project, without_clock

SHORT: dict[str, Any] = {"training__base__rounds": 3, "training__later__rounds": 2, "split__later": 1}
TAUGHT: dict[str, Any] = {
    "training__statistics": {"item_share": 1.0, "feature_share": 0.0},
    "training__distil": {
        "steps": 5, "batch": 4, "places": 2, "prior": {"item_rank": 4, "feature_rank": 0, "length": 8},
        "transfer": {"histories": 8, "length": 6},
    },
}  # fmt: skip
LONG: dict[str, Any] = {"training__base__rounds": 150, "training__later__rounds": 60, "runtime__checkpoint_every": 7}

# A process that imports once and then runs `fedrec` again and again in forks. With a number n it is killed before its
# n-th call that puts a file or folder in its place, and says so; each line on stdin is "n folder".
DYING = """
import os, signal, sys, traceback
from fedrec.cli import main
import fedrec.grid.simulate, fedrec.evaluation.report, fedrec.client.trainer, fedrec.client.evaluator

toml = sys.argv[1]
real = {name: getattr(os, name) for name in ("replace", "rename")}

def run(n, folder):
    os.chdir(folder)
    left = n
    def dying(name):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](*arguments, **options)
        return call
    for name in real:
        setattr(os, name, dying(name))
    sys.argv = ["fedrec", "simulate", toml, *(["--resume"] if n == 0 else [])]
    sys.stdout = sys.stderr = open("log", "a")
    try:
        main()
    except SystemExit as stop:
        os._exit(int(stop.code or 0))
    os._exit(0)

for line in sys.stdin:
    n, folder = line.split(maxsplit=1)
    child = os.fork()
    if child == 0:
        try:
            run(int(n), folder.strip())
        finally:
            traceback.print_exc()
            os._exit(99)
    status = os.waitpid(child, 0)[1]
    print("killed" if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status), flush=True)
"""


def outcome(root: Path) -> tuple[dict[str, bytes], Any]:
    """Return all that a finished run published, and its report but for clocks."""
    [report] = (root / "runs" / "small").glob("*/report.json")
    return release_files(root / "runs" / "registry"), without_clock(json.loads(report.read_text(encoding="utf-8")))


def start(toml: Path, root: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(FEDREC), "simulate", str(toml), *arguments],
        cwd=root, env=environment(root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def resumed(toml: Path, root: Path) -> None:
    """Run to the end from wherever the killed run got to."""
    result = fedrec("simulate", toml, "--resume", root=root)
    if result.returncode and "Nothing to resume: no run" in result.stderr:  # it was killed before it had a folder
        result = fedrec("simulate", toml, root=root)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, tuple[dict[str, bytes], Any]]:
    """Run without interruption: the experiment, how long it took, and what came out."""
    root = tmp_path_factory.mktemp("long")
    toml = small_project(root, **LONG)
    began = time.monotonic()
    result = fedrec("simulate", toml, root=root)
    assert result.returncode == 0, result.stderr
    return toml, time.monotonic() - began, outcome(root)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, long: tuple[Path, float, tuple[dict[str, bytes], Any]]) -> None:
    toml, seconds, expected = long
    moments = random.Random(11)
    n_killed = 0
    for number in range(6):
        root = tmp_path / str(number)
        root.mkdir()
        process = start(toml, root)
        time.sleep(seconds * (number + moments.random()) / 6)
        process.kill()
        n_killed += process.wait() == -signal.SIGKILL
        if number % 2:  # and once more while it is on its way again
            process = start(toml, root, "--resume")
            time.sleep(seconds * moments.uniform(0.3, 0.7))
            process.kill()
            process.wait()
        if not list(root.glob("runs/small/*/report.html")):
            resumed(toml, root)
        assert outcome(root) == expected, number
        assert fedrec("releases", "verify", root=root).returncode == 0
    assert n_killed >= 4


@pytest.mark.slow
def test_killed_while_publishing(tmp_path: Path, long: tuple[Path, float, tuple[dict[str, bytes], Any]]) -> None:
    """As soon as anything of a new release is on the disk, be it under a temporary name."""
    toml, _, expected = long
    process, arguments = start(toml, tmp_path), ("--resume",)
    folder = tmp_path / "runs" / "registry" / "releases"
    for number in range(3):
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if folder.is_dir() and len(os.listdir(folder)) > number:
                break
        process.kill()
        process.wait()
        process = start(toml, tmp_path, *arguments)
    process.wait(timeout=60)
    assert outcome(tmp_path) == expected


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    toml = small_project(tmp_path, **SHORT | TAUGHT)
    process = subprocess.Popen(
        [sys.executable, "-c", DYING, str(toml)],
        env=environment(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process, tmp_path
    process.communicate(timeout=60)


def ask(process: subprocess.Popen[str], n: int, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    assert process.stdin
    assert process.stdout
    print(n, folder, file=process.stdin, flush=True)
    return process.stdout.readline().strip()


@pytest.mark.slow
def test_killed_before_each_file_is_put_in_its_place(forks: tuple[subprocess.Popen[str], Path]) -> None:
    process, root = forks
    assert ask(process, -1, root / "whole") == "0", (root / "whole" / "log").read_text()
    expected = outcome(root / "whole")
    n = 1
    while (status := ask(process, n, root / str(n))) == "killed":
        assert ask(process, 0, root / str(n)) == "0", (root / str(n) / "log").read_text()
        assert outcome(root / str(n)) == expected, n
        left = [path.name for path in (root / str(n)).rglob("*fedrec-tmp")]
        assert left == [], n
        n += 1
    assert status == "0"
    # 5 checkpoints, those before them, 3 more while each release is taught, 2 releases of catalogue, model, manifest
    # and folder, and the 2 files of the report
    assert n > 20


def test_resume_refuses_another_experiment_and_a_damaged_checkpoint_and_then_goes_on(tmp_path: Path) -> None:
    toml = small_project(tmp_path, **SHORT | {"training__base__rounds": 500, "runtime__checkpoint_every": 1})
    process = start(toml, tmp_path)
    checkpoint = tmp_path / "runs" / "small" / "001" / "state.fedrec"
    end = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.wait()
    whole = checkpoint.read_bytes()

    other = fedrec("simulate", toml, "--resume", "--seed", "99", root=tmp_path)
    assert (other.returncode, other.stdout) == (1, "")
    assert "fedrec: Run 'small/001' was started with another experiment" in other.stderr
    checkpoint.write_bytes(whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :])
    checkpoint.with_name("state.fedrec.previous").unlink(missing_ok=True)  # it would be used instead, and said so
    damaged = fedrec("simulate", toml, "--resume", root=tmp_path)
    assert (damaged.returncode, damaged.stdout) == (1, "")
    assert "fedrec: The checkpoint 'runs/small/001/state.fedrec' is damaged" in damaged.stderr
    assert "Traceback" not in damaged.stderr + other.stderr
    assert len(list((tmp_path / "runs" / "small").iterdir())) == 1
