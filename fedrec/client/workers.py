"""`WorkerPool`: the clients of one log, computed by several processes at once.

The processes map the same columns of the log, and plans and tallies pass through files in memory, so nothing is copied
per client. Each worker is a fresh ``python -m fedrec.client.workers``: it inherits no threads, locks or main module.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedrec.client.budget import LocalBudget
from fedrec.client.pool import Engine, LogPool
from fedrec.data.catalog import ItemCatalog
from fedrec.data.log import InteractionLog
from fedrec.data.slices import LastWindow, TimeWindow
from fedrec.errors import FedrecError, PrivacyError, ProtocolError, RunError
from fedrec.params import Accumulator
from fedrec.privacy.settings import LocalPrivacy
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Tally

MEMORY = Path("/dev/shm")
SMALL = 16
"""With fewer clients than this the first worker does all of it: starting the others costs more."""


class WorkerPool:
    """A `ClientPool` that shares each plan's clients out among worker processes.

    Use it as a context manager, or call `close`: it owns processes and a folder in memory.
    """

    def __init__(
        self,
        log: InteractionLog,
        catalog: ItemCatalog,
        n_workers: int,
        *,
        index: int = 0,
        n_partitions: int = 1,
        engine: Engine = "batched",
        budget: LocalBudget | None = None,
    ) -> None:
        """Start the workers; they host every `n_partitions`-th person of the log, starting with number `index`."""
        if budget is not None and budget.folder is None:
            raise PrivacyError("Several processes can keep clients' ledgers in a folder only, not in memory.")
        self._pool = LogPool.partition(log, catalog, index, n_partitions, engine, budget)
        self._folder = Path(tempfile.mkdtemp(prefix="fedrec-", dir=MEMORY if MEMORY.is_dir() else None))
        try:
            catalog.save(self._folder)
            setup = {
                "folder": str(self._folder),
                "log": str(_mapped(self._pool.log, self._folder / "log")),
                "name": self._pool.name,
                "engine": engine,
                "privacy": None if budget is None else budget.settings.model_dump(mode="json"),
                "ledgers": None if budget is None else str(budget.folder),
            }
            np.save(self._folder / "ids.npy", self._pool.ids, allow_pickle=False)
            self._workers = [_Worker(number, setup) for number in range(n_workers)]
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    @property
    def name(self) -> str:
        """What the node is called."""
        return self._pool.name

    def census(self, window: TimeWindow | LastWindow, catalog_digest: str) -> int:
        """Return how many clients have an interaction in the window; see `LogPool.census`."""
        return self._pool.census(window, catalog_digest)

    def run(self, plan: RoundPlan) -> Tally:
        """Let the workers do the task for their share of the clients, and add up; see `LogPool.run`.

        Raises:
            ProtocolError: what a worker says is wrong with the plan.
            RunError: a worker died.
        """
        workers = self._workers[: 1 if len(plan.slots) < SMALL else None]
        slots = self._pool.by_length(plan)
        shares = [slots[number :: len(workers)] for number in range(len(workers))]
        for worker, share in zip(workers, shares, strict=True):
            worker.send(replace(plan, slots=np.sort(share)))
        answers = [worker.receive() for worker in workers]  # all of them: one left unread would answer the next plan
        for answer in answers:
            if isinstance(answer, str):
                raise ProtocolError(answer)
        return _added([answer for answer in answers if isinstance(answer, Tally)])

    def close(self) -> None:
        """Stop the workers and give the memory back."""
        for worker in self._workers:
            worker.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> WorkerPool:
        """Return the pool."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pool."""
        self.close()


def _mapped(log: InteractionLog, spare: Path) -> Path:
    """Return the folder that the log's columns are mapped from; write them to `spare` if they are in memory only."""
    columns = (log.offsets, log.item, log.time, log.event, log.value)
    files = [Path(str(getattr(column, "filename", None) or "")) for column in columns]
    if all(isinstance(column, np.memmap) and file.is_file() for column, file in zip(columns, files, strict=True)):
        return files[0].parent
    log.save(spare)
    return spare


def _added(tallies: Sequence[Tally]) -> Tally:
    sums, stats = Accumulator(), dict[str, float]()
    for tally in tallies:
        sums.fold(tally.sums)
        for name, value in tally.stats.items():
            stats[name] = stats.get(name, 0.0) + value
    return Tally(sums.value(), sum(tally.n_clients for tally in tallies), stats)


class _Worker:
    """The near end of a worker process."""

    def __init__(self, number: int, setup: dict[str, Any]) -> None:
        self._plan = Path(setup["folder"]) / f"plan-{number}"
        self._tally = Path(setup["folder"]) / f"tally-{number}"
        command = [sys.executable, "-m", "fedrec.client.workers"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._say({**setup, "plan": str(self._plan), "tally": str(self._tally)})

    def send(self, plan: RoundPlan) -> None:
        self._plan.write_bytes(plan.to_bytes())
        self._say({"verb": "run"})

    def receive(self) -> Tally | str:
        """Return the tally, or what is wrong with the plan."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"A worker process died (exit code {self._process.wait()}); is there enough memory?")
        answer = json.loads(line)
        if answer["error"]:
            return str(answer["error"])
        return Tally.from_bytes(self._tally.read_bytes())

    def stop(self) -> None:
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # it died already
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(message) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise RunError(f"A worker process died (exit code {self._process.wait()}).") from error


def work(commands: IO[bytes], answers: IO[bytes]) -> None:
    """Be a worker: read a set-up and then one command a line, until there are no more."""
    import torch

    torch.set_num_threads(1)
    setup = json.loads(commands.readline())
    folder = Path(setup["folder"])
    pool = LogPool(
        InteractionLog.load(Path(setup["log"])),
        ItemCatalog.load(folder),
        name=setup["name"],
        ids=np.load(folder / "ids.npy", mmap_mode="r", allow_pickle=False),
        engine=setup["engine"],
        budget=_budget(setup),
    )
    for _ in iter(commands.readline, b""):
        error = ""
        try:
            tally = pool.run(RoundPlan.from_bytes(Path(setup["plan"]).read_bytes()))
            Path(setup["tally"]).write_bytes(tally.to_bytes())
        except FedrecError as refusal:
            error = str(refusal)
        answers.write((json.dumps({"error": error}) + "\n").encode())
        answers.flush()


def _budget(setup: dict[str, Any]) -> LocalBudget | None:
    if setup["privacy"] is None:
        return None
    return LocalBudget(LocalPrivacy.model_validate(setup["privacy"]), Path(setup["ledgers"]))


if __name__ == "__main__":
    work(sys.stdin.buffer, sys.stdout.buffer)
