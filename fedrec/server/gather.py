"""Asking nodes for sums: send plans, check what comes back, add it up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import FedrecError, RunError, TallyRefused
from fedrec.params import Accumulator, Params
from fedrec.protocol.codec import Shapes
from fedrec.protocol.link import Link
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Expectation, Tally


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
class Ask:
    """A question to the clients of a roster, whose answers are added up.

    Attributes:
        link: how to reach the nodes.
        roster: the nodes and their eligible clients.
        plan_for: the plan for a node's slots.
        shapes: what the sums look like.
        timeout_seconds: how long to wait.
    """

    link: Link
    roster: Roster
    plan_for: Callable[[NDArray[np.int64]], RoundPlan]
    shapes: Shapes
    timeout_seconds: float | None = None

    @property
    def everybody(self) -> NDArray[np.int64]:
        """The places of all eligible clients."""
        return np.arange(self.roster.n_clients, dtype=np.int64)


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


def gather(
    ask: Ask, places: NDArray[np.int64] | None = None, bound: float | None = None, counts: tuple[str, ...] = ()
) -> Gathered:
    """Send each node its plan, and fold every tally that passes the checks; one bad node leaves the others alone.

    Args:
        ask: what is asked of whom.
        places: chosen clients among all eligible ones; None: everybody.
        bound: L2 bound of one client's contribution, which sums are checked against; None: there is none.
        counts: names of plain numbers that count clients.

    Raises:
        RunError: every node that was asked failed.
    """
    places = ask.everybody if places is None else places
    roster, slots = ask.roster, ask.roster.slots(places)
    plans = {node: ask.plan_for(own) for node, own in slots.items()}
    documents = {node: plan.to_bytes() for node, plan in plans.items()}
    fold, bytes_up = _Fold(), 0
    tallies: dict[int, Tally] = {}
    silent = set(slots)
    for reply in ask.link.exchange("run", documents, ask.timeout_seconds):
        if reply.node not in silent:
            fold.refused.append({"node": roster.name(reply.node), "reason": "it answered twice or was not asked"})
            continue
        silent.discard(reply.node)
        try:
            if reply.document is None:
                raise TallyRefused(reply.error)
            bytes_up += len(reply.document)
            expectation = Expectation(ask.shapes, len(slots[reply.node]), bound, counts)
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
