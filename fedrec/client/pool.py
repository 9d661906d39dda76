"""`ClientPool`: the clients that a node hosts, and how they do what a plan asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedrec.client.statistics import cooccurrence
from fedrec.data.batches import Cohort
from fedrec.data.catalog import ItemCatalog
from fedrec.data.log import InteractionLog
from fedrec.data.slices import LastWindow, TimeWindow, resolve
from fedrec.errors import ProtocolError
from fedrec.privacy.clip import clip_factors
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import CooccurrenceTask, CountTask, EvaluateTask, FisherTask, FitTask, LocalTraining

if TYPE_CHECKING:
    from fedrec.client.budget import LocalBudget

Engine = Literal["batched", "each"]
KEPT_WINDOWS = 3
"""For so many windows a pool remembers who is eligible: 32 bytes a person each. A slice has two, train and test."""
COUNTED_AT_ONCE = 8_192
"""People whose items are counted in one computation; everybody at once would hold the whole log several times."""


@runtime_checkable
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
        budget: what the clients insist on and have spent in mode "local"; None: they trust whoever asks.
    """

    def __init__(
        self,
        log: InteractionLog,
        catalog: ItemCatalog,
        *,
        name: str = "node 0",
        ids: NDArray[np.int64] | None = None,
        engine: Engine = "batched",
        block: int | None = None,
        budget: LocalBudget | None = None,
    ) -> None:
        """Host everybody in `log`; `block` clients are computed at once, as many as suit the cache if not given."""
        self.name = name
        self.log = log
        self.catalog = catalog
        self.ids = np.arange(log.n_users, dtype=np.int64) if ids is None else ids
        self.engine: Engine = engine
        self.block = block
        self.budget = budget
        self._catalog_digest = catalog.digest()
        self._windows: dict[TimeWindow | LastWindow, Cohort] = {}

    @classmethod
    def partition(
        cls,
        log: InteractionLog,
        catalog: ItemCatalog,
        index: int,
        n_partitions: int,
        engine: Engine = "batched",
        budget: LocalBudget | None = None,
    ) -> LogPool:
        """Host every `n_partitions`-th person of the log, starting with number `index`."""
        users = np.arange(index, log.n_users, n_partitions, dtype=np.int64)
        own = log if n_partitions == 1 else log.take_users(users)  # a log of everybody is used as it is, mapped or not
        return cls(own, catalog, name=f"partition {index:06d}", ids=users, engine=engine, budget=budget)

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
            ProtocolError: the plan names clients or a catalogue that are not here, or asks for noise of clients that
                keep no ledger.
            PrivacyError: the clients insist on noise that the plan does not ask for.
        """
        self._check_catalog(plan.catalog_digest)
        if self.budget is not None:
            self.budget.check(plan)
        elif isinstance(plan.task, FitTask | CountTask) and plan.task.private is not None:
            raise ProtocolError(
                "The plan asks clients to add noise of their own, but these keep no ledger to pay from."
            )
        chosen = self._planned(plan)
        if isinstance(plan.task, FitTask) and plan.task.turn is not None:
            chosen = chosen.take(plan.task.turn.taken(chosen.ids))
        if isinstance(plan.task, FitTask) and plan.task.tier is not None:
            chosen = chosen.take(plan.task.tier.taken(chosen.ids))
        if not len(chosen):
            return Tally({}, 0, {})
        if isinstance(plan.task, FitTask | FisherTask):
            return self._fit(plan, plan.task, chosen)
        if isinstance(plan.task, CountTask):
            if self.budget is not None and plan.task.private is not None:
                from fedrec.client.local import count_locally

                return count_locally(plan, plan.task, plan.task.private, chosen, self.budget)
            return count(plan.task, chosen, plan.n_items)
        if isinstance(plan.task, CooccurrenceTask):
            return cooccurrence(plan.task, chosen, plan.n_items, plan.inputs.get("features"))
        return self._evaluate(plan, plan.task, chosen)

    def by_length(self, plan: RoundPlan) -> NDArray[np.int64]:
        """Return the plan's slots in the order of how long the clients' histories are, shortest first.

        Raises:
            ProtocolError: the plan names clients that are not here.
        """
        return plan.slots[np.argsort(self._planned(plan).high, kind="stable")]

    def _planned(self, plan: RoundPlan) -> Cohort:
        cohort = self._eligible(plan.task.window)
        if len(plan.slots) and not 0 <= int(plan.slots.min()) <= int(plan.slots.max()) < len(cohort):
            raise ProtocolError(
                f"The plan names clients {int(plan.slots.min())} to {int(plan.slots.max())} of {len(cohort)} eligible "
                "ones here; take the census again."
            )
        return cohort.take(plan.slots)

    def _check_catalog(self, digest: str) -> None:
        if digest != self._catalog_digest:
            raise ProtocolError(
                f"The server numbers items by catalogue {digest[:12]}, this node has {self._catalog_digest[:12]}; "
                "give both the same data set."
            )

    def _eligible(self, window: TimeWindow | LastWindow) -> Cohort:
        """Return who has an interaction in the window; kept for the windows that were asked for last."""
        cohort = self._windows.pop(window, None)
        if cohort is None:
            low, high = resolve(self.log, window)
            users = np.flatnonzero(high > low)
            cohort = Cohort(self.log, users, self.ids[users], low[users], high[users])
        self._windows[window] = cohort
        if len(self._windows) > KEPT_WINDOWS:
            del self._windows[next(iter(self._windows))]
        return cohort

    def _fit(self, plan: RoundPlan, task: FitTask | FisherTask, cohort: Cohort) -> Tally:
        import torch

        from fedrec.client.allocator import keep_freed_memory
        from fedrec.client.lesson import lesson_of
        from fedrec.client.trainer import cache_block, train_each
        from fedrec.client.vectorised import train_batched
        from fedrec.models.build import restore
        from fedrec.models.recommender import learnt

        keep_freed_memory()
        train = train_batched if self.engine == "batched" else train_each
        if self.budget is not None and isinstance(task, FitTask) and task.private is not None:
            from fedrec.client.local import fit_locally

            return fit_locally(plan, task, task.private, cohort, self.budget, train)
        model = restore(plan.model, plan.n_items, plan.params)
        lesson = lesson_of(plan)
        square = isinstance(task, FisherTask)
        local = LocalTraining(clip_norm=task.clip_norm) if isinstance(task, FisherTask) else task.local
        totals = {name: torch.zeros_like(value) for name, value in learnt(model).items()}
        n_clients, loss, n_clipped = 0, 0.0, 0
        for part in _by_length(cohort, self.block or cache_block(model, local.steps)):
            trained = train(model, part, local, plan.key, lesson)
            trained = trained.squared() if square else trained
            factors = clip_factors(trained.norms(), local.clip_norm)
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
    sums, n_clipped = np.zeros(n_items), 0
    for start in range(0, len(cohort), COUNTED_AT_ONCE):
        part = cohort.take(slice(start, start + COUNTED_AT_ONCE))
        width = part.high - part.low
        person = np.repeat(np.arange(len(part)), width)
        first = part.log.offsets[part.users] + part.low - (np.cumsum(width) - width)
        items = part.log.item[np.arange(len(person)) + first[person]].astype(np.int64)
        if items.max(initial=0) >= n_items:
            raise ProtocolError(
                f"The window holds item {items.max()}, but the plan knows {n_items} items; ask for all."
            )
        taken = np.sort(person * n_items + items)
        taken = taken[np.diff(taken, prepend=-1) > 0]  # each person counts an item once
        person, items = taken // n_items, taken % n_items
        factors = clip_factors(np.sqrt(np.bincount(person, minlength=len(part))), task.clip_norm)
        sums += np.bincount(items, weights=factors[person], minlength=n_items)
        n_clipped += int((factors < 1).sum())
    return Tally({"counts": sums.astype(np.float32)}, len(cohort), {"clipped": float(n_clipped)})


def _by_length(cohort: Cohort, block: int) -> list[Cohort]:
    """Cut the cohort into even blocks of similar history length, so that little is padding and none is a remnant."""
    order = np.argsort(cohort.high, kind="stable")
    return [cohort.take(part) for part in np.array_split(order, -(-len(order) // block)) if len(part)]
