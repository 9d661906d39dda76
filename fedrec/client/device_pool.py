"""`DevicePool`: the clients of a node whose histories stand in device stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedrec.client.pool import LogPool
from fedrec.client.store import Store
from fedrec.data.catalog import ItemCatalog
from fedrec.data.log import InteractionLog
from fedrec.data.slices import LastWindow, TimeWindow
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Tally

if TYPE_CHECKING:
    from fedrec.client.budget import LocalBudget


class DevicePool:
    """A phone with one store, or a household hub with one for each person.

    The stores are read each time something is asked, so what was forgotten takes part no more.

    Attributes:
        name: what the node is called.
        stores: one a person.
        catalog: the public catalogue; interactions with items outside it stay out.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        catalog: ItemCatalog,
        *,
        name: str | None = None,
        ids: NDArray[np.int64] | None = None,
        budget: LocalBudget | None = None,
    ) -> None:
        """Host the people of `stores`.

        Args:
            stores: one a person.
            catalog: the public catalogue.
            name: what the node is called.
            ids: name the people's random streams; the stores' own numbers if not given.
            budget: what the people insist on and have spent in mode "local"; None: they trust whoever asks.
        """
        self.budget = budget
        self.stores = stores
        self.catalog = catalog
        self.ids = np.array([store.number for store in stores], np.int64) if ids is None else ids
        self.name = name or f"device {int(self.ids[0]) if len(self.ids) else 0:016x}"

    def census(self, window: TimeWindow | LastWindow, catalog_digest: str) -> int:
        """Return how many people have an interaction in the window.

        Raises:
            ProtocolError: the server numbers the items by another catalogue.
            StoreError: a store cannot be read.
        """
        return self._pool().census(window, catalog_digest)

    def run(self, plan: RoundPlan) -> Tally:
        """Let the planned people do the task, and add up what they contribute.

        Raises:
            ProtocolError: the plan names clients or a catalogue that are not here.
            StoreError: a store cannot be read.
        """
        return self._pool().run(plan)

    def _pool(self) -> LogPool:
        return LogPool(
            log_of(self.stores, self.catalog), self.catalog, name=self.name, ids=self.ids, budget=self.budget
        )


def log_of(stores: Sequence[Store], catalog: ItemCatalog) -> InteractionLog:
    """Return the histories of the stores as one log, a user each; items outside the catalogue are left out."""
    number_of = catalog.number_of
    people = [[one for one in store.history() if one.item in number_of] for store in stores]
    rows = [one for person in people for one in person]
    kinds = sorted({one.event for one in rows})[:127]  # `event` has 8 bits; no task looks at it yet
    kind_of = {kind: index for index, kind in enumerate(kinds)}
    return InteractionLog(
        np.cumsum([0, *(len(person) for person in people)]).astype(np.int64),
        np.array([number_of[one.item] for one in rows], np.int32),
        np.array([one.time for one in rows], np.int64),
        np.array([kind_of.get(one.event, 0) for one in rows], np.int8),
        np.array([np.nan if one.value is None else one.value for one in rows], np.float32),
        tuple(str(index) for index in range(len(stores))),
        tuple(kinds) or ("interaction",),
    )
