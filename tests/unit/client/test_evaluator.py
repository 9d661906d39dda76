"""Evaluation on the client: which questions are asked, whose metrics are what, and training that never leaves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedrec.client.evaluator import ask, evaluate, item_lists
from fedrec.client.trainer import train_each
from fedrec.data.batches import Cohort, histories
from fedrec.data.catalog import ItemCatalog
from fedrec.data.log import InteractionLog
from fedrec.data.slices import LastWindow, TimeWindow, resolve
from fedrec.evaluation.metrics import metric_names
from fedrec.models.build import build, restore
from fedrec.models.configs import AnyModelConfig, FactorisationConfig, TransformerConfig
from fedrec.models.recommender import Recommender, get_params, score_all, set_params
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import EvaluateTask, FitTask, LocalTraining
from fedrec.random import Key

KEY = Key.from_seed(8)
N_ITEMS = 60
CONFIG = TransformerConfig(dim=8, length=12)
CATALOG = ItemCatalog(
    tuple(map(str, range(N_ITEMS))), ("",) * N_ITEMS, (("a",), ("b",), ("a", "b")) * 20, np.zeros(N_ITEMS, np.int64)
)
KS = (5, 20)


def log(n_users: int = 80) -> InteractionLog:
    """Long-tailed and uneven as real data: item popularity falls as 1 / rank, histories have 1 to 25 distinct items."""
    draw = KEY.child("log").numpy()
    share = 1.0 / np.arange(1, N_ITEMS + 1)
    lengths = 1 + np.floor(25 * draw.random(n_users) ** 3).astype(np.int64)
    lists = [draw.choice(N_ITEMS, length, replace=False, p=share / share.sum()) for length in lengths]
    user = np.repeat(np.arange(n_users), [len(items) for items in lists])
    return InteractionLog.from_rows(
        user, np.concatenate(lists), draw.integers(0, 1000, len(user)), tuple(map(str, range(n_users)))
    )


def cohort(window: LastWindow | TimeWindow) -> Cohort:
    columns = log()
    low, high = resolve(columns, window)
    users = np.flatnonzero(high > low)
    return Cohort(columns, users, users + 500, low[users], high[users])


def plan(task: EvaluateTask, config: AnyModelConfig = CONFIG) -> RoundPlan:
    model = build(config, N_ITEMS, KEY)
    factor = np.float32(20 if isinstance(config, TransformerConfig) else 2)  # scores far from ties
    params = {name: value * factor for name, value in get_params(model).items()}
    return RoundPlan(
        0, 0, task, config, N_ITEMS, params, KEY, CATALOG.digest(), np.arange(0),
        inputs={"popularity": np.bincount(log().item, minlength=N_ITEMS).astype(np.float32)},
    )  # fmt: skip


def mean(tally: Tally, group: str, metric: str) -> float:
    column = metric_names(KS).index(metric)
    return float(tally.sums[f"sum.{group}"][0, column] / tally.sums[f"weight.{group}"][0])


def n_people(tally: Tally, group: str) -> int:
    return int(tally.sums[f"weight.{group}"][0])


LAST = EvaluateTask(window=LastWindow(skip=0, take=1), n_known_items=N_ITEMS, ks=KS, replicates=2)


# Questions


def test_probes_spread_evenly_over_the_window_and_are_no_more_than_it_holds() -> None:
    people = replace(
        cohort(LastWindow(skip=0)).take(slice(0, 4)), low=np.array([5, 0, 7, 0]), high=np.array([15, 3, 8, 100])
    )
    owner, asked = ask(people, 4)
    assert owner.tolist() == [0] * 4 + [1] * 3 + [2] + [3] * 4
    assert asked.low.tolist() == [5, 7, 10, 12, 0, 1, 2, 7, 0, 25, 50, 75]
    assert (asked.high - asked.low == 1).all()
    assert asked.users.tolist() == people.users[owner].tolist()
    assert asked.ids.tolist() == people.ids[owner].tolist()
    assert len(np.unique(owner * 1000 + asked.low)) == len(owner)


def test_without_probes_everybody_is_asked_once_for_the_whole_window() -> None:
    people = cohort(LastWindow(skip=0, take=3))
    owner, asked = ask(people, None)
    assert asked is people
    assert owner.tolist() == list(range(len(people)))


def test_item_lists_are_the_items_at_these_places() -> None:
    people = cohort(LastWindow(skip=0, take=2))
    lists = item_lists(people, people.low, people.high)
    for c, user in enumerate(people.users):
        expected = people.log.history(user)[people.low[c] : people.high[c]].tolist()
        assert lists.items[lists.offsets[c] : lists.offsets[c + 1]].tolist() == expected


# Ranks


def slow_rank(scores: np.ndarray, known: list[int], target: int) -> int:
    """Return the rank of the target by counting, one item after the other; a tie is lost."""
    rank = 1
    for item, score in enumerate(scores):
        if item != target and item not in known and score >= scores[target]:
            rank += 1
    return rank


@pytest.mark.parametrize("config", [CONFIG, FactorisationConfig(dim=8)], ids=["transformer", "factorisation"])
def test_leave_one_out_metrics_are_those_of_a_slow_loop(config: AnyModelConfig) -> None:
    people, asked = cohort(LAST.window), plan(LAST, config)
    tally = evaluate(asked, LAST, people, CATALOG)
    model = restore(config, N_ITEMS, asked.params)
    ranks = []
    for user in people.users:
        items = people.log.history(user).tolist()
        one = Cohort(people.log, np.array([user]), np.array([0]), np.array([len(items) - 1]), np.array([len(items)]))
        scores = score_all(model, histories(one, one.low, model.spec))[0]
        ranks.append(slow_rank(scores, items[:-1], items[-1]))
    found = np.array(ranks)
    assert tally.n_clients == n_people(tally, "all") == len(people) == 80
    for k in KS:
        inside = found <= k
        assert mean(tally, "all", f"hr@{k}") == pytest.approx(inside.mean())
        assert mean(tally, "all", f"ndcg@{k}") == pytest.approx((inside / np.log2(found + 1)).mean())
    assert mean(tally, "all", "mrr") == pytest.approx((1 / found).mean())
    assert 0 < (found <= 20).mean() < 1


def test_each_probe_knows_what_came_before_it_and_people_weigh_the_same() -> None:
    """A person's metric is the mean over their probes, whatever their number."""
    window = LastWindow(skip=0, take=7)
    task = LAST.model_copy(update={"window": window, "probes": 3})
    people, asked = cohort(window), plan(task)
    tally = evaluate(asked, task, people, CATALOG)
    model = restore(CONFIG, N_ITEMS, asked.params)
    values = []
    for user, low, high in zip(people.users, people.low, people.high, strict=True):
        items, width = people.log.history(user).tolist(), int(high - low)
        hits = []
        for place in [int(low) + i * width // min(3, width) for i in range(min(3, width))]:
            one = Cohort(people.log, np.array([user]), np.array([0]), np.array([place]), np.array([place + 1]))
            scores = score_all(model, histories(one, one.low, model.spec))[0]
            hits.append(slow_rank(scores, items[:place], items[place]) <= 20)
        values.append(np.mean(hits))
    assert mean(tally, "all", "hr@20") == pytest.approx(np.mean(values))
    assert len({round(value, 3) for value in values}) > 2


def test_blocks_of_people_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    task = LAST.model_copy(update={"probes": 2, "window": LastWindow(skip=0, take=4)})
    people, asked = cohort(task.window), plan(task)
    whole = evaluate(asked, task, people, CATALOG)
    monkeypatch.setattr("fedrec.client.evaluator.SCORES", 7 * asked.n_items * 2)
    parts = evaluate(asked, task, people, CATALOG)
    assert whole.sums.keys() == parts.sums.keys()
    for name, value in whole.sums.items():
        np.testing.assert_allclose(parts.sums[name], value, rtol=1e-6, err_msg=name)


# Groups


def test_somebody_is_new_who_has_nothing_before_the_window() -> None:
    window = TimeWindow(start=400, end=1000)
    task = LAST.model_copy(update={"window": window})
    people = cohort(window)
    tally = evaluate(plan(task), task, people, CATALOG)
    rows = [slice(people.log.offsets[user], people.log.offsets[user + 1]) for user in people.users]
    before = [int((people.log.time[own] < 400).sum()) for own in rows]
    new = sum(n == 0 for n in before)
    assert new > 3
    assert n_people(tally, "new") == new
    assert n_people(tally, "returning") == len(people) - new


def test_a_new_person_stays_new_over_all_of_their_probes() -> None:
    """At the second probe they have a history, but it is from the window, not from before it."""
    window = TimeWindow(start=400, end=1000)
    task = LAST.model_copy(update={"window": window, "probes": 5})
    people = cohort(window)
    tally = evaluate(plan(task), task, people, CATALOG)
    assert n_people(tally, "new") == int((people.low == 0).sum())
    assert n_people(tally, "all") == n_people(tally, "new") + n_people(tally, "returning") == len(people)


def test_new_items_are_those_that_joined_after_training() -> None:
    task = LAST.model_copy(update={"n_known_items": 20})
    people = cohort(LAST.window)
    tally = evaluate(plan(task), task, people, CATALOG)
    last = people.log.item[people.log.offsets[people.users + 1] - 1]
    assert n_people(tally, "new_items") == (last >= 20).sum() > 3
    assert n_people(evaluate(plan(LAST), LAST, people, CATALOG), "new_items") == 0


# Local only


FIT = FitTask(window=LastWindow(skip=1), local=LocalTraining(steps=3, learning_rate=0.5))


def test_training_alone_changes_the_scores_of_those_who_have_something_to_train_on_and_of_nobody_else() -> None:
    alone = LAST.model_copy(update={"personalise": FIT})
    people = cohort(LAST.window)
    asked = plan(LAST)
    bare = np.flatnonzero(people.low == 0)  # their only interaction is the one to predict
    trained = np.flatnonzero(people.low > 0)
    assert len(bare) >= 2
    for chosen, same in ((bare, True), (trained, False), (np.concatenate([trained[:3], bare]), False)):
        part = people.take(chosen)
        shared = evaluate(asked, LAST, part, CATALOG).sums["sum.all"]
        own = evaluate(replace(asked, task=alone), alone, part, CATALOG).sums["sum.all"]
        assert np.array_equal(shared, own) is same
    mixed = people.take(np.concatenate([trained, bare]))  # trained ones first, so that a leftover would show
    both = evaluate(replace(asked, task=alone), alone, mixed, CATALOG).sums["sum.all"]
    apart = [evaluate(replace(asked, task=alone), alone, people.take(c), CATALOG) for c in (trained, bare)]
    np.testing.assert_allclose(both, apart[0].sums["sum.all"] + apart[1].sums["sum.all"], rtol=1e-6)


@pytest.mark.parametrize("config", [CONFIG, FactorisationConfig(dim=8)], ids=["transformer", "factorisation"])
def test_everybody_is_judged_by_the_model_that_they_alone_trained(
    config: AnyModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against training each with the slow twin; three people at a time, so that blocks follow each other."""
    monkeypatch.setattr("fedrec.client.evaluator.PERSONAL_BLOCK", 3)
    task = LAST.model_copy(update={"personalise": FIT})
    people = cohort(LAST.window).take(slice(0, 10))
    asked = plan(task, config)
    tally = evaluate(asked, task, people, CATALOG)
    model = restore(config, N_ITEMS, asked.params)
    reciprocal = [1 / rank for rank in (own_rank(model, people, place) for place in range(10))]
    assert mean(tally, "all", "mrr") == pytest.approx(np.mean(reciprocal))


def own_rank(model: Recommender, people: Cohort, place: int) -> int:
    """Return the rank of the last item under the model that one person trained on all before it."""
    shared = {name: value.detach().clone() for name, value in model.named_parameters()}
    items = people.log.history(int(people.users[place])).tolist()
    one = people.take([place])
    own = shared
    if len(items) > 1:
        training = replace(one, low=np.array([0]), high=np.array([len(items) - 1]))
        own = train_each(model, training, FIT.local, KEY.child("local-only")).client_params(shared, 0)
    set_params(model, {name: value.numpy() for name, value in own.items()})
    with torch.no_grad():
        scores = score_all(model, histories(one, one.low, model.spec))[0]
    set_params(model, {name: value.numpy() for name, value in shared.items()})
    return slow_rank(scores, items[:-1], items[-1])


def test_training_alone_leaves_the_plans_parameters_as_they_were() -> None:
    task = LAST.model_copy(update={"personalise": FIT})
    asked = plan(task)
    before = {name: value.copy() for name, value in asked.params.items()}
    evaluate(asked, task, cohort(LAST.window).take(slice(0, 8)), CATALOG)
    assert all(np.array_equal(value, before[name]) for name, value in asked.params.items())


# What a node says


def test_a_tally_holds_sums_and_nothing_that_grows_with_the_people() -> None:
    few, many = (evaluate(plan(LAST), LAST, cohort(LAST.window).take(slice(0, n)), CATALOG) for n in (3, 60))
    assert {n: v.shape for n, v in few.sums.items()} == {n: v.shape for n, v in many.sums.items()}
    assert dict(few.stats) == {}


def test_sampled_candidates_are_a_group_of_their_own() -> None:
    task = LAST.model_copy(update={"sampled_negatives": 5})
    people = cohort(LAST.window)
    full, sampled = evaluate(plan(LAST), LAST, people, CATALOG), evaluate(plan(task), task, people, CATALOG)
    assert np.array_equal(sampled.sums["sum.all"], full.sums["sum.all"])
    assert "weight.sampled" not in full.sums
    assert mean(sampled, "sampled", "hr@5") > mean(sampled, "all", "hr@5")
