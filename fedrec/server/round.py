"""One round: ask nodes to do a task, check what they send, add it up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedrec import params as named
from fedrec.config import Experiment
from fedrec.data.slices import LastWindow, TimeSlice, TimeWindow
from fedrec.errors import FedrecError, RunError, TallyRefused
from fedrec.params import Accumulator, Params
from fedrec.protocol.link import Link
from fedrec.protocol.plan import Census, CensusRequest, RoundPlan
from fedrec.protocol.tally import Expectation, Tally
from fedrec.protocol.task import FitTask
from fedrec.random import Key
from fedrec.server import optimizer
from fedrec.server.sampling import sample
from fedrec.server.state import ServerState

Clock = Callable[[], float]


@dataclass(frozen=True)
class Recipe:
    """What stays the same over the rounds of a run.

    Attributes:
        experiment: the settings.
        catalog_digest: the catalogue that item numbers refer to.
        clock: seconds, for measuring how long a round takes.
    """

    experiment: Experiment
    catalog_digest: str
    clock: Clock


@dataclass(frozen=True)
class Roster:
    """The nodes of a federation in a fixed order, with how many eligible clients each hosts."""

    nodes: tuple[tuple[int, str, int], ...]

    @property
    def n_clients(self) -> int:
        """How many clients are eligible in all."""
        return sum(n for _, _, n in self.nodes)

    def slots(self, places: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
        """Return the chosen places among all eligible clients as slots of each node; nodes without any are left out."""
        found: dict[int, NDArray[np.int64]] = {}
        first = 0
        for node, _, n in self.nodes:
            own = places[(places >= first) & (places < first + n)] - first
            if len(own):
                found[node] = own
            first += n
        return found

    def name(self, node: int) -> str:
        """Return what a node calls itself."""
        return next((name for known, name, _ in self.nodes if known == node), f"node {node}")


@dataclass(frozen=True)
class Gathered:
    """What a round brought in.

    Attributes:
        sums: named tensors, summed over the clients of all nodes that passed the checks.
        n_clients: how many clients that is.
        stats: plain numbers summed over them.
        cohort: how many clients were asked.
        refused: which nodes were not folded, and why.
        bytes_down: bytes of all documents sent.
        bytes_up: bytes of all documents received.
    """

    sums: Params
    n_clients: int
    stats: Mapping[str, float]
    cohort: int
    refused: Sequence[dict[str, str]]
    bytes_down: int
    bytes_up: int


@dataclass
class _Fold:
    sums: Accumulator = field(default_factory=Accumulator)
    stats: dict[str, float] = field(default_factory=dict)
    n_clients: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)

    def add(self, tally: Tally) -> None:
        self.sums.fold(tally.sums)
        self.n_clients += tally.n_clients
        for name, value in tally.stats.items():
            self.stats[name] = self.stats.get(name, 0.0) + value


def take_census(link: Link, window: TimeWindow | LastWindow, recipe: Recipe) -> Roster:
    """Ask every node how many of its clients have interactions in the window.

    Raises:
        RunError: no node answered, with what they said instead.
    """
    request = CensusRequest(window=window, catalog_digest=recipe.catalog_digest).to_bytes()
    found: list[tuple[int, str, int]] = []
    errors: list[str] = []
    timeout = recipe.experiment.training.timeout_seconds
    for reply in link.exchange("census", dict.fromkeys(link.nodes(), request), timeout):
        try:
            if reply.document is None:
                raise TallyRefused(reply.error)
            census = Census.from_bytes(reply.document)
            found.append((reply.node, census.node, census.n_clients))
        except FedrecError as error:
            errors.append(f"node {reply.node}: {error}")
    if not found:
        raise RunError(f"No node answered the census ({'; '.join(errors[:3]) or 'none is connected'}).")
    return Roster(tuple(sorted(found, key=lambda node: (node[1], node[0]))))


def gather(
    link: Link,
    roster: Roster,
    places: NDArray[np.int64],
    plan_for: Callable[[NDArray[np.int64]], RoundPlan],
    expected: Callable[[int], Expectation],
    timeout_seconds: float | None,
) -> Gathered:
    """Send each node its plan, and fold every tally that passes the checks; one bad node leaves the others alone.

    Args:
        link: how to reach the nodes.
        roster: the nodes and their eligible clients.
        places: chosen clients among all eligible ones.
        plan_for: the plan for a node's slots.
        expected: what the tally of a node that was asked for so many clients must look like.
        timeout_seconds: how long to wait.

    Raises:
        RunError: every node that was asked failed.
    """
    slots = roster.slots(places)
    plans = {node: plan_for(own) for node, own in slots.items()}
    documents = {node: plan.to_bytes() for node, plan in plans.items()}
    fold, bytes_up = _Fold(), 0
    tallies: dict[int, Tally] = {}
    silent = set(slots)
    for reply in link.exchange("run", documents, timeout_seconds):
        if reply.node not in silent:
            fold.refused.append({"node": roster.name(reply.node), "reason": "it answered twice or was not asked"})
            continue
        silent.discard(reply.node)
        try:
            if reply.document is None:
                raise TallyRefused(reply.error)
            bytes_up += len(reply.document)
            expectation = expected(len(slots[reply.node]))
            tally = Tally.from_bytes(reply.document, plans[reply.node].coding, expectation.shapes)
            expectation.check(tally)
            tallies[reply.node] = tally
        except FedrecError as error:
            fold.refused.append({"node": roster.name(reply.node), "reason": str(error)})
    fold.refused += [{"node": roster.name(node), "reason": "it did not answer in time"} for node in sorted(silent)]
    for node in slots:  # in the order of the roster, not of arrival
        if node in tallies:
            fold.add(tallies[node])
    if slots and not tallies:
        first = fold.refused[0]
        raise RunError(f"Every node failed in this round; the first: {first['node']}: {first['reason']}")
    sent = sum(len(document) for document in documents.values())
    sums = dict(
        sorted(fold.sums.value().items())
    )  # documents are read in random order, which shows in a norm's last bit
    return Gathered(sums, fold.n_clients, fold.stats, len(places), tuple(fold.refused), sent, bytes_up)


def run_round(
    state: ServerState, link: Link, recipe: Recipe, time_slice: TimeSlice, roster: Roster
) -> tuple[ServerState, dict[str, Any]]:
    """Train the shared model for one round and return the new state and the round's record.

    The mean update over the clients that answered is the server optimizer's step. A round without any leaves the
    parameters as they were.
    """
    began = recipe.clock()
    training = recipe.experiment.training
    key = round_key(recipe.experiment, time_slice.index, state.round)
    task = FitTask(window=time_slice.train, local=training.local)
    expectation = {name: (value.shape, value.dtype) for name, value in state.params.items()}
    got = gather(
        link,
        roster,
        sample(training.cohort, roster.n_clients, key.child("cohort")),
        lambda slots: RoundPlan(
            time_slice.index,
            state.round,
            task,
            recipe.experiment.model,
            time_slice.n_items,
            state.params,
            key,
            recipe.catalog_digest,
            slots,
            codec=training.codec,
            download=training.download,
        ),
        lambda n: Expectation(expectation, n, task.local.clip_norm),
        training.timeout_seconds,
    )
    params, memory, norm = dict(state.params), dict(state.memory), 0.0
    if got.n_clients:
        mean = named.scale(got.sums, 1.0 / got.n_clients)
        norm = named.norm(mean)
        stage = training.base if time_slice.index == 0 else training.later
        params, memory = optimizer.step(training.server, params, memory, mean, optimizer.speed(stage, state.round))
    average = optimizer.averaged(state.average, params, training.average, state.round)
    record = {
        "slice": time_slice.index,
        "round": state.round,
        "task": "fit",
        "loss": got.stats["loss"] / got.n_clients if got.n_clients and "loss" in got.stats else None,
        "clipped": got.stats.get("clipped", 0.0),
        "cohort": got.cohort,
        "clients": got.n_clients,
        "refused": list(got.refused),
        "bytes_down": got.bytes_down,
        "bytes_up": got.bytes_up,
        "seconds": round(recipe.clock() - began, 4),
        "update_norm": norm,
    }
    new = state.advanced(
        round=state.round + 1, params=params, average=average, memory=memory, rounds=(*state.rounds, record)
    )
    return new, record


def round_key(experiment: Experiment, slice_index: int, round_number: int) -> Key:
    """Return the key of one training round."""
    return ServerState.root_key(experiment).child("slice", slice_index, "round", round_number)
