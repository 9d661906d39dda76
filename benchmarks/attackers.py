"""Nodes that lie within the rules: each message passes every check, and tries to do harm all the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np
import torch

from fedrec import params as named
from fedrec.client.pool import LogPool
from fedrec.client.vectorised import train_batched
from fedrec.data.catalog import ItemCatalog
from fedrec.data.log import InteractionLog
from fedrec.models.build import restore
from fedrec.params import Array, Params
from fedrec.privacy.clip import clip_factors
from fedrec.protocol.link import Reply, Verb
from fedrec.protocol.parcels import Freight
from fedrec.protocol.plan import Census, CensusRequest, RoundPlan
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import FitTask

NODES_AT_ONCE = 10
Lie = Callable[[Tally, float, "Gossip"], Params]
"""Turns an attacker's honest tally, the clip norm and what the honest nodes sent into the sums that it sends."""


@dataclass
class Gossip:
    """What attackers know: what every honest node sends in this round, per client. The strongest there can be."""

    round: tuple[int, int] = (-1, -1)
    honest: list[Params] = field(default_factory=list)
    n_liars: int = 0

    def hear(self, plan: RoundPlan, tally: Tally) -> None:
        """Listen to an honest node."""
        if (plan.slice, plan.round) != self.round:
            self.round, self.honest = (plan.slice, plan.round), []
        if tally.n_clients:
            self.honest.append(named.scale(tally.sums, 1.0 / tally.n_clients))

    def stacked(self, name: str) -> Array:
        """Return a tensor of all honest nodes."""
        return np.stack([update[name] for update in self.honest])


def within(sums: Mapping[str, Array], bound: float) -> dict[str, Array]:
    """Return the sums, shortened to the bound that the server checks."""
    found = {name: np.asarray(value, np.float32) for name, value in sums.items()}
    size = named.norm(found)
    return named.scale(found, min(1.0, 0.999 * bound / size)) if size else found


def sign_flip(tally: Tally, clip_norm: float, gossip: Gossip) -> Params:
    """Send the opposite of what was learnt, as long as the bound allows."""
    size = named.norm(tally.sums)
    return named.scale(tally.sums, -0.999 * clip_norm * tally.n_clients / size) if size else tally.sums


def scaled(tally: Tally, clip_norm: float, gossip: Gossip) -> Params:
    """Send random numbers as long as the bound allows, the same from all attackers."""
    shape_of = {name: value.shape for name, value in tally.sums.items()}
    rng = np.random.default_rng(gossip.round[1])
    noise = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in sorted(shape_of.items())}
    return named.scale(noise, 0.999 * clip_norm * tally.n_clients / named.norm(noise))


def alie(tally: Tally, clip_norm: float, gossip: Gossip) -> Params:
    """Send the honest mean less a few standard deviations: "a little is enough" (Baruch et al., NeurIPS 2019)."""
    n = len(gossip.honest) + gossip.n_liars
    supporters = n // 2 + 1 - gossip.n_liars
    z = NormalDist().inv_cdf(min(0.999, max(0.501, (n - gossip.n_liars - supporters) / (n - gossip.n_liars))))
    z = max(z, 1.0)  # the formula gives almost nothing for few attackers; one deviation is more harm
    lie = {name: gossip.stacked(name).mean(0) - z * gossip.stacked(name).std(0) for name in tally.sums}
    return within({name: value * tally.n_clients for name, value in lie.items()}, clip_norm * tally.n_clients)


def inner_product(tally: Tally, clip_norm: float, gossip: Gossip) -> Params:
    """Send the honest mean, turned round and ten times as long (Xie et al., UAI 2019)."""
    lie = {name: -10.0 * tally.n_clients * gossip.stacked(name).mean(0) for name in tally.sums}
    return within(lie, clip_norm * tally.n_clients)


def disguised(tally: Tally, clip_norm: float, gossip: Gossip) -> Params:
    """Do as `inner_product` does, half hidden in as much noise of one's own, so that liars resemble each other less."""
    lie = inner_product(tally, clip_norm, gossip)
    rng = np.random.default_rng(
        abs(hash((gossip.round, tally.n_clients, float(next(iter(tally.sums.values())).sum()))))
    )
    noise = {name: rng.standard_normal(value.shape).astype(np.float32) for name, value in sorted(lie.items())}
    own = named.scale(noise, named.norm(lie) / named.norm(noise))
    return within(named.add(lie, own), clip_norm * tally.n_clients)


def honestly(tally: Tally, clip_norm: float, gossip: Gossip) -> Params:
    """Send what was learnt from a poisoned history: the software is honest, what it was told is not."""
    return tally.sums


def louder(tally: Tally, clip_norm: float, gossip: Gossip) -> Params:
    """Send what was learnt from a poisoned history, as long as the bound allows."""
    return named.scale(sign_flip(tally, clip_norm, gossip), -1.0)


