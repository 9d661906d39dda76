"""A whole planned life of an experiment, played for an auditor who hears every release."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedrec.client.app import client_app
from fedrec.client.pool import ClientPool
from fedrec.config import Experiment, LocalOnlyConfig
from fedrec.data.catalog import ItemCatalog
from fedrec.data.slices import TimeSlice
from fedrec.errors import PrivacyError
from fedrec.grid.in_process import InProcessGrid
from fedrec.params import Params
from fedrec.privacy.events import AnyEvent
from fedrec.privacy.ledger import Charge, PrivacyLedger
from fedrec.privacy.settings import NoPrivacy, UserLevelPrivacy
from fedrec.protocol.identities import SIMULATION
from fedrec.server.app import GridLink
from fedrec.server.guard import Guard, guard_of, user_level
from fedrec.server.lifelong import run_stream
from fedrec.server.registry import Registry
from fedrec.server.round import Recipe
from fedrec.server.start import carried, public_vectors, source_of
from fedrec.server.state import ServerState
from fedrec.server.work import Desk, Observer


@dataclass(frozen=True)
class Release:
    """One noised sum, as it was paid for and as it came out.

    Attributes:
        name: what the ledger says that it is.
        event: what was paid.
        rate: probability with which each eligible person was asked.
        noised: the sum with its noise.
        within: the noised count of updates within the clip norm, less half of all, where the clip norm is learnt.
    """

    name: str
    event: AnyEvent
    rate: float
    noised: Params
    within: float | None = None


Ear = Callable[[Release], None]


@dataclass(frozen=True)
class OverheardGuard(Guard):
    """The guard as it is; every release of a sum is told to `ear`."""

    ear: Ear = lambda release: None

    def told(
        self, charge: Charge, rate: float, expected_cohort: float, released: Params, share: float | None = None
    ) -> None:
        """Tell the ear."""
        sums = {name: value.astype(np.float64) * expected_cohort for name, value in released.items()}
        within = None if share is None else (share - 0.5) * expected_cohort
        self.ear(Release(charge.entry.name, charge.entry.event, rate, sums, within))


@dataclass(frozen=True)
class Life:
    """What a run left.

    Attributes:
        state: of the server, after the last release.
        ledger: all that was paid, None if the experiment is not private.
    """

    state: ServerState
    ledger: PrivacyLedger | None


def auditable(experiment: Experiment) -> None:
    """Raise `PrivacyError` if the experiment has a mode that an audit cannot attack."""
    if not isinstance(experiment.privacy, NoPrivacy | UserLevelPrivacy):
        raise PrivacyError(
            'fedrec audit attacks what a server releases of many people; in privacy.mode "local" each client adds its '
            "own noise and pays from its own ledger, which nothing attacks yet; `fedrec privacy plan` tells what a "
            "client claims."
        )


def live(
    experiment: Experiment,
    catalog: ItemCatalog,
    slices: Sequence[TimeSlice],
    pool: ClientPool,
    n_people: int,
    ear: Ear = lambda release: None,
    observe: Observer = lambda event: None,
) -> Life:
    """Play all slices through Flower's Grid, with the ledger in memory and releases in a folder that is thrown away.

    Args:
        experiment: what to play; bootstrap replicates and the local-only row are left out.
        catalog: of the data.
        slices: the planned life.
        pool: the clients.
        n_people: what the experiment takes for the number of people if it declares none.
        ear: is told every release.
        observe: is told what happens.

    Raises:
        FedrecError: as a run does.
    """
    brief = experiment.evaluation.model_copy(update={"replicates": 0, "local_only": LocalOnlyConfig(people=0)})
    experiment = experiment.model_copy(update={"evaluation": brief})
    digest = catalog.digest()
    guard, ledger = None, None
    if experiment.privacy.mode != "none":
        settings = user_level(experiment)
        ledger = PrivacyLedger(None, epsilon=settings.epsilon, delta=settings.delta)
        made = guard_of(experiment, ledger, n_people)
        guard = OverheardGuard(**{f.name: getattr(made, f.name) for f in fields(made)}, ear=ear)
    source = source_of(experiment)
    vectors = public_vectors(experiment, catalog, slices[0].n_items, source)
    start = carried(experiment, source)
    recipe = Recipe(experiment, digest, time.perf_counter, guard, vectors=vectors, carried=start)
    state = ServerState(f"{experiment.name}/audit", experiment.digest(), digest)
    link = GridLink(InProcessGrid(client_app(lambda context: pool, lambda context: SIMULATION), [{}], {}))
    with tempfile.TemporaryDirectory(prefix="fedrec-audit-") as folder:
        registry = Registry(Path(folder))
        registry.prepare()
        for reached, _ in run_stream(state, link, slices, recipe, Desk(registry, catalog, lambda now: None, observe)):
            state = reached
    return Life(state, ledger)


def people_of(low: NDArray[np.int64], high: NDArray[np.int64]) -> int:
    """Return how many people have anything in a window, and 1 if nobody has."""
    return max(1, int((high > low).sum()))
