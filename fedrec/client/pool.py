"""`ClientPool`: the clients that a node hosts, and how they do what a plan asks."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedrec.data.batches import Cohort
from fedrec.data.catalog import ItemCatalog
from fedrec.data.log import InteractionLog
from fedrec.data.slices import LastWindow, TimeWindow, resolve
from fedrec.errors import ProtocolError
from fedrec.privacy.clip import clip_factors
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import CountTask, EvaluateTask, FitTask

Engine = Literal["batched", "each"]


class ClientPool(Protocol):
    """The clients of one node."""

    @property
    def name(self) -> str:
        """What the node is called; orders the nodes of a federation."""
        ...

    def census(self, window: TimeWindow | LastWindow, catalog_digest: str) -> int:
        """Return how many clients have an interaction in the window."""
        ...

    def run(self, plan: RoundPlan) -> Tally:
        """Let the planned clients do the task, and add up what they contribute."""
        ...


class LogPool:
    """Clients whose histories stand in one log: a simulation, a hospital, a household.

    Attributes:
        name: what the node is called.
        log: the clients' histories.
        catalog: the public catalogue that the item numbers refer to.
        ids: [n_users] numbers that name the clients in random streams, whatever node hosts them.
        engine: "batched" trains blocks of clients in one computation, "each" one client after the other.
    """

    def __init__(
        self,
        log: InteractionLog,
        catalog: ItemCatalog,
        *,
        name: str = "node 0",
        ids: NDArray[np.int64] | None = None,
        engine: Engine = "batched",
        block: int = 64,
    ) -> None:
        """Host everybody in `log`; `block` is how many clients the batched engine computes at once."""
        self.name = name
        self.log = log
        self.catalog = catalog
        self.ids = np.arange(log.n_users, dtype=np.int64) if ids is None else ids
        self.engine: Engine = engine
        self.block = block
        self._catalog_digest = catalog.digest()

    @classmethod
    def partition(
        cls, log: InteractionLog, catalog: ItemCatalog, index: int, n_partitions: int, engine: Engine = "batched"
    ) -> LogPool:
        """Host every `n_partitions`-th person of the log, starting with number `index`."""
        users = np.arange(index, log.n_users, n_partitions, dtype=np.int64)
        return cls(log.take_users(users), catalog, name=f"partition {index:06d}", ids=users, engine=engine)

    def census(self, window: TimeWindow | LastWindow, catalog_digest: str) -> int:
        """Return how many clients have an interaction in the window.

        Raises:
            ProtocolError: the server numbers the items by another catalogue.
        """
        self._check_catalog(catalog_digest)
        return len(self._eligible(window))

    def run(self, plan: RoundPlan) -> Tally:
        """Let the planned clients do the task, and add up what they contribute.

        Raises:
            ProtocolError: the plan names clients or a catalogue that are not here.
        """
        self._check_catalog(plan.catalog_digest)
        cohort = self._eligible(plan.task.window)
        if len(plan.slots) and not 0 <= int(plan.slots.min()) <= int(plan.slots.max()) < len(cohort):
            raise ProtocolError(
                f"The plan names clients {int(plan.slots.min())} to {int(plan.slots.max())} of {len(cohort)} eligible "
                "ones here; take the census again."
            )
        chosen = cohort.take(plan.slots)
        if not len(chosen):
            return Tally({}, 0, {})
        if isinstance(plan.task, FitTask):
            return self._fit(plan, plan.task, chosen)
        if isinstance(plan.task, CountTask):
            return count(plan.task, chosen, plan.n_items)
        return self._evaluate(plan, plan.task, chosen)

    def _check_catalog(self, digest: str) -> None:
        if digest != self._catalog_digest:
            raise ProtocolError(
                f"The server numbers items by catalogue {digest[:12]}, this node has {self._catalog_digest[:12]}; "
                "give both the same data set."
            )

    def _eligible(self, window: TimeWindow | LastWindow) -> Cohort:
        low, high = resolve(self.log, window)
        users = np.flatnonzero(high > low)
        return Cohort(self.log, users, self.ids[users], low[users], high[users])

    def _fit(self, plan: RoundPlan, task: FitTask, cohort: Cohort) -> Tally:
        import torch

        from fedrec.client.trainer import train_each
        from fedrec.client.vectorised import train_batched
        from fedrec.models.build import restore

        model = restore(plan.model, plan.n_items, plan.params)
        train = train_batched if self.engine == "batched" else train_each
        totals = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        n_clients, loss, n_clipped = 0, 0.0, 0
        for part in _by_length(cohort, self.block):
            trained = train(model, part, task.local, plan.key)
            factors = clip_factors(trained.norms(), task.local.clip_norm)
            trained.add_to(totals, factors)
            kept = factors > 0
            n_clients += int(kept.sum())
            n_clipped += int((factors[kept] < 1).sum())
            loss += float(trained.loss.detach().numpy()[kept].sum(dtype=np.float64))
        sums = {name: value.detach().numpy() for name, value in totals.items()}
        return Tally(sums, n_clients, {"loss": loss, "clipped": float(n_clipped)})

    def _evaluate(self, plan: RoundPlan, task: EvaluateTask, cohort: Cohort) -> Tally:
        from fedrec.client.evaluator import evaluate

        return evaluate(plan, task, cohort, self.catalog)


def count(task: CountTask, cohort: Cohort, n_items: int) -> Tally:
    """Return how many of the clients took each item in the window: ``{"counts": [n_items] float32}``.

    Raises:
        ProtocolError: somebody took an item that is not among the `n_items`.
    """
    width = cohort.high - cohort.low
    person = np.repeat(np.arange(len(cohort)), width)
    first = np.concatenate(([0], np.cumsum(width)[:-1]))
    place = np.arange(int(width.sum())) - np.repeat(first, width) + np.repeat(cohort.low, width)
    items = cohort.log.item[cohort.log.offsets[cohort.users][person] + place].astype(np.int64)
    if items.max(initial=0) >= n_items:
        raise ProtocolError(f"The window holds item {items.max()}, but the plan knows {n_items} items; ask for all.")
    taken = np.unique(person * n_items + items)  # each person counts an item once
    person, items = taken // n_items, taken % n_items
    factors = clip_factors(np.sqrt(np.bincount(person, minlength=len(cohort))), task.clip_norm)
    sums = np.bincount(items, weights=factors[person], minlength=n_items).astype(np.float32)
    return Tally({"counts": sums}, len(cohort), {"clipped": float((factors < 1).sum())})


def _by_length(cohort: Cohort, block: int) -> list[Cohort]:
    """Cut the cohort into blocks of similar history length, so that little is padding."""
    order = np.argsort(cohort.high, kind="stable")
    return [cohort.take(order[start : start + block]) for start in range(0, len(cohort), block)]
