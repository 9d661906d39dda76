"""Asking nodes for sums: send plans, check what comes back, add it up."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import FedrecError, RunError, TallyRefused
from fedrec.evaluation.asked import row_bounds
from fedrec.params import Accumulator, Params
from fedrec.protocol.codec import Shapes
from fedrec.protocol.link import Link
from fedrec.protocol.parcels import Freight
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Expectation, Tally

TICKET_BYTES = 16
MOST_PER_VALUE, MOST_HEADER = 16, 1 << 20
"""Bytes that a document may take for each number asked for, and for all else; no codec takes as many."""
Combine = Callable[[Sequence[Tally]], Params]
"""Turns the tallies of the nodes into the sum over their clients."""


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
        bytes_down: bytes of all documents sent, and of the tensors that went beside them.
        bytes_up: bytes of all documents received.
        offenders: ids of the nodes that sent what no honest node sends.
    """

    sums: Params
    n_clients: int
    stats: Mapping[str, float]
    cohort: int
    refused: Sequence[dict[str, str]]
    bytes_down: int
    bytes_up: int
    offenders: tuple[int, ...] = ()


@dataclass
class _Fold:
    sums: Accumulator = field(default_factory=Accumulator)
    stats: dict[str, float] = field(default_factory=dict)
    n_clients: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)
    offenders: list[int] = field(default_factory=list)

    def add(self, tally: Tally) -> None:
        self.sums.fold(tally.sums)
        self.n_clients += tally.n_clients
        for name, value in tally.stats.items():
            self.stats[name] = self.stats.get(name, 0.0) + value


def gather(
    ask: Ask,
    places: NDArray[np.int64] | None = None,
    bound: float | None = None,
    counts: tuple[str, ...] = (),
    most: float | None = None,
    enough: int | None = None,
    combine: Combine | None = None,
) -> Gathered:
    """Send each node its plan, and fold every tally that passes the checks; one bad node leaves the others alone.

    Args:
        ask: what is asked of whom.
        places: chosen clients among all eligible ones; None: everybody.
        bound: L2 bound of one client's contribution, which sums are checked against; None: there is none.
        counts: names of plain numbers that count clients.
        most: bound of what one client adds to any single number; None: there is none.
        enough: the round is closed when so many clients are in; None: at the deadline, or when all have answered.
        combine: turns the tallies of all nodes into the sum over their clients; None: they are added up.

    Raises:
        RunError: every node that was asked failed.
    """
    places = ask.everybody if places is None else places
    roster, slots = ask.roster, ask.roster.slots(places)
    # A ticket from the system's randomness: nobody can know it beforehand, and nothing that is computed depends on it.
    plans = {node: replace(ask.plan_for(own), ticket=secrets.token_hex(TICKET_BYTES)) for node, own in slots.items()}
    freight = Freight()
    documents = {node: plan.to_bytes(freight) for node, plan in plans.items()}
    fold, bytes_up = _Fold(), 0
    tallies: dict[int, Tally] = {}
    silent = set(slots)
    for reply in ask.link.exchange("run", documents, ask.timeout_seconds, freight):
        if reply.node not in silent:
            fold.refused.append({"node": roster.name(reply.node), "reason": "it answered twice or was not asked"})
            fold.offenders.append(reply.node)
            continue
        silent.discard(reply.node)
        try:
            if reply.document is None:
                raise TallyRefused(reply.error)
            bytes_up += len(reply.document)
            expectation = Expectation(
                ask.shapes, len(slots[reply.node]), bound, counts, most, row_bounds(plans[reply.node])
            )
            tallies[reply.node] = _opened(reply.document, plans[reply.node], expectation)
        except FedrecError as error:
            fold.refused.append({"node": roster.name(reply.node), "reason": str(error)})
            if reply.document is not None:
                fold.offenders.append(reply.node)
        if enough is not None and sum(tally.n_clients for tally in tallies.values()) >= enough:
            silent.clear()  # nobody is blamed for being slower than was needed
            break
    fold.refused += [{"node": roster.name(node), "reason": "it did not answer in time"} for node in sorted(silent)]
    for node in slots:  # in the order of the roster, not of arrival
        if node in tallies:
            fold.add(tallies[node])
    if slots and not tallies:
        first = fold.refused[0]
        raise RunError(f"Every node failed in this round; the first: {first['node']}: {first['reason']}")
    sent = sum(len(document) for document in documents.values()) + freight.n_bytes
    found = fold.sums.value() if combine is None else combine([tallies[node] for node in slots if node in tallies])
    sums = dict(sorted(found.items()))  # documents are read in random order, which shows in a norm's last bit
    offenders = tuple(sorted(fold.offenders))
    return Gathered(sums, fold.n_clients, fold.stats, len(places), tuple(fold.refused), sent, bytes_up, offenders)


def _opened(document: bytes, plan: RoundPlan, expectation: Expectation) -> Tally:
    """Return a tally that passed every check; the cheapest come first."""
    longest = MOST_PER_VALUE * sum(math.prod(shape) for shape, _ in expectation.shapes.values()) + MOST_HEADER
    if len(document) > longest:
        raise TallyRefused(f"it is {len(document):,} bytes long where {longest:,} would do")
    tally = Tally.from_bytes(document, plan.coding, expectation.shapes, plan.ticket)
    expectation.check(tally)
    return tally
