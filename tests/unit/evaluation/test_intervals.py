from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedrec.errors import DataError
from fedrec.evaluation.intervals import Estimate, contributions, difference, poisson_weights, summarise
from fedrec.evaluation.metrics import GROUPS, Group, PeopleMetrics, evaluate_people
from fedrec.evaluation.ranking import ItemLists
from fedrec.random import Key

KEY = Key.from_seed(11).child("evaluate", 4)


def one_metric(values: list[float], lists: list[list[int]] | None = None, n_items: int = 4) -> PeopleMetrics:
    everybody = Group(np.arange(len(values)), np.array(values, np.float64)[:, None])
    nobody = Group(np.array([], np.int64), np.zeros((0, 1)))
    groups = {"all": everybody, "returning": everybody, "new": nobody, "new_items": nobody}
    listed = np.array(lists or [[0]] * len(values), np.int64).reshape(len(values), -1 if values else 1)
    return PeopleMetrics(("mrr",), groups, listed, len(values), n_items)


def random_people(rows: np.ndarray) -> PeopleMetrics:
    generator = np.random.default_rng(6)
    scores = generator.normal(size=(60, 25)).astype(np.float32)
    known = generator.random((60, 25)) < 0.1
    known[::3] = False
    targets = generator.random((60, 25)) < 0.1
    who, what = np.nonzero(targets[rows])
    return evaluate_people(
        scores[rows],
        np.nonzero(known[rows]),
        ItemLists.from_pairs(who, what, len(rows)),
        20,
        (5, 10),
        attributes=np.eye(25),
        popularity=np.arange(25),
    )


def test_the_first_weight_is_one_and_the_others_are_the_clients_own() -> None:
    clients = np.array([5, 900, 17])
    weights = poisson_weights(KEY, clients, 40)
    assert weights.shape == (3, 41)
    assert weights.dtype == np.float64
    assert weights[:, 0].tolist() == [1.0, 1.0, 1.0]
    np.testing.assert_array_equal(poisson_weights(KEY, clients[1:2], 40)[0], weights[1])
    assert (weights[0] != weights[1]).any()
    assert (poisson_weights(KEY.child("other"), clients, 40) != weights).any()


def test_weights_invert_the_poisson_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    # P(W = 0) = P(W = 1) = 1/e = 0.36788, P(W <= 2) = 2.5/e = 0.91970.
    draws = np.array([[0.0, 0.367879, 0.367880, 0.735758, 0.735759, 0.919698, 0.919699, 1 - 2.0**-53]])
    monkeypatch.setattr(Key, "uniforms", lambda *_: draws)
    weights = poisson_weights(KEY, np.array([0]), draws.shape[1])
    assert weights[0, 1:8].tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert 15 < weights[0, 8] < 20


def test_sums_add_up_over_any_split_of_people() -> None:
    everybody = np.arange(60)
    clients = everybody * 7 + 3
    whole = contributions(random_people(everybody), poisson_weights(KEY, clients, 30))
    parts = np.split(np.random.default_rng(1).permutation(60), [1, 9, 40])
    split = [contributions(random_people(rows), poisson_weights(KEY, clients[rows], 30)) for rows in parts]
    for name, total in whole.items():
        assert {part[name].shape for part in split} == {total.shape}
        assert {part[name].dtype for part in split} == {total.dtype}
        np.testing.assert_allclose(sum(part[name] for part in split), total, rtol=1e-12, atol=1e-12)
    assert set(whole) == {"recommended", *(f"{what}.{group}" for what in ("sum", "weight") for group in GROUPS)}


def test_contributions_by_hand() -> None:
    weights = np.array([[1.0, 0.0, 2.0], [1.0, 3.0, 1.0]])
    sums = contributions(one_metric([0.5, 0.25], [[0, 2], [2, -1]]), weights)
    assert sums["sum.all"].tolist() == [[0.75], [0.75], [1.25]]
    assert sums["weight.all"].tolist() == [2.0, 3.0, 3.0]
    assert sums["recommended"].tolist() == [1, 0, 2, 0]
    assert sums["recommended"].dtype == np.int64
    assert sums["sum.new"].tolist() == [[0.0], [0.0], [0.0]]


def test_sums_of_many_people_lose_no_digit() -> None:
    # In float32 the sum of 2**24 + 1 ones is 2**24.
    weights = np.array([[2.0**24], [1.0]])
    sums = contributions(one_metric([1.0, 1.0]), weights.astype(np.float32))
    assert sums["sum.all"][0, 0] == sums["weight.all"][0] == 2**24 + 1


