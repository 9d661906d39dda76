"""Asking nodes for sums: send plans, check what comes back, add it up; and the same with a charge and noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import FedrecError, RunError, TallyRefused
from fedrec.params import Accumulator, Params
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.protocol.codec import Shapes
from fedrec.protocol.link import Link
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Expectation, Tally
from fedrec.server.guard import Guard

Prepare = Callable[[Params, int], Params]
"""Turns the sum of so many clients into what noise is added to."""


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


def private_gather(
    guard: Guard,
    name: str,
    mechanism: GaussianMechanism,
    rate: float,
    expected_cohort: float,
    link: Link,
    roster: Roster,
    plan_for: Callable[[NDArray[np.int64]], RoundPlan],
    shapes: Shapes,
    timeout_seconds: float | None,
    prepare: Prepare | None = None,
) -> Gathered:
    """Charge the ledger, draw the cohort, gather, add noise: what comes back is ``(sum + noise) / expected_cohort``.

    The charge is on disk before anybody is asked, and it pays for exactly one result. A cohort without anybody is
    noised like any other, for that nobody took part is somebody's secret too. Whatever statistics came along are
    dropped: they carry no noise.

    Args:
        guard: ledger and noise.
        name: what the charge is for; a second charge of the same name is a retry, which pays again.
        mechanism: clip norm and noise.
        rate: probability with which each eligible client takes part.
        expected_cohort: what the noised sum is divided by: public, never the number that came.
        link: how to reach the nodes.
        roster: the nodes and their eligible clients.
        plan_for: the plan for a node's slots.
        shapes: what the sums look like.
        timeout_seconds: how long to wait.
        prepare: turns the sum of so many clients into what noise is added to; it then also checks their bound.

    Raises:
        BudgetExhausted: the charge would pass the budget; nothing was sent.
        RunError: every node that was asked failed; the charge stands.
    """
    charge = guard.ledger.charge(name, mechanism.event(rate), clip_norm=mechanism.clip_norm)
    secret = guard.secret(charge)
    everyone = np.arange(roster.n_clients, dtype=np.int64)
    places = everyone if rate >= 1.0 else everyone[secret.child("cohort").uniforms(everyone, 1)[:, 0] < rate]
    bound = mechanism.clip_norm if prepare is None else None
    got = gather(link, roster, places, plan_for, lambda n: Expectation(shapes, n, bound), timeout_seconds)
    total = got.sums or _zeros(shapes)
    total = total if prepare is None else prepare(total, got.n_clients)
    return replace(got, sums=mechanism.noised(total, expected_cohort, charge, guard.noise(secret)), stats={})


def _zeros(shapes: Shapes) -> Params:
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
