"""The people, models and rounds that the contenders of `benchmarks.speed` share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.peers import plain
from fedrec.client.app import client_app
from fedrec.client.pool import ClientPool, LogPool
from fedrec.config import Experiment
from fedrec.data.batches import Cohort
from fedrec.data.catalog import ItemCatalog
from fedrec.data.log import InteractionLog
from fedrec.data.slices import LastWindow, TimeSlice
from fedrec.grid.in_process import InProcessGrid
from fedrec.models.build import build
from fedrec.models.recommender import Recommender, get_params
from fedrec.protocol.link import Link
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import FitTask
from fedrec.random import Key
from fedrec.server.app import GridLink
from fedrec.server.round import Recipe, run_round, take_census
from fedrec.server.state import ServerState

KEY = Key.from_seed(1).child("speed")
EVERYTHING = LastWindow(skip=0)


@dataclass(frozen=True)
class Workload:
    """Some people, and what a round asks of them.

    Attributes:
        name: "A", "B1" or "B4", and the length of the histories.
        log: everybody's history; nobody has an item twice.
        catalog: the items.
        experiment: the model and its training.
    """

    name: str
    log: InteractionLog
    catalog: ItemCatalog
    experiment: Experiment

    @property
    def task(self) -> FitTask:
        """What each client does in a round."""
        return FitTask(window=EVERYTHING, local=self.experiment.training.local)

    @property
    def steps(self) -> int:
        """How many steps each client takes in a round."""
        return self.experiment.training.local.steps

    def model(self) -> Recommender:
        """Return the model that a run starts from; the same in every process."""
        return build(self.experiment.model, len(self.catalog), KEY.child("model"))

    def cohort(self) -> Cohort:
        """Return all people with all of their histories."""
        users = np.arange(self.log.n_users, dtype=np.int64)
        return Cohort(self.log, users, users, np.zeros_like(users), self.log.counts)

    def plan(self) -> RoundPlan:
        """Return the request that lets everybody train."""
        slots = np.arange(self.log.n_users, dtype=np.int64)
        n_items, digest = len(self.catalog), self.catalog.digest()
        params = get_params(self.model())
        return RoundPlan(0, 0, self.task, self.experiment.model, n_items, params, KEY, digest, slots)


def people(n_users: int, per_user: int, n_items: int = plain.N_ITEMS) -> tuple[InteractionLog, ItemCatalog]:
    """Return `n_users` people with `per_user` different items each, uniformly drawn: the most rows to touch."""
    rank = KEY.child("people").numpy().random((n_users, n_items), np.float32)
    items = np.argpartition(rank, per_user, axis=1)[:, :per_user].astype(np.int64)
    user = np.repeat(np.arange(n_users), per_user)
    when = np.tile(np.arange(per_user), n_users)
    log = InteractionLog.from_rows(user, items.ravel(), when, tuple(str(u) for u in range(n_users)))
    names = tuple(str(i) for i in range(n_items))
    return log, ItemCatalog(names, names, ((),) * n_items, np.zeros(n_items, np.int64))


def small(n_users: int, cohort: int, nodes: int = 1) -> Workload:
    """Return workload A: `cohort` of `n_users` people train an item table and a user vector of their own each."""
    model = {
        "kind": "factorisation",
        "dim": plain.DIM,
        "length": plain.PER_USER,
        "targets": plain.BATCH,
        "negatives": plain.NEGATIVES,
        "unobserved_weight": plain.UNOBSERVED,
        "regularisation": plain.REGULARISATION,
    }
    local = {"steps": plain.STEPS, "learning_rate": plain.RATE}
    return Workload("A", *people(n_users, plain.PER_USER), _experiment(model, local, cohort, nodes))


def sequence(n_users: int, length: int, steps: int, n_items: int = plain.N_ITEMS, **changes: Any) -> Workload:
    """Return workload B: everybody trains a transformer for so many local steps on a full history."""
    model = {
        "kind": "transformer",
        "dim": 64,
        "blocks": 2,
        "heads": 2,
        "expand": 1,
        "length": length,
        "dropout": 0.2,
        "horizon": 1,
        "softmax": {"kind": "sampled", "negatives": 256},
        **changes,
    }
    local = {"steps": steps, "learning_rate": 0.1, "clip_norm": 1.0}
    found = _experiment(model, local, n_users, nodes=1)
    return Workload(f"B{steps}, length {length}", *people(n_users, length, n_items), found)


def _experiment(model: dict[str, Any], local: dict[str, Any], cohort: int, nodes: int) -> Experiment:
    training = {"cohort": {"kind": "fixed", "size": cohort}, "local": local, "server": {"kind": "sgd"}}
    runtime = {"nodes": nodes}
    return Experiment.parse({"name": "speed", "model": model, "training": training, "runtime": runtime})


def rounds(workload: Workload, link: Link, clock: Callable[[], float] = time.perf_counter) -> Callable[[], None]:
    """Return a function that runs the next whole round over `link`: sampling, wire, training, server step."""
    recipe = Recipe(workload.experiment, workload.catalog.digest(), clock)
    n_items = len(workload.catalog)
    time_slice = TimeSlice(0, EVERYTHING, LastWindow(skip=0, take=1), n_items, n_items)
    roster = take_census(link, EVERYTHING, recipe)
    state = ServerState("speed", recipe.experiment.digest(), recipe.catalog_digest, params=get_params(workload.model()))

    def go() -> None:
        nonlocal state
        state, record = run_round(state, link, recipe, time_slice, roster)
        if record["clients"] != record["cohort"]:
            raise RuntimeError(f"{record['clients']} of {record['cohort']} clients answered: {record['refused']}")

    return go


def in_process(workload: Workload, pool: ClientPool | None = None) -> Callable[[], None]:
    """Return a function that runs the next whole round through `InProcessGrid`, on this pool or a `LogPool`."""
    hosted = pool or LogPool(workload.log, workload.catalog)
    return rounds(workload, GridLink(InProcessGrid(client_app(lambda context: hosted), [{}], {})))
