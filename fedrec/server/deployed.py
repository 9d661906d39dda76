"""What the ServerApp of a deployment does: wait for a slice, learn it, release it, and so on; resume by itself."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from fedrec.config import ScheduleSplit
from fedrec.data.slices import TimeSlice
from fedrec.errors import FedrecError, RegistryError, RunError
from fedrec.protocol.link import Link
from fedrec.protocol.signing import read_key
from fedrec.server.deployment import DeploymentFolder
from fedrec.server.files import refusal, write_atomically
from fedrec.server.journal import OUTCOME, PROCESS, Journal, wall_clock
from fedrec.server.run import RunFolder, check, run_experiment
from fedrec.server.signed import SignedLink

LOCK_SECONDS = 60.0
LOOK_SECONDS = 1.0


def run_deployed(
    folder: DeploymentFolder,
    link: Link,
    attempt: int = 0,
    now: Callable[[], float] = wall_clock,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Go on with the deployment's life, or begin it, until its last release.

    Args:
        folder: the deployment.
        link: how to reach the nodes.
        attempt: which start of the supervisor this is; it marks what is written for the supervisor.
        now: the clock, in seconds since 1970 UTC.
        sleep: waits so many seconds.

    Raises:
        FedrecError: whatever went wrong; it is also written down for the supervisor, and whether to try again.
    """
    journal = Journal(folder, now)
    process = {"attempt": attempt, "pid": os.getpid()}
    with only_one(folder, sleep):
        write_atomically(folder.state(PROCESS), json.dumps(process).encode())
        try:
            _live(folder, link, journal, now, sleep)
        except FedrecError as error:
            # Of what is wrong with settings or budgets, trying again mends nothing.
            again = isinstance(error, RunError | RegistryError)
            journal.note("failed", error=str(error), again=again)
            _outcome(folder, {"attempt": attempt, "finished": False, "error": str(error), "again": again})
            raise
        journal.note("finished")
        journal.stand("finished")
        _outcome(folder, {"attempt": attempt, "finished": True})


def _live(
    folder: DeploymentFolder, link: Link, journal: Journal, now: Callable[[], float], sleep: Callable[[float], None]
) -> None:
    experiment, dataset, waiting = folder.experiment, folder.dataset(), folder.settings.waiting
    check(experiment, dataset)
    signing = folder.settings.signing
    if signing is not None:
        link = SignedLink(link, read_key(folder.path / signing.key), cohort_minimum=signing.cohort_minimum)
    run = RunFolder.newest(folder.runs, experiment)
    if run is not None and run.complete:
        return
    journal.note(
        "started" if run is None else "resumed", experiment=experiment.digest(), catalog=dataset.catalog.digest()
    )
    run = run or RunFolder.new(folder.runs, experiment)

    def due(time_slice: TimeSlice) -> None:
        if isinstance(experiment.split, ScheduleSplit):
            time = experiment.split.start + time_slice.index * experiment.split.interval_seconds
            if time > now():
                journal.stand("waiting for the next slice", slice=time_slice.index, due=time)
            while (left := time - now()) > 0:
                sleep(min(left, 60.0))  # in pieces, for clocks are set
        wait_for_nodes(link, waiting.minimum_nodes, waiting.patience_seconds, journal, sleep)

    command = f"fedrec server run {folder.path}"
    run_experiment(experiment, dataset, link, run, folder.registry, command=command, observe=journal.observe, due=due)


def wait_for_nodes(
    link: Link, minimum: int, patience_seconds: float, journal: Journal, sleep: Callable[[float], None]
) -> None:
    """Return when so many nodes are connected.

    Raises:
        RunError: they are not, in time.
    """
    waited, told = 0.0, -1
    while len(found := link.nodes()) < minimum:
        if waited >= patience_seconds:
            raise RunError(
                f"{len(found)} of the {minimum} nodes that waiting.minimum_nodes asks for are connected after "
                f"{patience_seconds:.0f} s; start more with `fedrec node`."
            )
        if len(found) != told:
            told = len(found)
            journal.stand("waiting for nodes", nodes=told, minimum=minimum)
        sleep(LOOK_SECONDS)
        waited += LOOK_SECONDS


@contextmanager
def only_one(folder: DeploymentFolder, sleep: Callable[[float], None], seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock of the deployment's run, so that two processes never write one checkpoint; a dead one lets go.

    Raises:
        RunError: another process holds it for too long.
    """
    path = folder.state("run.lock")
    waited = 0.0
    with _opened(path) as handle:
        while not lock(handle):
            if waited >= seconds:
                raise RunError(f"Another process carries out this deployment's run ('{path}' is locked).")
            sleep(LOOK_SECONDS)
            waited += LOOK_SECONDS
        yield


@contextmanager
def _opened(path: os.PathLike[str]) -> Iterator[IO[str]]:
    from pathlib import Path

    try:
        handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise refusal(Path(path), error) from error
    with handle:
        yield handle


def lock(handle: IO[str]) -> bool:
    """Try to lock an open file; the lock goes with the process."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _outcome(folder: DeploymentFolder, document: dict[str, object]) -> None:
    write_atomically(folder.state(OUTCOME), json.dumps(document).encode())
