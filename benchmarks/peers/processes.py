"""Contenders that need a process, or a virtual environment, of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARK = "seconds: "
PFL = "0.6.0"
INSTALL_SECONDS = 180
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
}


class Skipped(Exception):
    """A contender cannot take part here, and why."""


def print_seconds(seconds: Sequence[float]) -> None:
    """Print what a contender's process measured, for `measured` to find among whatever else it printed."""
    print(MARK + json.dumps(list(seconds)), flush=True)


def measured(module: str, python: str = sys.executable, timeout_seconds: float = 240, **options: int) -> list[float]:
    """Run ``benchmarks.peers.MODULE`` in a process of its own and return the seconds of each round.

    Raises:
        Skipped: it failed or took too long.
    """
    start = f"from benchmarks.peers.{module} import main; main()"  # as a module, so that Ray's workers can import it
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [python, "-c", start, *arguments],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=timeout_seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Skipped(f"no result after {timeout_seconds:.0f} s") from error
    lines = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise Skipped(f"exit code {done.returncode}: {last[:200]}")
    seconds: list[float] = json.loads(lines[-1])
    return seconds


def pfl_python(torch_version: str) -> str:
    """Return the interpreter of pfl's own virtual environment, made at the first call.

    Raises:
        Skipped: it cannot be installed in three minutes.
    """
    folder = Path(os.environ.get("FEDREC_CACHE") or Path.home() / ".cache" / "fedrec") / "pfl-venv"
    python, ready = folder / "bin" / "python", folder / f"ready-pfl-{PFL}-torch-{torch_version}"
    if ready.exists():
        return str(python)
    packages = [f"pfl[pytorch]=={PFL}", f"torch=={torch_version}"]
    try:
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "install", *packages],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Skipped(f"pfl {PFL} was not installed after {INSTALL_SECONDS} s") from error
    except (subprocess.CalledProcessError, OSError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise Skipped(f"pfl {PFL} does not install: {said[:200]}") from error
    ready.touch()
    return str(python)
