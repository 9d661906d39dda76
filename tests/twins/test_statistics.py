"""What clients tell about co-occurrence, against a plain loop over pairs; and the bound that privacy rests on."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrec.client.pool import LogPool
from fedrec.client.statistics import cooccurrence
from fedrec.data.batches import Cohort
from fedrec.data.log import InteractionLog
from fedrec.data.slices import LastWindow
from fedrec.errors import ProtocolError, TallyRefused
from fedrec.evaluation.asked import cooccurrence_shapes
from fedrec.models.configs import PopularityConfig
from fedrec.params import Params
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import CooccurrenceTask
from fedrec.protocol.triangle import packed, packed_place, unpacked
from fedrec.random import Key
from fedrec.server.spectral import added, grown_statistic, projected
from tests.support import dataset_of, small_rows

WINDOW = LastWindow(skip=0)
N_ITEMS, RANK = 9, 4
FEATURES = Key.from_seed(4).numpy().normal(size=(N_ITEMS, RANK)).astype(np.float32)
SHARES = {"item_share": 0.5, "feature_share": 0.5}


def log_of(histories: list[list[int]]) -> InteractionLog:
    user = np.repeat(np.arange(len(histories)), [len(h) for h in histories])
    item = np.array([item for h in histories for item in h], np.int64)
    return InteractionLog.from_rows(user, item, np.arange(len(item)), tuple(f"u{i}" for i in range(len(histories))))


def cohort_of(histories: list[list[int]], low: list[int] | None = None) -> Cohort:
    log, n = log_of(histories), len(histories)
    users = np.arange(n, dtype=np.int64)
    first = np.zeros(n, np.int64) if low is None else np.asarray(low, np.int64)
    return Cohort(log, users, users, first, log.counts.astype(np.int64))


def slow(task: CooccurrenceTask, history: list[int], low: int) -> dict[str, Any]:
    """Return one person's blocks, before they are told in whatever form, by looping over pairs of places."""
    m = np.zeros((N_ITEMS, N_ITEMS))
    first = max(0, len(history) - task.last)
    for a, b in itertools.permutations(range(first, len(history)), 2):
        if abs(a - b) <= task.lag and max(a, b) >= low:
            m[history[a], history[b]] += task.decay ** abs(a - b)
    small = FEATURES.T @ m @ FEATURES

    def scaled(block: np.ndarray, share: float) -> np.ndarray:
        norm = np.linalg.norm(block)
        return block * (math.sqrt(share) / norm if norm > 0 else 0.0)

    return {
        "items": scaled(packed(m), task.item_share),
        "features": scaled(packed(small), task.feature_share),
    }


HISTORIES = [[0, 1, 2, 3], [4], [5, 5, 6, 5], [8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3], [2, 2]]
LOWS = [[0, 0, 0, 0, 0], [2, 0, 1, 9, 1]]


@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("bounds", [{}, {"last": 3}, {"lag": 1}, {"lag": 2, "last": 5, "decay": 0.5}])
@pytest.mark.parametrize("sketch", ["pairs", "features"])
def test_the_sums_are_those_of_a_plain_loop(low: list[int], bounds: dict[str, Any], sketch: Any) -> None:
    shares = SHARES if sketch == "pairs" else {**SHARES, "item_share": 0.0}
    task = CooccurrenceTask(window=WINDOW, sketch=sketch, **shares, **bounds)
    tally = cooccurrence(task, cohort_of(HISTORIES, low), N_ITEMS, FEATURES)
    found = projected(FEATURES, tally.sums, tally.n_clients)
    expected = [slow(task, history, first) for history, first in zip(HISTORIES, low, strict=True)]
    names = {"items", "features"} - ({"items"} if sketch == "features" else set())
    assert found.keys() == names
    for name in names:
        np.testing.assert_allclose(found[name], sum(person[name] for person in expected), atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, N_ITEMS - 1), min_size=1, max_size=40),
    st.integers(0, 39),
    st.floats(0.05, 1.0),
    st.integers(1, 6),
)
def test_nobody_contributes_more_than_norm_one(history: list[int], low: int, decay: float, lag: int) -> None:
    first = min(low, len(history) - 1)
    for sketch, shares in (("pairs", SHARES), ("features", {**SHARES, "item_share": 0.0})):
        task = CooccurrenceTask(window=WINDOW, sketch=sketch, decay=decay, lag=lag, **shares)  # type: ignore[arg-type]
        tally = cooccurrence(task, cohort_of([history], [first]), N_ITEMS, FEATURES)
        statistic = projected(FEATURES, tally.sums, 1)
        length = math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in statistic.values()))
        assert length <= 1 + 1e-5


