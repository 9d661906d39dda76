"""Several worker processes give what one process gives."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedrec.client.pool import LogPool
from fedrec.client.workers import WorkerPool
from fedrec.data.log import InteractionLog
from fedrec.data.slices import LastWindow
from fedrec.data.synthetic import sequential
from fedrec.errors import ProtocolError, RunError
from fedrec.models.build import build
from fedrec.models.configs import FactorisationConfig, PopularityConfig, TransformerConfig
from fedrec.models.recommender import get_params
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import CountTask, FitTask, LocalTraining
from fedrec.random import Key

KEY = Key.from_seed(3)
DATA = sequential(n_users=90, n_items=40, length=12, key=KEY)
WINDOW = LastWindow(skip=1)


def plan_to_fit(model: FactorisationConfig | TransformerConfig, slots: list[int]) -> RoundPlan:
    params = get_params(build(model, 40, KEY))
    task = FitTask(window=WINDOW, local=LocalTraining(steps=2, learning_rate=0.3, clip_norm=0.5))
    return RoundPlan(0, 0, task, model, 40, params, KEY, DATA.catalog.digest(), np.array(slots, np.int64))


@pytest.fixture(scope="module")
def workers() -> WorkerPool:
    with WorkerPool(DATA.log, DATA.catalog, 2) as pool:
        yield pool


@pytest.mark.parametrize(
    "model", [FactorisationConfig(dim=8), TransformerConfig(dim=8, length=8)], ids=lambda m: m.kind
)
def test_two_workers_add_up_to_one_process(workers: WorkerPool, model: FactorisationConfig | TransformerConfig) -> None:
    plan = plan_to_fit(model, list(range(3, 90, 2)))
    one, two = LogPool(DATA.log, DATA.catalog).run(plan), workers.run(plan)
    assert two.n_clients == one.n_clients == 44
    assert two.stats == pytest.approx(one.stats)
    for name, value in one.sums.items():
        np.testing.assert_allclose(two.sums[name], value, rtol=1e-4, atol=1e-6)


def test_counts_and_census_are_the_same(workers: WorkerPool) -> None:
    alone = LogPool(DATA.log, DATA.catalog)
    digest = DATA.catalog.digest()
    assert workers.census(WINDOW, digest) == alone.census(WINDOW, digest) == 90
    task = CountTask(window=WINDOW)
    plan = RoundPlan(0, 0, task, PopularityConfig(), 40, {}, KEY, digest, np.arange(90))
    np.testing.assert_array_equal(workers.run(plan).sums["counts"], alone.run(plan).sums["counts"])


@pytest.mark.parametrize("n", [3, 60], ids=["one worker", "both workers"])
def test_what_a_worker_refuses_is_refused_and_the_next_plan_works(workers: WorkerPool, n: int) -> None:
    plan = plan_to_fit(FactorisationConfig(dim=8), list(range(n)))
    with pytest.raises(ProtocolError, match="catalogue"):
        workers.run(replace(plan, catalog_digest="0" * 64))
    assert workers.run(plan).n_clients == n


@pytest.mark.parametrize("slots", [[0, 90], [-1, 3]], ids=str)
def test_clients_that_are_not_there_are_refused_as_by_one_process(workers: WorkerPool, slots: list[int]) -> None:
    plan = plan_to_fit(FactorisationConfig(dim=8), slots)
    for pool in (workers, LogPool(DATA.log, DATA.catalog)):
        with pytest.raises(ProtocolError, match=f"names clients {slots[0]} to {slots[1]} of 90 eligible"):
            pool.run(plan)


def test_a_log_on_disk_is_mapped_and_not_copied(tmp_path: Path) -> None:
    DATA.log.save(tmp_path / "log")
    with WorkerPool(InteractionLog.load(tmp_path / "log"), DATA.catalog, 1) as pool:
        assert not (pool._folder / "log").exists()
        assert pool.run(plan_to_fit(FactorisationConfig(dim=8), [1, 2, 3])).n_clients == 3
    assert not pool._folder.exists()


def test_a_killed_worker_is_one_sentence() -> None:
    with WorkerPool(DATA.log, DATA.catalog, 1) as pool:
        os.kill(pool._workers[0]._process.pid, signal.SIGKILL)
        pool._workers[0]._process.wait()
        with pytest.raises(RunError, match="A worker process died"):
            pool.run(plan_to_fit(FactorisationConfig(dim=8), [1, 2, 3]))
