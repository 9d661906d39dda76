"""One question of the server, and what has come of it: which device has which task, and its answer on the disk."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedrec import params as named
from fedrec.client.gateway.spool import Upload
from fedrec.errors import FedrecError, TallyRefused
from fedrec.evaluation.asked import bound_of, row_bounds, shapes_of
from fedrec.params import Accumulator
from fedrec.protocol.link import Verb
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Expectation, Tally

SLACK_BYTES = 256 << 10
Refuse = Callable[[int, str], None]


@dataclass(frozen=True)
class Blob:
    """A document that devices download: its digest, and its bytes or the file that they are in."""

    sha256: str
    size: int
    data: bytes | None = None
    path: Path | None = None

    @classmethod
    def of(cls, data: bytes, path: Path | None = None) -> Blob:
        """Return a blob in memory, or in a file that holds `data` already."""
        return cls(hashlib.sha256(data).hexdigest(), len(data), data if path is None else None, path)

    def piece(self, offset: int, n_bytes: int) -> bytes:
        """Return some of it, from an offset on."""
        if self.data is not None:
            return self.data[offset : offset + n_bytes]
        assert self.path is not None
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(n_bytes)


@dataclass
class Task:
    """What one device is asked in a round.

    Attributes:
        name: random; only the device that holds it may use it.
        device: number of the device.
        place: its place in the round: slot or party.
        document: what it alone is asked; None in "run".
        upload: its answer.
        declined: it said no, or cannot do such a task.
    """

    name: str
    device: int
    place: int
    document: Blob | None = None
    upload: Upload | None = None
    declined: bool = False

    @property
    def closed(self) -> bool:
        """Whether nothing more is to come."""
        return self.declined or (self.upload is not None and self.upload.complete)


@dataclass
class Round:
    """One question to many devices.

    Attributes:
        verb: what is asked.
        kind: of the plan's task; None in phases of a masked sum.
        plan: the signed plan that all of them are given.
        upload_limit: longest answer, in bytes.
        deadline: when it is closed, by the monotonic clock.
        tasks: by device.
        session: of the masked sum.
        tensors: by digest, what the plan names and does not carry.
        done: set once nobody is waited for.
        open: whether answers are taken.
    """

    verb: Verb
    kind: str | None
    plan: Blob | None
    upload_limit: int
    deadline: float
    tasks: dict[int, Task]
    session: str | None = None
    tensors: Mapping[str, Blob] = field(default_factory=dict)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    open: bool = True

    def look(self) -> None:
        """Set `done` if nobody is waited for."""
        if all(task.closed for task in self.tasks.values()):
            self.done.set()

    @property
    def described(self) -> dict[str, Any]:
        """How it stands, as JSON."""
        tasks = self.tasks.values()
        return {
            "verb": self.verb,
            "kind": self.kind,
            "asked": len(tasks),
            "answered": sum(task.upload is not None and task.upload.complete for task in tasks),
            "declined": sum(task.declined for task in tasks),
        }

    def answers(self) -> dict[int, Path]:
        """Return place -> file of every answer that is there."""
        return {
            task.place: task.upload.path
            for task in self.tasks.values()
            if task.upload is not None and task.upload.complete
        }


def new_task(device: int, place: int, document: Blob | None = None) -> Task:
    """Return a task with a name that nobody can guess."""
    return Task(secrets.token_hex(16), device, place, document)


def upload_limit(plan: RoundPlan) -> int:
    """Return how long the tally of one device can be, in bytes, whatever the codec."""
    whole = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes_of(plan).values())
    return whole + whole // 4 + SLACK_BYTES


def folded(plan: RoundPlan, name: str, answers: Mapping[int, Path], refuse: Refuse) -> bytes:
    """Return the tally of the node: the sum of those devices' tallies that pass the checks, in the order of the slots.

    One tally is in memory at a time, beside the sum.

    Args:
        plan: what was asked.
        name: of the node.
        answers: slot -> file of the device's tally.
        refuse: is told whose tally was wrong, and why.
    """
    shapes, bound, coding = shapes_of(plan), bound_of(plan), plan.coding
    expected = Expectation(shapes, 1, bound, rows=row_bounds(plan))
    sums, stats, n_clients = Accumulator(), dict[str, float](), 0
    for slot in sorted(answers):
        try:
            tally = Tally.from_bytes(answers[slot].read_bytes(), coding, shapes, plan.ticket)
            expected.check(tally)
            if tally.n_clients and not tally.sums:
                raise TallyRefused("it counts somebody without a contribution")
        except FedrecError as error:
            refuse(slot, str(error))
            continue
        if not tally.n_clients:
            continue
        tally = _within(tally, bound)
        sums.fold(tally.sums)
        n_clients += 1
        for key, value in tally.stats.items():
            stats[key] = stats.get(key, 0.0) + value
    total = dict(sorted(sums.value().items()))
    return Tally(total, n_clients, stats, ticket=plan.ticket).to_bytes(coding, name)


def _within(tally: Tally, bound: float | None) -> Tally:
    """Scale down what a lossy codec has lengthened, so that the sum is within the bound of its clients."""
    norm = named.norm(tally.sums) if bound is not None else 0.0
    if bound is None or norm <= bound:
        return tally
    return replace(tally, sums=named.scale(tally.sums, bound / norm))
