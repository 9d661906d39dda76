from __future__ import annotations

import math

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, P, R, Success, nDCG

from fedrec.errors import ConfigError, DataError
from fedrec.evaluation.metrics import GROUPS, PeopleMetrics, evaluate_people, metric_names, per_person
from fedrec.evaluation.ranking import ItemLists, Known, rank_targets, sampled_ranks
from fedrec.random import Key

NOBODY_KNOWS = (np.array([], np.int64), np.array([], np.int64))


def lists(*people: list[int]) -> ItemLists:
    offsets = np.cumsum([0, *(len(items) for items in people)])
    return ItemLists(offsets, np.array([item for items in people for item in items], np.int64))


def evaluate(
    scores: np.ndarray, known: Known, targets: ItemLists, n_known_items: int, ks: tuple[int, ...] = (2,)
) -> PeopleMetrics:
    n = scores.shape[1]
    return evaluate_people(
        scores, known, targets, n_known_items, ks, attributes=np.eye(n, dtype=np.float32), popularity=np.ones(n)
    )


def column(people: PeopleMetrics, group: str, name: str) -> list[float]:
    return people.groups[group].values[:, people.names.index(name)].tolist()


def test_metrics_by_hand() -> None:
    # Items by score: 4, 3, 2, 1, 0. Targets 3 and 0 have ranks 2 and 5 of 5; the three others are 4, 2, 1.
    scores = np.array([[1, 2, 3, 4, 5]], np.float32)
    values, judged = per_person(rank_targets(scores, NOBODY_KNOWS, lists([0, 3])), (3,))
    assert judged.tolist() == [True]
    expected = {
        "hr@3": 1.0,
        "recall@3": 1 / 2,
        "precision@3": 1 / 3,
        "ndcg@3": (1 / math.log2(3)) / (1 + 1 / math.log2(3)),
        "mrr@3": 1 / 2,
        "mrr": 1 / 2,
        "auc": (2 / 3 + 0) / 2,
    }
    assert {name: value[0] for name, value in values.items()} == pytest.approx(expected)


def test_a_hit_below_the_cut_counts_only_without_one() -> None:
    values, _ = per_person(rank_targets(np.array([[1, 2, 3]], np.float32), NOBODY_KNOWS, lists([0])), (2,))
    assert {name: value[0] for name, value in values.items()} == pytest.approx(
        {"hr@2": 0, "recall@2": 0, "precision@2": 0, "ndcg@2": 0, "mrr@2": 0, "mrr": 1 / 3, "auc": 0}
    )


def test_equal_scores_are_worth_nothing() -> None:
    values, _ = per_person(rank_targets(np.zeros((1, 50), np.float32), NOBODY_KNOWS, lists([7])), (10,))
    assert values["auc"].tolist() == [0.0]
    assert values["mrr"].tolist() == [1 / 50]


def test_nothing_can_be_ranked_wrongly_where_all_candidates_are_targets() -> None:
    values, _ = per_person(rank_targets(np.zeros((1, 2), np.float32), NOBODY_KNOWS, lists([0, 1])), (5,))
    assert values["auc"].tolist() == values["ndcg@5"].tolist() == [1.0]


def test_people_without_a_target_are_marked() -> None:
    scores = np.array([[1, 2], [1, 2]], np.float32)
    known = (np.array([0]), np.array([1]))
    values, judged = per_person(rank_targets(scores, known, lists([1], [1])), (1,))
    assert judged.tolist() == [False, True]
    assert all(math.isnan(value[0]) and not math.isnan(value[1]) for value in values.values())


def test_metrics_agree_with_an_independent_library() -> None:
    generator = np.random.default_rng(3)
    b, n, ks = 40, 30, (1, 5, 10)
    # A permutation has no ties: the library would break them in its own way.
    scores = np.stack([generator.permutation(n) for _ in range(b)]).astype(np.float32)
    targets = lists(*(generator.choice(n, generator.integers(1, 8), replace=False).tolist() for _ in range(b)))
    values, _ = per_person(rank_targets(scores, NOBODY_KNOWS, targets), ks)
    theirs = {"hr": Success, "ndcg": nDCG, "recall": R, "precision": P, "mrr": RR}
    names = {measure @ k: f"{name}@{k}" for name, measure in theirs.items() for k in ks}
    # The provider computes reciprocal ranks only without a cut-off.
    wanted = {measure: name for measure, name in names.items() if not name.startswith("mrr")} | {RR: "mrr"}
    pairs = zip(targets.rows, targets.items, strict=True)
    truth = [ir_measures.Qrel(str(person), str(item), 1) for person, item in pairs]
    run = [ir_measures.ScoredDoc(str(u), str(i), float(scores[u, i])) for u in range(b) for i in range(n)]
    compared = 0
    for found in ir_measures.pytrec_eval.iter_calc(list(wanted), truth, run):
        assert values[wanted[found.measure]][int(found.query_id)] == pytest.approx(found.value, abs=1e-9)
        compared += 1
    assert compared == b * len(wanted)
    first = 1 / values["mrr"]
    for k in ks:
        np.testing.assert_allclose(values[f"mrr@{k}"], np.where(first <= k, values["mrr"], 0.0))


def test_groups_are_told_apart_by_history() -> None:
    scores = np.array([[4, 3, 2, 1], [4, 3, 2, 1], [4, 3, 2, 1], [4, 3, 2, 1]], np.float32)
    known = (np.array([0, 2]), np.array([0, 3]))
    people = evaluate(scores, known, lists([1], [1], [3], [2]), n_known_items=4)
    members = {name: people.groups[name].people.tolist() for name in GROUPS}
    assert members == {"all": [0, 1, 3], "returning": [0], "new": [1, 3], "new_items": []}
    assert column(people, "all", "mrr") == pytest.approx([1, 1 / 2, 1 / 3])
    assert column(people, "returning", "mrr") == pytest.approx([1])
    assert column(people, "new", "mrr") == pytest.approx([1 / 2, 1 / 3])
    assert people.groups["new_items"].values.shape == (0, len(people.names))
    assert people.lists.tolist() == [[1, 2], [0, 1], [0, 1]]


