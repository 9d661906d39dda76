"""A small federation in this process for tests of faults: its nodes can fall silent, repeat themselves and lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from fedrec.client.pool import LogPool
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.synthetic import checkerboard
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.protocol.link import Reply, Verb
from fedrec.protocol.parcels import Freight
from fedrec.protocol.plan import Census, CensusRequest, RoundPlan
from fedrec.random import Key
from fedrec.server.guard import guard_of, user_level
from fedrec.server.judge import initial
from fedrec.server.round import Recipe, run_round, take_census
from fedrec.server.run import cut
from fedrec.server.state import ServerState


def experiment(rounds: int = 20, noise: str | None = None, **training: Any) -> Experiment:
    """Return a small lifelong run; with noise, from "seed" or "system", a private one whose budget is ample."""
    private = {"mode": "central", "epsilon": 1e4, "delta": 1e-3, "calibrate": False, "noise": noise}
    return Experiment.parse(
        {
            "name": "faults",
            "seed": 3,
            "split": {"kind": "stream", "base": 0.5, "later": 2, "holdout": 0.15},
            "model": {
                "kind": "transformer", "dim": 8, "blocks": 1, "heads": 2, "length": 8, "dropout": 0.1,
                "softmax": {"kind": "sampled", "negatives": 8},
            },
            "training": {
                "cohort": {"kind": "poisson", "expected": 16.0},
                "average": 0.8,
                "base": {"rounds": rounds},
                "later": {"rounds": rounds // 2},
                **training,
            },
            "evaluation": {"probes": 2, "ks": [10], "replicates": 10, "local_only": {"people": 0}},
            "runtime": {"checkpoint_every": 1},
            **({} if noise is None else {"privacy": private}),
        }
    )  # fmt: skip


def dataset() -> Dataset:
    """Return made-up interactions of 80 people."""
    return checkerboard(80, 60, 2, 25, Key.from_seed(1))


class Nodes:
    """Nodes in this process; some fall silent or send something else."""

    def __init__(
        self, data: Dataset, n: int, change: Mapping[int, Callable[[bytes], bytes | None]] | None = None
    ) -> None:
        """Host every n-th person on each node; `change` turns a node's honest reply into what it sends, if anything."""
        self.pools = {100 + i: LogPool.partition(data.log, data.catalog, i, n) for i in range(n)}
        self.change = dict(change or {})
        self.plans: dict[int, RoundPlan] = {}

    def nodes(self) -> list[int]:
        """Return all ids."""
        return sorted(self.pools)

    def exchange(
        self,
        verb: Verb,
        documents: Mapping[int, bytes],
        timeout_seconds: float | None,
        freight: Freight | None = None,
    ) -> Iterable[Reply]:
        """Answer."""
        for node, document in documents.items():
            pool = self.pools[node]
            if verb == "census":
                request = CensusRequest.from_bytes(document)
                n_clients = pool.census(request.window, request.catalog_digest)
                yield Reply(node, Census(node=pool.name, n_clients=n_clients, ticket=request.ticket).to_bytes())
                continue
            plan = self.plans[node] = RoundPlan.from_bytes(document, (freight or Freight()).get)
            sent: bytes | None = replace(pool.run(plan), ticket=plan.ticket).to_bytes(plan.coding, pool.name)
            if node in self.change and sent is not None:
                sent = self.change[node](sent)
            if sent is not None:
                yield Reply(node, sent)


class Repeating(Nodes):
    """Nodes of which one sends each answer twice, or another node's answer instead of its own."""

    def __init__(self, data: Dataset, n: int, instead: bool) -> None:
        """Host as `Nodes` does."""
        super().__init__(data, n)
        self.instead = instead

    def exchange(
        self,
        verb: Verb,
        documents: Mapping[int, bytes],
        timeout_seconds: float | None,
        freight: Freight | None = None,
    ) -> Iterable[Reply]:
        """Answer, and node 101 wrongly."""
        replies = list(super().exchange(verb, documents, timeout_seconds, freight))
        if verb == "census":
            return replies
        if not self.instead:
            return [*replies, *(reply for reply in replies if reply.node == 101)]
        other = next(reply for reply in replies if reply.node == 100)
        return [replace(other, node=101) if reply.node == 101 else reply for reply in replies]


class Federation:
    """A data set, its recipe and a state to run rounds from."""

    def __init__(self, settings: Experiment) -> None:
        """Prepare."""
        self.data = dataset()
        self.recipe = Recipe(settings, self.data.catalog.digest(), lambda: 0.0)
        self.slice = cut(settings, self.data)[0]
        params = initial(settings.model, self.slice.n_items, self.recipe)
        if settings.privacy.mode != "none":
            ledger = PrivacyLedger(None, epsilon=user_level(settings).epsilon, delta=user_level(settings).delta)
            self.recipe = replace(self.recipe, guard=guard_of(settings, ledger, self.data.log.n_users))
        self.fresh = ServerState("faults/001", settings.digest(), self.recipe.catalog_digest, params=params)

    def rounds(self, link: Nodes, n: int) -> ServerState:
        """Run some rounds and return the state."""
        state, roster = self.fresh, take_census(link, self.slice.train, self.recipe)
        for _ in range(n):
            state, _ = run_round(state, link, self.recipe, self.slice, roster)
        return state
