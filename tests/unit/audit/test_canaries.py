"""Where canaries show, and that the people beside them are not touched."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedrec.audit.canaries import Asked, CanaryPool, spread
from fedrec.client.pool import LogPool
from fedrec.data.slices import LastWindow
from fedrec.data.synthetic import checkerboard
from fedrec.models.configs import PopularityConfig
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import CountTask
from fedrec.random import Key

KEY = Key.from_seed(2)
DATA = checkerboard(12, 20, 2, 5, KEY)
WINDOW = LastWindow(skip=1)
PLAN = RoundPlan(
    0, 0, CountTask(window=WINDOW, clip_norm=2.0), PopularityConfig(), 20, {}, KEY, DATA.catalog.digest(), np.arange(0)
)


def test_no_two_canaries_share_a_number_and_no_tensor_is_missed() -> None:
    spots = spread({"table": 500, "bias": 3, "one": 1}, 50, KEY)
    who = np.concatenate([canaries for canaries, _ in spots.values()])
    assert sorted(who.tolist()) == list(range(50))
    assert {name: len(places) for name, (_, places) in spots.items()} == {"table": 46, "bias": 3, "one": 1}
    for name, size in (("table", 500), ("bias", 3), ("one", 1)):
        places = spots[name][1]
        assert len(set(places.tolist())) == len(places)
        assert places.max() < size


def test_canaries_without_a_number_are_silent() -> None:
    spots = spread({"small": 7}, 50, KEY)
    assert len(spots["small"][0]) == 7
    assert sorted(spots["small"][1].tolist()) == list(range(7))


def test_the_sum_is_that_of_the_people_and_the_clip_norm_of_each_canary() -> None:
    inner, heard = LogPool(DATA.log, DATA.catalog), list[Asked]()
    included = np.array([True, False, True, True])
    pool = CanaryPool(inner, included, KEY, [WINDOW], heard.append)
    n = pool.census(WINDOW, DATA.catalog.digest())
    assert n == 12 + 3
    tally = pool.run(replace(PLAN, slots=np.array([0, 5, 12, 14])))  # two people, and canaries 0 and 3
    people = inner.run(replace(PLAN, slots=np.array([0, 5])))
    assert tally.n_clients == 4
    assert heard[0].there.tolist() == [True, False, False, True]
    who, place = heard[0].spots["counts"]
    added = np.zeros(20)
    added[place[np.isin(who, [0, 3])]] = 2.0
    assert np.allclose(tally.sums["counts"], people.sums["counts"] + added)
    assert np.allclose(heard[0].sent - heard[0].known, [2.0, 0.0, 0.0, 2.0])
    assert np.allclose(heard[0].read(tally.sums), heard[0].sent)


def test_canaries_are_not_eligible_elsewhere() -> None:
    pool = CanaryPool(LogPool(DATA.log, DATA.catalog), np.ones(4, np.bool_), KEY, [WINDOW])
    assert pool.census(LastWindow(skip=0, take=1), DATA.catalog.digest()) == 12


@pytest.mark.parametrize("bound", [None, 0.5])
def test_a_canary_sends_all_that_it_may(bound: float | None) -> None:
    heard: list[Asked] = []
    pool = CanaryPool(LogPool(DATA.log, DATA.catalog), np.ones(3, np.bool_), KEY, [WINDOW], heard.append)
    pool.census(WINDOW, DATA.catalog.digest())
    task = CountTask(window=WINDOW, clip_norm=bound)
    pool.run(replace(PLAN, task=task, slots=np.arange(12, 15)))
    assert np.allclose(heard[0].sent - heard[0].known, bound or 1.0)
