"""Clients that trust nobody: what leaves them is noised by themselves, paid for by themselves, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.client.budget import LocalBudget
from fedrec.client.local import count_locally, fit_locally
from fedrec.client.pool import LogPool
from fedrec.client.trainer import train_each
from fedrec.client.workers import WorkerPool
from fedrec.data.slices import LastWindow
from fedrec.errors import PrivacyError, ProtocolError
from fedrec.models.build import build
from fedrec.models.configs import FactorisationConfig, PopularityConfig
from fedrec.models.recommender import get_params
from fedrec.params import norm
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.privacy.local import replacing, upload_bound
from fedrec.privacy.settings import LocalNoise, LocalPrivacy, UserUnit, WindowUnit
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import AnyTask, CooccurrenceTask, CountTask, FitTask, LocalTraining
from fedrec.random import Key
from tests.support import dataset_of, small_rows

DATASET = dataset_of(small_rows())
N_ITEMS = len(DATASET.catalog)
KEY = Key.from_seed(5)
WINDOW = LastWindow(skip=2)
MODEL = FactorisationConfig(dim=4, length=8, targets=5, negatives=6)


def settings(**changes: Any) -> LocalPrivacy:
    given: dict[str, Any] = {"epsilon": 1e15, "delta": 1e-3, "noise": "seed", "metrics": "research"}
    return LocalPrivacy.model_validate({**given, **changes})


def plan_of(task: AnyTask, n: int = 6, key: Key = KEY, number: int = 0) -> RoundPlan:
    fit = isinstance(task, FitTask)
    params = get_params(build(MODEL, N_ITEMS, Key.from_seed(1))) if fit else {}
    slots = np.arange(n, dtype=np.int64)
    kind = MODEL if fit else PopularityConfig()
    return RoundPlan(0, number, task, kind, N_ITEMS, params, key, DATASET.catalog.digest(), slots)


def fit(noise: float, unit: UserUnit | WindowUnit | None = None, source: Any = "seed", clip: float = 10.0) -> FitTask:
    local = LocalTraining(learning_rate=0.5, clip_norm=clip)
    asked = LocalNoise(unit=unit or UserUnit(), noise_multiplier=noise, noise=source)
    return FitTask(window=WINDOW, local=local, private=asked)


def count(noise: float, clip: float | None = 2.0) -> CountTask:
    asked = LocalNoise(unit=UserUnit(), noise_multiplier=noise, noise="seed")
    return CountTask(window=WINDOW, clip_norm=clip, private=asked)


def pool_of(own: LocalPrivacy | None, folder: Path | None = None) -> LogPool:
    return LogPool(DATASET.log, DATASET.catalog, budget=None if own is None else LocalBudget(own, folder))


def test_with_next_to_no_noise_updates_and_counts_are_the_exact_ones() -> None:
    for clip in (10.0, 0.05):
        quiet = pool_of(settings()).run(plan_of(fit(1e-6, clip=clip)))
        exact = pool_of(None).run(plan_of(FitTask(window=WINDOW, local=fit(1.0, clip=clip).local)))
        assert quiet.n_clients == exact.n_clients == 6
        np.testing.assert_allclose(quiet.sums["item"], exact.sums["item"], rtol=0, atol=6 * 2 * clip * 1e-6 * 6**0.5)
        assert quiet.stats == {"spent": 0.0}, "a loss or a number of clips would be exact"
    counted = pool_of(settings()).run(plan_of(count(1e-6)))
    bounded = pool_of(None).run(plan_of(CountTask(window=WINDOW, clip_norm=2.0)))
    np.testing.assert_allclose(counted.sums["counts"], bounded.sums["counts"], atol=1e-3)
    assert counted.stats == {"spent": 0.0}


class Silence:
    label = "none"

    def normal(self, shape: Any) -> Any:
        return np.zeros(tuple(shape))

    def discrete_gaussian(self, sigma: float, shape: Any) -> Any:
        return np.zeros(tuple(shape), np.int64)


def test_below_the_noise_lie_clipped_contributions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalBudget, "source", lambda self, secret: Silence())
    for clip in (10.0, 0.05):  # with noise of 3 the bound of an upload is far off, so it cannot stand in for the clip
        local = fit(3.0, clip=clip).local
        exact = pool_of(None).run(plan_of(FitTask(window=WINDOW, local=local)))
        assert (exact.stats["clipped"] > 0) == (clip == 0.05)
        below = pool_of(settings()).run(plan_of(fit(3.0, clip=clip)))
        np.testing.assert_allclose(below.sums["item"], exact.sums["item"], rtol=0, atol=1e-6)
    bounded = pool_of(None).run(plan_of(CountTask(window=WINDOW, clip_norm=2.0)))
    assert bounded.stats["clipped"] > 0
    below = pool_of(settings()).run(plan_of(count(3.0)))
    np.testing.assert_allclose(below.sums["counts"], bounded.sums["counts"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", ["seed", "system"])
def test_every_client_adds_noise_of_twice_its_clip(source: Any) -> None:
    pool, quiet = pool_of(settings(noise=source)), pool_of(settings())
    below = quiet.run(plan_of(fit(1e-6, clip=0.5))).sums["item"].astype(np.float64)
    errors = np.concatenate(
        [
            (pool.run(plan_of(fit(3.0, source=source, clip=0.5), number=n)).sums["item"] - below).ravel()
            for n in range(25)
        ]
    )
    sigma = 2 * 0.5 * 3.0 * np.sqrt(6)
    assert errors.std() == pytest.approx(sigma, rel=6 / np.sqrt(2 * len(errors)))
    assert abs(errors.mean()) < 6 * sigma / np.sqrt(len(errors))
    assert (errors**4).mean() / errors.var() ** 2 == pytest.approx(3.0, abs=6 * np.sqrt(24 / len(errors)))


def test_the_noise_of_two_clients_two_rounds_and_two_attempts_is_not_the_same() -> None:
    pool = pool_of(settings())
    quiet = pool_of(settings()).run(plan_of(count(1e-6), n=1)).sums["counts"]
    plans = [plan_of(count(3.0), n=1), plan_of(count(3.0), n=1), plan_of(count(3.0), n=1, key=KEY.child("another"))]
    noises = [pool.run(plan).sums["counts"] - quiet for plan in plans]
    noises.append(pool_of(settings()).run(plan_of(count(3.0), n=2)).sums["counts"] - noises[0])
    for a in range(len(noises)):
        for b in range(a):
            assert abs(np.corrcoef(noises[a], noises[b])[0, 1]) < 0.6
    again = pool_of(settings()).run(plans[0]).sums["counts"]
    np.testing.assert_array_equal(again - quiet, noises[0])


def test_a_client_stops_when_its_own_budget_is_spent_and_others_go_on(tmp_path: Path) -> None:
    mechanism = replacing(2.0, 2.0)
    probe = PrivacyLedger(None, epsilon=None, delta=1e-3)
    for _ in range(3):
        probe.charge("round", mechanism.event())
    own = settings(epsilon=probe.spent())
    for folder in (None, tmp_path):  # in memory, and opened anew for every charge
        pool = pool_of(own, folder)
        asked = [2, 2, 4, 6, 6]
        found = [pool.run(plan_of(count(2.0), n=n)) for n in asked]
        assert [tally.n_clients for tally in found] == [2, 2, 4, 4, 4]
        assert [tally.stats["spent"] for tally in found] == [0.0, 0.0, 0.0, 2.0, 2.0]
        nobody = pool.run(plan_of(count(2.0), n=2))
        assert (nobody.sums, nobody.n_clients, nobody.stats) == ({}, 0, {"spent": 2.0})
        assert pool.budget is not None
        assert pool.budget.spent(0) == pytest.approx(own.epsilon)
    assert pool_of(own, tmp_path).run(plan_of(count(2.0), n=2)).n_clients == 0, "a new process starts a new budget"
    ledger = PrivacyLedger.read(tmp_path / "client-000000.jsonl")
    assert [entry.attempt for entry in ledger.entries()] == [1, 2, 3]
    assert (ledger.unit, ledger.adjacency) == ("user", "replace one person's whole history by any other")


def test_a_ledger_of_another_unit_is_refused(tmp_path: Path) -> None:
    pool_of(settings(), tmp_path).run(plan_of(count(2.0)))
    with pytest.raises(PrivacyError, match="protects the unit 'user'"):
        pool_of(settings(unit={"kind": "window"}), tmp_path).run(plan_of(count(2.0)))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (FitTask(window=WINDOW), "without the noise"),
        (CountTask(window=WINDOW, clip_norm=1.0), "without the noise"),
        (count(2.0, clip=None), "not bounded"),
        (fit(2.0, source="system"), "without the noise"),
        (fit(2.0, unit=WindowUnit()), "other settings than these clients' own"),
        (CooccurrenceTask(window=WINDOW), "no co-occurrence statistic"),
    ],
)
def test_a_plan_that_asks_for_less_than_clients_insist_on_is_refused(task: AnyTask, message: str) -> None:
    pool = pool_of(settings())
    with pytest.raises(PrivacyError, match=message):
        pool.run(plan_of(task))
    assert pool.budget is not None
    assert pool.budget.spent(0) == 0.0


def test_clients_without_a_ledger_refuse_to_pretend() -> None:
    with pytest.raises(ProtocolError, match="no ledger"):
        pool_of(None).run(plan_of(fit(2.0)))


def test_tiny_noise_costs_the_whole_budget_so_a_server_gains_nothing_by_asking_for_it() -> None:
    tally = pool_of(settings(epsilon=8.0)).run(plan_of(fit(1e-3)))
    assert (tally.n_clients, tally.sums) == (0, {})


def test_uploads_stay_within_what_the_server_checks() -> None:
    own, task = settings(unit={"kind": "window", "length": 3, "sampling": 1.0}), fit(0.5, clip=1e-6)
    asked = LocalNoise(unit=own.unit, noise_multiplier=0.5, noise="seed")
    windowed = task.model_copy(update={"private": asked})
    budget = LocalBudget(own)
    cohort = pool_of(own)._eligible(WINDOW).take(slice(0, 1))
    tally = fit_locally(plan_of(windowed), windowed, asked, cohort, budget, train_each)
    bound = upload_bound(1e-6, 0.5 * 1.0 * 0.5, N_ITEMS * 4)
    assert 0 < norm(tally.sums) <= bound * (1 + 1e-6)
    counted = count_locally(plan_of(count(2.0)), count(2.0), LocalNoise(unit=UserUnit(), noise_multiplier=2.0), cohort,
                            budget)  # fmt: skip
    assert 0 < norm(counted.sums) <= upload_bound(2.0, 8.0, N_ITEMS)


@pytest.mark.slow
def test_worker_processes_share_the_clients_ledgers(tmp_path: Path) -> None:
    own = settings(noise="seed")
    with pytest.raises(PrivacyError, match="in a folder only"):
        WorkerPool(DATASET.log, DATASET.catalog, 2, budget=LocalBudget(own))
    n = 20
    with WorkerPool(DATASET.log, DATASET.catalog, 2, budget=LocalBudget(own, tmp_path)) as workers:
        shared = workers.run(plan_of(count(2.0), n=n))
    alone = pool_of(own).run(plan_of(count(2.0), n=n))
    np.testing.assert_allclose(shared.sums["counts"], alone.sums["counts"], rtol=1e-4, atol=1e-3)
    assert len(list(tmp_path.iterdir())) == n