LIES: dict[str, Lie] = {
    "sign-flip": sign_flip,
    "scaled noise": scaled,
    "ALIE": alie,
    "IPM": inner_product,
    "item promotion": louder,
    "IPM in disguise": disguised,
    "poisoned history": honestly,
}
CLAIMED = ("sign-flip", "scaled noise", "ALIE", "IPM", "item promotion")
PROMOTIONS = ("item promotion", "poisoned history")


class Crowd:
    """Many nodes in one process, as a `Link`: all honest clients of a round are trained in a few computations.

    Nodes answer what their own pools would; the liars among them train on their own, and answer last.
    """

    def __init__(
        self, log: InteractionLog, catalog: ItemCatalog, n_nodes: int, liars: Mapping[int, Lie], item: int | None
    ) -> None:
        """Host every person of `log` on node ``user % n_nodes``.

        Args:
            log: the histories.
            catalog: the items.
            n_nodes: how many nodes.
            liars: index of a node to how it lies.
            item: what liars promote by poisoned histories; None: they train on their true ones.
        """
        self._whole = LogPool(log, catalog)
        self._pools = [LogPool.partition(log, catalog, index, n_nodes) for index in range(n_nodes)]
        self._liars, self._n = dict(liars), n_nodes
        self._train = {
            index: pool if item is None else LogPool(poisoned(pool.log, item), catalog, name=pool.name, ids=pool.ids)
            for index, pool in enumerate(self._pools)
            if index in liars
        }
        self._gossip = Gossip(n_liars=len(liars))

    def nodes(self) -> list[int]:
        """Return the ids of all nodes."""
        return list(range(self._n))

    def exchange(
        self,
        verb: Verb,
        documents: Mapping[int, bytes],
        timeout_seconds: float | None,
        freight: Freight | None = None,
    ) -> Iterable[Reply]:
        """Let every node answer."""
        if verb == "census":
            for node, document in documents.items():
                request, pool = CensusRequest.from_bytes(document), self._pools[node]
                n_clients = pool.census(request.window, request.catalog_digest)
                answer = Census(node=pool.name, n_clients=n_clients, ticket=request.ticket)
                yield Reply(node, answer.to_bytes())
            return
        held = (freight or Freight()).get
        plans = {node: RoundPlan.from_bytes(document, held) for node, document in documents.items()}
        honest = {node: plan for node, plan in plans.items() if node not in self._liars}
        first = next(iter(plans.values()))
        fit = isinstance(first.task, FitTask)
        answers = self._trained(honest) if fit else ((n, self._pools[n].run(plan)) for n, plan in plans.items())
        for node, tally in answers:
            if fit:
                self._gossip.hear(plans[node], tally)
            yield self._reply(node, plans[node], tally)
        for node in self._liars.keys() & plans.keys() if fit else ():
            yield self._reply(node, plans[node], self._lied(node, plans[node]))

    def _lied(self, node: int, plan: RoundPlan) -> Tally:
        tally = self._train[node].run(plan)
        assert isinstance(plan.task, FitTask)
        if not tally.n_clients or not self._gossip.honest:
            return tally
        return replace(tally, sums=self._liars[node](tally, plan.task.local.clip_norm, self._gossip))

    def _reply(self, node: int, plan: RoundPlan, tally: Tally) -> Reply:
        answer = replace(tally, ticket=plan.ticket)
        return Reply(node, answer.to_bytes(plan.coding, self._pools[node].name))

    def _trained(self, plans: Mapping[int, RoundPlan]) -> Iterator[tuple[int, Tally]]:
        """Train the clients of some nodes at once, and add up for each node."""
        nodes = list(plans)
        for start in range(0, len(nodes), NODES_AT_ONCE):
            part = nodes[start : start + NODES_AT_ONCE]
            plan = plans[part[0]]
            task = plan.task
            assert isinstance(task, FitTask)
            whole = self._whole._eligible(task.window)
            own = [np.flatnonzero(whole.users % self._n == node)[plans[node].slots] for node in part]
            cohort = whole.take(np.concatenate(own))
            model = restore(plan.model, plan.n_items, plan.params)
            trained = train_batched(model, cohort, task.local, plan.key)
            factors = clip_factors(trained.norms(), task.local.clip_norm)
            node_of = np.repeat(np.arange(len(part)), [len(one) for one in own])
            for place, node in enumerate(part):
                mine = np.where(node_of == place, factors, 0).astype(factors.dtype)
                totals = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
                trained.add_to(totals, mine)
                loss = float(trained.loss.detach().numpy()[mine > 0].sum(dtype=np.float64))
                sums = {name: value.detach().numpy() for name, value in totals.items()}
                yield node, Tally(sums, int((mine > 0).sum()), {"loss": loss, "clipped": 0.0})


def poisoned(log: InteractionLog, item: int) -> InteractionLog:
    """Return histories in which every second interaction is with one item."""
    changed = log.item.copy()
    for user in range(log.n_users):
        changed[log.offsets[user] + 1 : log.offsets[user + 1] : 2] = item
    return replace(log, item=changed)


def n_liars(share: float, n_nodes: int) -> int:
    """Return how many of so many nodes lie; at least one."""
    return max(1, math.floor(share * n_nodes + 0.5))
