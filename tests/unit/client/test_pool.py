"""`LogPool`: partitions, numbers that name clients, blocks, and counting."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.client import pool as pool_module
from fedrec.client.pool import LogPool, count
from fedrec.data.batches import Cohort
from fedrec.data.catalog import ItemCatalog
from fedrec.data.log import InteractionLog
from fedrec.data.slices import LastWindow
from fedrec.errors import FedrecError, ProtocolError
from fedrec.models.configs import FactorisationConfig, PopularityConfig
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import CountTask, FitTask
from fedrec.random import Key

N_ITEMS = 6
HISTORIES = [[0, 1, 1, 2], [1], [], [5, 1, 5, 5, 5], [3, 4]]
WINDOW = LastWindow(skip=0)
CATALOG = ItemCatalog(tuple("abcdef"), ("",) * N_ITEMS, ((),) * N_ITEMS, np.zeros(N_ITEMS, np.int64))


def log() -> InteractionLog:
    user = np.repeat(np.arange(5), [len(items) for items in HISTORIES])
    item = np.array([item for items in HISTORIES for item in items])
    return InteractionLog.from_rows(user, item, np.arange(len(item)), tuple("vwxyz"))


def cohort() -> Cohort:
    users = np.array([0, 1, 3, 4])
    return Cohort(log(), users, users, np.zeros(4, np.int64), log().counts[users])


def plan(task: CountTask | FitTask, params: dict[str, np.ndarray] | None = None) -> RoundPlan:
    return RoundPlan(
        0, 0, task, PopularityConfig(), N_ITEMS, params or {}, Key.from_seed(0), CATALOG.digest(), np.arange(4)
    )


def test_partitions_host_everybody_once_under_their_own_numbers() -> None:
    pools = [LogPool.partition(log(), CATALOG, index, 3) for index in range(3)]
    assert [pool.ids.tolist() for pool in pools] == [[0, 3], [1, 4], [2]]
    assert [pool.log.user_ids for pool in pools] == [("v", "y"), ("w", "z"), ("x",)]
    assert sorted(pool.name for pool in pools) == [pool.name for pool in pools]
    assert len({pool.name for pool in pools}) == 3
    assert pools[0].log.history(1).tolist() == HISTORIES[3]
    assert [pool.census(WINDOW, CATALOG.digest()) for pool in pools] == [2, 2, 0]


def test_names_of_many_partitions_sort_as_numbers_do() -> None:
    names = [LogPool.partition(log(), CATALOG, index, 12).name for index in range(12)]
    assert sorted(names) == names


def test_a_person_counts_an_item_once() -> None:
    tally = LogPool(log(), CATALOG).run(plan(CountTask(window=WINDOW)))
    assert tally.sums["counts"].tolist() == [1, 3, 1, 1, 1, 1]
    assert tally.sums["counts"].dtype == np.float32
    assert (tally.n_clients, dict(tally.stats)) == (4, {"clipped": 0.0})


def test_only_the_window_counts() -> None:
    tally = LogPool(log(), CATALOG).run(plan(CountTask(window=LastWindow(skip=0, take=1))))
    assert tally.sums["counts"].tolist() == [0, 1, 1, 0, 1, 1]


def test_a_persons_counts_are_clipped_as_one_vector() -> None:
    """They took 3, 1, 2 and 2 items, so their norms are 3 ** .5, 1, 2 ** .5 and 2 ** .5."""
    tally = count(CountTask(window=WINDOW, clip_norm=1.2), cohort(), N_ITEMS)
    a, b, c = 1.2 / 3**0.5, 1.0, 1.2 / 2**0.5
    np.testing.assert_allclose(tally.sums["counts"], [a, a + b + c, a, c, c, c], rtol=1e-6)
    assert dict(tally.stats) == {"clipped": 3.0}


def test_nobody_is_clipped_by_a_bound_that_nobody_reaches() -> None:
    loose, none = (count(CountTask(window=WINDOW, clip_norm=c), cohort(), N_ITEMS) for c in (3**0.5, None))
    assert loose.sums["counts"].tolist() == none.sums["counts"].tolist()
    assert loose.stats == none.stats == {"clipped": 0.0}


def test_an_item_beyond_the_plans_catalogue_is_refused_and_not_given_to_somebody_else() -> None:
    with pytest.raises(ProtocolError, match="holds item 5, but the plan knows 5 items"):
        count(CountTask(window=WINDOW), cohort(), 5)


def test_a_catalogue_may_be_larger_than_what_people_took() -> None:
    assert count(CountTask(window=WINDOW), cohort(), 9).sums["counts"].tolist() == [1, 3, 1, 1, 1, 1, 0, 0, 0]


def test_blocks_hold_everybody_once_in_order_of_length() -> None:
    blocks = pool_module._by_length(cohort(), 3)
    assert [block.users.tolist() for block in blocks] == [[1, 4], [0, 3]]
    assert [len(block) for block in pool_module._by_length(cohort(), 64)] == [4]


def test_parameters_of_another_model_are_refused() -> None:
    with pytest.raises(FedrecError, match=r"belong to another model: missing .'counts'., unknown .'item'."):
        LogPool(log(), CATALOG).run(plan(FitTask(window=WINDOW), {"item": np.zeros((N_ITEMS, 2), np.float32)}))
    with pytest.raises(FedrecError, match=r"'counts' has shape \(5,\), the model needs \(6,\)"):
        LogPool(log(), CATALOG).run(plan(FitTask(window=WINDOW), {"counts": np.zeros(5, np.float32)}))


def test_what_stays_on_the_client_is_not_in_the_tally() -> None:
    config = FactorisationConfig(dim=3)
    params = {"item": np.ones((N_ITEMS, 3), np.float32)}
    asked = RoundPlan(
        0, 0, FitTask(window=WINDOW), config, N_ITEMS, params, Key.from_seed(0), CATALOG.digest(), np.arange(4)
    )
    tally = LogPool(log(), CATALOG).run(asked)
    assert tally.sums.keys() == {"item"}
    assert np.abs(tally.sums["item"]).max() > 0