def test_new_items_are_judged_alone() -> None:
    # Items 3 and 4 are new. Person 0 chose 0, 2 (old) and 3 (new): with 0 and 2 out of the way, 3 is second to item 1.
    scores = np.array([[9, 8, 7, 6, 5], [9, 8, 7, 6, 5], [1, 2, 3, 4, 5]], np.float32)
    people = evaluate(scores, NOBODY_KNOWS, lists([0, 2, 3], [0], [4, 3]), n_known_items=3)
    assert people.groups["new_items"].people.tolist() == [0, 2]
    assert column(people, "new_items", "mrr") == pytest.approx([1 / 2, 1])
    assert column(people, "new_items", "recall@2") == pytest.approx([1, 1])
    # Person 0: of the two others (1 and 4), 3 beats item 4. Person 2: both new items beat everything.
    assert column(people, "new_items", "auc") == pytest.approx([1 / 2, 1])
    assert column(people, "all", "recall@2") == pytest.approx([1 / 3, 1, 1])
    on_list = [people.names.index(name) for name in ("novelty@2", "diversity@2")]
    np.testing.assert_array_equal(
        people.groups["new_items"].values[:, on_list], people.groups["all"].values[[0, 2]][:, on_list]
    )


def test_a_new_item_that_is_known_already_makes_nobody_a_finder() -> None:
    scores = np.array([[1, 2, 3]], np.float32)
    people = evaluate(scores, (np.array([0]), np.array([2])), lists([0, 2]), n_known_items=2)
    assert people.groups["new_items"].people.tolist() == []
    assert people.groups["all"].people.tolist() == [0]


def test_every_value_stands_under_its_name_and_is_finite() -> None:
    generator = np.random.default_rng(5)
    scores = generator.normal(size=(30, 40)).astype(np.float32)
    known = (generator.integers(0, 30, 90), generator.integers(0, 40, 90))
    targets = ItemLists(np.arange(31) * 3, generator.integers(0, 40, 90))
    people = evaluate(scores, known, targets, 30, ks=(1, 5, 10))
    assert people.names == metric_names((1, 5, 10))
    assert len(people.names) == 3 * 7 + 2
    accuracy, judged = per_person(rank_targets(scores, known, targets), (1, 5, 10))
    for name, value in accuracy.items():
        assert column(people, "all", name) == value[judged].tolist()
    assert all(np.isfinite(group.values).all() for group in people.groups.values())
    assert column(people, "all", "diversity@5") == pytest.approx([1.0] * int(judged.sum()))
    assert people.lists.shape == (int(judged.sum()), 10)


def test_ranking_against_a_few_items_is_a_group_of_its_own() -> None:
    generator = np.random.default_rng(7)
    scores = generator.normal(size=(30, 60)).astype(np.float32)
    known = (np.array([4, 9]), np.array([1, 2]))
    targets = ItemLists(np.arange(31), np.where(np.arange(30) == 9, 2, generator.integers(0, 60, 30)))
    clients, key = np.arange(30) + 100, Key.from_seed(1)

    def run(sampled: tuple[int, np.ndarray, Key] | None) -> PeopleMetrics:
        return evaluate_people(
            scores, known, targets, 60, (5,), attributes=np.eye(60), popularity=np.arange(60), sampled=sampled
        )

    plain, people = run(None), run((10, clients, key))
    assert tuple(plain.groups) == GROUPS
    assert tuple(people.groups) == (*GROUPS, "sampled")
    for name in GROUPS:
        np.testing.assert_array_equal(people.groups[name].values, plain.groups[name].values)
    few, judged = per_person(sampled_ranks(scores, known, targets, clients, key, n_sampled=10), (5,))
    assert people.groups["sampled"].people.tolist() == np.flatnonzero(judged).tolist()
    assert len(people.groups["sampled"].people) == 29
    assert {name: column(people, "sampled", name) for name in few} == {n: v[judged].tolist() for n, v in few.items()}
    assert column(people, "sampled", "novelty@5") == column(people, "all", "novelty@5")
    assert np.mean(column(people, "sampled", "hr@5")) > 2 * np.mean(column(people, "all", "hr@5"))


def test_nobody_to_evaluate_gives_empty_groups() -> None:
    people = evaluate(np.zeros((2, 3), np.float32), NOBODY_KNOWS, lists([], []), n_known_items=3)
    assert [people.groups[name].values.shape for name in GROUPS] == [(0, len(people.names))] * 4
    assert (people.lists.shape, people.n_people, people.n_items) == ((0, 2), 2, 3)


@pytest.mark.parametrize("ks", [(), (0,), (5, 5)])
def test_senseless_cut_offs_are_refused(ks: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"different whole numbers from 1, not \["):
        metric_names(ks)


def test_attributes_and_popularity_must_fit_the_catalogue() -> None:
    scores, targets = np.zeros((1, 3), np.float32), lists([0])
    with pytest.raises(DataError, match=r"attributes have the shape \[2, 2\] for a catalogue of 3 items"):
        evaluate_people(scores, NOBODY_KNOWS, targets, 3, (1,), attributes=np.eye(2), popularity=np.ones(3))
    with pytest.raises(DataError, match=r"Popularity has the shape \[4\] for a catalogue of 3 items"):
        evaluate_people(scores, NOBODY_KNOWS, targets, 3, (1,), attributes=np.eye(3), popularity=np.ones(4))
