"""Rules that a minority of lying nodes cannot bend, against Flower's own where it has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedrec.errors import ConfigError
from fedrec.learning import Bounded, Krum, Mean, Median, TrimmedMean
from fedrec.protocol.tally import Tally
from fedrec.random import Key
from fedrec.server.robust import combined, in_line, krum, many_sided, robust_mean, shortened, shortened_rows
from tests.support import small_experiment

N = 20
RANDOM = Key.from_seed(5).numpy()
UPDATES = [{"item": RANDOM.normal(1.0, 0.3, (6, 3)), "start": RANDOM.normal(1.0, 0.3, 3)} for _ in range(N)]
ONES = np.ones(N)
ROWS = frozenset({"item"})
RULES = [Median(), TrimmedMean(share=0.2), Krum(share=0.2), Bounded()]


def lied(n: int, change: Any) -> list[dict[str, np.ndarray]]:
    return [change(update) for update in UPDATES[:n]] + UPDATES[n:]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("factor", [1e6, -1e6, -1.0])
def test_a_minority_hardly_moves_the_mean(rule: Any, factor: float) -> None:
    honest = robust_mean(UPDATES[4:], ONES[4:], Mean(), ROWS)
    liars = lied(4, lambda update: {name: factor * value for name, value in update.items()})
    found = robust_mean(liars, ONES, rule, ROWS)
    usual = np.linalg.norm(honest["item"])
    assert np.linalg.norm(found["item"] - honest["item"]) < 0.65 * usual
    assert np.linalg.norm(robust_mean(liars, ONES, Mean(), ROWS)["item"] - honest["item"]) > 0.35 * usual


def test_where_flower_has_the_rule_the_numbers_are_the_same() -> None:
    aggregate = pytest.importorskip("flwr.server.strategy.aggregate")
    results = [([update["item"], update["start"]], 1) for update in UPDATES]

    def same(found: dict[str, np.ndarray], theirs: list[np.ndarray]) -> None:
        np.testing.assert_allclose(found["item"], theirs[0], rtol=1e-6)
        np.testing.assert_allclose(found["start"], theirs[1], rtol=1e-6)

    same(robust_mean(UPDATES, ONES, Median(), ROWS), aggregate.aggregate_median(results))
    same(robust_mean(UPDATES, ONES, TrimmedMean(share=0.2), ROWS), aggregate.aggregate_trimmed_avg(results, 0.2))
    one = Krum(share=0.2, multi=False)
    same(robust_mean(UPDATES, ONES, one, ROWS), aggregate.aggregate_krum(results, 4, 0))


def test_krum_leaves_out_who_stands_apart() -> None:
    liars = lied(3, lambda update: {name: value + 9.0 for name, value in update.items()})
    assert krum(liars, Krum(share=0.15)) == list(range(3, N))
    assert krum(UPDATES[:1], Krum()) == [0]


def test_who_pushes_one_way_together_is_left_out_however_short_the_push() -> None:
    random = Key.from_seed(6).numpy()
    honest = [{"item": random.normal(0.02, 1.0, (40, 5))} for _ in range(45)]
    push = {"item": -10 * np.mean([update["item"] for update in honest], axis=0)}
    liars = [{"item": push["item"] * np.sqrt(200) / np.linalg.norm(push["item"])} for _ in range(5)]
    updates = [*liars, *honest]
    assert in_line(updates, 0.1, 2.0) == list(range(5, 50))
    assert in_line(updates, 0.0, 2.0) == list(range(50))
    assert in_line(honest, 0.1, 2.0) == list(range(45)), "nobody is left out where nothing stands out"
    assert in_line(honest[:1], 0.4, 2.0) == [0]
    ones, rule = np.ones(50), Bounded(left_out=0.1)
    mean = robust_mean(honest, ones[5:], Mean(), ROWS)["item"]
    for settings, worst in ((rule, 0.3), (Bounded(left_out=0.0), np.inf)):
        found = robust_mean(updates, ones, settings, ROWS)["item"]
        apart = np.linalg.norm(found - mean) / np.linalg.norm(mean)
        assert apart < worst
    assert apart > 0.6, "without it, five of fifty undo most of what the others learnt"


def test_who_sends_little_but_one_item_is_left_out() -> None:
    def promoted(update: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        item = update["item"] * 0.1
        item[2] = np.linalg.norm(update["item"])
        return {"item": item, "start": update["start"] * 0.1}

    assert many_sided(lied(1, promoted), 2.0, ROWS) == list(range(1, N))
    assert many_sided(UPDATES, 2.0, ROWS) == list(range(N))
    assert many_sided(lied(1, promoted), 1e6, ROWS) == list(range(N))
    assert many_sided(lied(1, promoted), 2.0, {"user"}) == list(range(N)), "a model without rows of items"
    honest = robust_mean(UPDATES[1:], ONES[1:], Bounded(), ROWS)["item"]
    np.testing.assert_allclose(robust_mean(lied(1, promoted), ONES, Bounded(), ROWS)["item"], honest)


def test_some_who_promote_one_item_together_are_left_out_before_rows_are_shortened() -> None:
    random = Key.from_seed(7).numpy()
    honest = [{"item": random.normal(0.0, 1.0, (40, 5)) * (random.random((40, 1)) < 0.3)} for _ in range(45)]
    push = np.zeros((40, 5))
    push[7] = 14.0
    liars = [{"item": push + random.normal(0.0, 0.1, (40, 5))} for _ in range(5)]

    def lifted(rule: Bounded) -> float:
        return float(np.linalg.norm(robust_mean([*liars, *honest], np.ones(50), rule, ROWS)["item"][7]))

    many = 1e6  # nobody is left out for being about one item alone
    assert lifted(Bounded(one_item=many)) < 0.5 * lifted(Bounded(one_item=many, left_out=0.0))
    alone = Bounded(one_item=many, left_out=0.0, item_factor=2.0)
    assert lifted(alone) < 0.9 * lifted(Bounded(one_item=many, left_out=0.0))


def test_one_item_is_not_lifted_beyond_what_is_usual() -> None:
    def promoted(update: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        item = np.zeros_like(update["item"])
        item[2] = np.linalg.norm(update["item"])  # the whole norm on one item
        return {**update, "item": item}

    liars = lied(2, promoted)
    found = shortened_rows(shortened(liars, 2.0), 1.5, ROWS)
    usual = np.median([np.linalg.norm(update["item"][2]) for update in found[2:]])
    assert np.linalg.norm(found[0]["item"][2]) <= 1.5 * usual * 1.1
    assert np.linalg.norm(liars[0]["item"][2]) > 3 * usual
    np.testing.assert_array_equal(found[5]["start"], UPDATES[5]["start"] * 1.0)  # who is usual is left as is


def test_the_sum_stands_for_all_clients_and_weights_count_only_in_means() -> None:
    tallies = [Tally({"item": np.full((2, 1), 3.0 * n, np.float32)}, n, {}) for n in (1, 2, 5)] + [Tally({}, 0, {})]
    for rule in (Mean(), *RULES):
        found = combined(tallies, rule, ROWS)["item"]
        np.testing.assert_allclose(found, 8 * 3.0, rtol=1e-6)
        assert found.dtype == np.float32
    assert combined([Tally({}, 0, {})], Median(), ROWS) == {}


@pytest.mark.parametrize("mode", ["central", "distributed"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"training__aggregate": {"kind": "median"}}, "looks at single updates, which privacy.mode"),
        ({"training__over_selection": 0.5}, "the ledger accounts for the cohort that is asked"),
        ({"training__minimum_share": 0.5}, "leave training.over_selection and training.minimum_share at 0"),
    ],
)
def test_what_masks_or_the_ledger_forbid_is_refused_by_the_settings(mode: str, change: Any, says: str) -> None:
    with pytest.raises((ConfigError, ValidationError)) as caught:
        small_experiment(privacy={"mode": mode, "epsilon": 4.0, "delta": 1e-5}, **change)
    assert says in str(caught.value)
    small_experiment(**change)