def test_people_add_up_whatever_blocks_they_are_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    task = CooccurrenceTask(window=WINDOW, **SHARES)
    together = cooccurrence(task, cohort_of(HISTORIES), N_ITEMS, FEATURES).sums
    monkeypatch.setattr("fedrec.client.statistics.AT_ONCE", 1)
    apart = cooccurrence(task, cohort_of(HISTORIES), N_ITEMS, FEATURES).sums
    for name in together:
        np.testing.assert_allclose(together[name], apart[name], atol=1e-5)


def test_more_than_the_clients_can_have_made_is_refused() -> None:
    task = CooccurrenceTask(window=WINDOW, **SHARES)
    tally = cooccurrence(task, cohort_of(HISTORIES), N_ITEMS, FEATURES)
    with pytest.raises(TallyRefused, match="more than 1 clients"):
        projected(FEATURES, {name: value * 50 for name, value in tally.sums.items()}, 1)


def test_a_single_client_sends_sparse_pairs_and_they_come_back_exactly() -> None:
    dataset = dataset_of(small_rows(n_users=40, n_items=900, n=4000))
    pool, digest, n = LogPool(dataset.log, dataset.catalog), dataset.catalog.digest(), len(dataset.catalog)
    features = Key.from_seed(2).numpy().normal(size=(n, 8)).astype(np.float32)
    task = CooccurrenceTask(window=WINDOW, **SHARES)
    plan = RoundPlan(
        0, 0, task, PopularityConfig(), n, {}, Key.from_seed(1), digest, np.array([3]), {"features": features}
    )
    tally = pool.run(RoundPlan.from_bytes(plan.to_bytes()))
    document = tally.to_bytes(plan.coding, pool.name)
    dense = sum(value.nbytes for value in tally.sums.values())
    assert len(document) < dense / 20
    back = Tally.from_bytes(document, plan.coding, cooccurrence_shapes(task, n, 8))
    for name, value in tally.sums.items():
        np.testing.assert_array_equal(back.sums[name], value)


def test_features_of_other_items_are_refused() -> None:
    task = CooccurrenceTask(window=WINDOW, **SHARES)
    for features in (None, FEATURES[:-1]):
        with pytest.raises(ProtocolError, match="no features"):
            cooccurrence(task, cohort_of(HISTORIES), N_ITEMS, features)
    with pytest.raises(ProtocolError, match="knows 3 items"):
        cooccurrence(task, cohort_of(HISTORIES), 3, FEATURES[:3])


@pytest.mark.parametrize(
    "wrong", [{"item_share": 0.9, "feature_share": 0.2}, {"sketch": "features", "item_share": 0.1}]
)
def test_shares_that_break_the_bound_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="share"):
        CooccurrenceTask(window=WINDOW, **wrong)


def test_packing_is_its_own_inverse_and_places_are_where_they_say() -> None:
    square = np.arange(25.0).reshape(5, 5)
    square = (square + square.T).astype(np.float32)
    flat = packed(square)
    np.testing.assert_array_equal(unpacked(flat, 5), square)
    for i, j in itertools.combinations_with_replacement(range(5), 2):
        assert flat[packed_place(np.array([i]), np.array([j]), 5)[0]] == square[i, j]


def test_a_grown_statistic_keeps_what_was_seen() -> None:
    task = CooccurrenceTask(window=WINDOW, **SHARES)
    tally = cooccurrence(task, cohort_of(HISTORIES), N_ITEMS, FEATURES)
    old: Params = projected(FEATURES, tally.sums, tally.n_clients)
    grown = grown_statistic(old, N_ITEMS, N_ITEMS + 3)
    np.testing.assert_array_equal(unpacked(grown["items"], N_ITEMS + 3)[:N_ITEMS, :N_ITEMS], unpacked(old["items"], 9))
    assert not unpacked(grown["items"], N_ITEMS + 3)[N_ITEMS:].any()
    doubled = added(grown, grown)
    np.testing.assert_allclose(doubled["features"], 2 * old["features"])
    assert added({}, old).keys() == old.keys()