def test_a_summary_is_the_plain_mean_with_percentiles() -> None:
    values = np.random.default_rng(2).random(200)
    weights = poisson_weights(KEY, np.arange(200), 300)
    found = summarise(contributions(one_metric(values.tolist()), weights), ("mrr",))
    replicates = (weights[:, 1:] * values[:, None]).sum(0) / weights[:, 1:].sum(0)
    estimate = found["all"]["mrr"]
    assert estimate.value == pytest.approx(values.mean())
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(replicates, [0.025, 0.975])))
    assert estimate.n == 200


def test_groups_without_people_are_absent_and_the_catalogue_is_under_all() -> None:
    sums = contributions(one_metric([0.5, 1.0], [[0, 1], [0, 2]]), poisson_weights(KEY, np.arange(2), 50))
    found = summarise(sums, ("mrr",))
    assert list(found) == ["all", "returning"]
    assert found["all"]["coverage"] == Estimate(0.75, None, None, 2)
    assert found["all"]["gini"] == Estimate(3 / 8, None, None, 2)
    assert list(found["returning"]) == ["mrr"]


def test_the_sampled_group_is_summed_and_summarised_where_there_is_one() -> None:
    people = one_metric([0.5, 1.0])
    few = Group(np.arange(2), np.array([[0.75], [1.0]]))
    weights = poisson_weights(KEY, np.arange(2), 20)
    sums = contributions(replace(people, groups={**people.groups, "sampled": few}), weights)
    assert sums["sum.sampled"].shape == (21, 1)
    found = summarise(sums, ("mrr",))
    assert list(found) == ["all", "returning", "sampled"]
    assert found["sampled"]["mrr"].value == 0.875
    assert difference(sums, sums, ("mrr",), "mrr", group="sampled").value == 0.0


def test_nobody_at_all_gives_no_summary() -> None:
    assert summarise(contributions(one_metric([]), poisson_weights(KEY, np.arange(0), 5)), ("mrr",)) == {}


@pytest.mark.parametrize(("values", "replicates"), [([0.5], 100), ([0.5, 0.7], 0)])
def test_there_is_no_interval_without_variation(values: list[float], replicates: int) -> None:
    weights = poisson_weights(KEY, np.arange(len(values)), replicates)
    estimate = summarise(contributions(one_metric(values), weights), ("mrr",))["all"]["mrr"]
    assert (estimate.low, estimate.high) == (None, None)
    assert estimate.value == pytest.approx(np.mean(values))


def test_replicates_that_draw_nobody_are_left_out() -> None:
    weights = np.array([[1.0, 0.0, 1.0, 2.0], [1.0, 0.0, 1.0, 0.0]])
    estimate = summarise(contributions(one_metric([0.0, 1.0]), weights), ("mrr",))["all"]["mrr"]
    # The replicates that count are 0.5 and 0: percentiles interpolate between them.
    assert (estimate.low, estimate.high) == pytest.approx((0.0125, 0.4875))


def test_a_difference_is_taken_replicate_by_replicate() -> None:
    weights = poisson_weights(KEY, np.arange(50), 200)
    values = np.random.default_rng(3).random(50)
    a = contributions(one_metric((values + 0.125).tolist()), weights)
    b = contributions(one_metric(values.tolist()), weights)
    found = difference(a, b, ("mrr",), "mrr")
    assert (found.value, found.low, found.high, found.n) == pytest.approx((0.125, 0.125, 0.125, 50))
    assert difference(b, a, ("mrr",), "mrr", group="returning").value == pytest.approx(-0.125)


def test_mistakes_are_named() -> None:
    people = one_metric([0.5, 0.7])
    a = contributions(people, poisson_weights(KEY, np.arange(2), 9))
    other_key = contributions(people, poisson_weights(KEY.child("b"), np.arange(2), 9))
    fewer = contributions(people, poisson_weights(KEY, np.arange(2), 8))
    for b in (other_key, fewer):
        with pytest.raises(DataError, match="evaluate both on the same people with the same key"):
            difference(a, b, ("mrr",), "mrr")
    with pytest.raises(DataError, match=r"no metric 'mr' .*; did you mean 'mrr'"):
        difference(a, a, ("mrr",), "mr")
    with pytest.raises(DataError, match="Nobody is in the group 'new'"):
        difference(a, a, ("mrr",), "mrr", group="new")
    with pytest.raises(DataError, match="no group 'returnin'; did you mean 'returning'"):
        difference(a, a, ("mrr",), "mrr", group="returnin")
    with pytest.raises(DataError, match=r"shape \[10, 1\], but 9 replicates of 2 metrics need \[10, 2\]"):
        summarise(a, ("mrr", "auc"))
    with pytest.raises(DataError, match="metrics of 2 people and weights of 3"):
        contributions(people, poisson_weights(KEY, np.arange(3), 9))
