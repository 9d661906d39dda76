"""What a release is compared with, and that the numbers are those of a plain count by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedrec.config import LeaveOneOutSplit
from fedrec.data.slices import LastWindow, TimeWindow
from fedrec.models.configs import PopularityConfig
from fedrec.protocol.link import Reply
from fedrec.server.judge import (
    Contender,
    grown,
    initial,
    judge,
    local_only_contender,
    popularity_contender,
)
from fedrec.server.round import Recipe
from fedrec.server.run import cut
from tests.support import PoolLink, dataset_of, same_bytes, small_experiment, small_rows

DATASET = dataset_of(small_rows())
EXPERIMENT = small_experiment(evaluation__probes=None)
RECIPE = Recipe(EXPERIMENT, DATASET.catalog.digest(), lambda: 0.0)
LEFT_OUT = small_experiment(split=LeaveOneOutSplit().model_dump(), evaluation__probes=None)
N_ITEMS = len(DATASET.catalog)


def counts_before_the_last() -> np.ndarray:
    last = DATASET.log.offsets[1:] - 1
    return np.bincount(np.delete(DATASET.log.item, last), minlength=N_ITEMS).astype(np.float32)


def test_the_popularity_row_is_what_a_count_by_hand_gives() -> None:
    counts = counts_before_the_last()
    recipe = replace(RECIPE, experiment=LEFT_OUT)
    [one] = cut(LEFT_OUT, DATASET)
    contenders = {"popularity": popularity_contender({"counts": counts})}
    found = judge(contenders, one, PoolLink(DATASET, 2), recipe, {"counts": counts})["rows"]["popularity"]["all"]

    ranks = []
    for user in range(DATASET.log.n_users):
        *known, target = DATASET.log.history(user).tolist()
        if target in known:
            continue  # what a person already had is not a recommendation
        rivals = [item for item in range(N_ITEMS) if item not in known and item != target]
        ranks.append(1 + sum(counts[item] >= counts[target] for item in rivals))  # ties count against the model
    rank = np.array(ranks)
    assert found["n"] == len(rank)
    for k in (5, 10):
        hit = rank <= k
        assert found["metrics"][f"hr@{k}"]["value"] == pytest.approx(hit.mean())
        assert found["metrics"][f"ndcg@{k}"]["value"] == pytest.approx((hit / np.log2(1 + rank)).mean())
    assert found["metrics"]["mrr"]["value"] == pytest.approx((1 / rank).mean())


def test_a_model_that_knows_the_answer_gets_full_marks_and_beats_the_other() -> None:
    """Everybody's last item is the same new one, and one contender counts it most."""
    rows = [row for row in small_rows() if row[1] != "i0"]
    end = max(time for _, _, time in rows)
    rows += [(user, "i0", end + 60) for user in sorted({user for user, _, _ in rows})]
    dataset = dataset_of(rows)
    recipe = Recipe(LEFT_OUT, dataset.catalog.digest(), lambda: 0.0)
    [one] = cut(LEFT_OUT, dataset)
    counts = np.ones(len(dataset.catalog), np.float32)
    knows, wrong = counts.copy(), counts.copy()
    knows[dataset.catalog.number_of["i0"]], wrong[dataset.catalog.number_of["i0"]] = 99.0, 0.0
    contenders = {name: popularity_contender({"counts": c}) for name, c in (("knows", knows), ("wrong", wrong))}
    verdict = judge(contenders, one, PoolLink(dataset, 3), recipe, {"counts": counts})
    for name, value in (("knows", 1.0), ("wrong", 0.0)):
        group = verdict["rows"][name]["all"]
        assert group["n"] == dataset.log.n_users
        for metric in ("hr@5", "ndcg@10", "mrr@5"):
            assert set(group["metrics"][metric].values()) == {value}, (name, metric)
    assert verdict["differences"]["wrong"]["ndcg@5"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert verdict["refused"] == []
    assert min(verdict["bytes_down"], verdict["bytes_up"]) > 0


def test_the_number_of_nodes_hardly_shows_in_the_metrics() -> None:
    base = cut(EXPERIMENT, DATASET)[0]
    contenders = {"release": Contender(EXPERIMENT.model, initial(EXPERIMENT.model, base.n_items, RECIPE))}
    counts = {"counts": np.ones(base.n_items_test, np.float32)}
    one, three = (judge(contenders, base, PoolLink(DATASET, n), RECIPE, counts)["rows"] for n in (1, 3))
    for name, estimate in one["release"]["all"]["metrics"].items():
        other = three["release"]["all"]["metrics"][name]
        assert estimate == {key: None if v is None else pytest.approx(v, rel=1e-9) for key, v in other.items()}, name


def test_a_node_that_fails_is_named_and_no_comparison_is_made_between_different_people() -> None:
    base = cut(EXPERIMENT, DATASET)[0]
    params = initial(EXPERIMENT.model, base.n_items, RECIPE)
    contenders = {name: Contender(EXPERIMENT.model, params) for name in ("release", "previous")}
    calls = iter(range(9))

    def fails_once(verb: str, reply: Reply) -> list[Reply]:
        return [Reply(reply.node, None, "flat battery")] if verb == "run" and next(calls) == 0 else [reply]

    counts = {"counts": np.ones(base.n_items_test, np.float32)}
    link = PoolLink(DATASET, 2, {101: fails_once})
    verdict = judge(contenders, base, link, RECIPE, counts)
    assert verdict["refused"] == [{"node": "partition 000001", "reason": "flat battery"}]
    assert verdict["rows"]["release"]["all"]["n"] < verdict["rows"]["previous"]["all"]["n"]
    assert verdict["differences"] == {}


def test_nobody_in_the_test_window_gives_no_rows() -> None:
    base = replace(cut(EXPERIMENT, DATASET)[0], test=TimeWindow(start=1, end=2))
    contenders = {"release": Contender(EXPERIMENT.model, initial(EXPERIMENT.model, base.n_items, RECIPE))}
    verdict = judge(contenders, base, PoolLink(DATASET, 2), RECIPE, {"counts": np.ones(base.n_items_test, np.float32)})
    assert (verdict["rows"], verdict["differences"], verdict["bytes_up"]) == ({}, {}, 0)


def test_local_only_trains_the_untrained_model_on_everything_before_the_test() -> None:
    one = cut(EXPERIMENT, DATASET)[1]
    found = local_only_contender(RECIPE, one)
    assert same_bytes(found.params, initial(EXPERIMENT.model, one.n_items, RECIPE))
    assert found.people == 5
    assert found.personalise is not None
    assert isinstance(found.personalise.window, TimeWindow)
    assert found.personalise.window.start < int(DATASET.log.time.min())
    assert found.personalise.window.end == one.test.start
    assert found.personalise.local == EXPERIMENT.evaluation.local_only.training
    [left_out] = cut(LEFT_OUT, DATASET)
    found = local_only_contender(replace(RECIPE, experiment=LEFT_OUT), left_out)
    assert found.personalise is not None
    assert found.personalise.window == LastWindow(skip=2)


def test_local_only_asks_so_many_people_and_is_compared_with_nothing() -> None:
    base = cut(EXPERIMENT, DATASET)[0]
    contenders = {
        "release": Contender(EXPERIMENT.model, initial(EXPERIMENT.model, base.n_items, RECIPE)),
        "local_only": local_only_contender(RECIPE, base),
    }
    verdict = judge(contenders, base, PoolLink(DATASET, 2), RECIPE, {"counts": np.ones(base.n_items_test, np.float32)})
    assert 0 < verdict["rows"]["local_only"]["all"]["n"] <= 5 < verdict["rows"]["release"]["all"]["n"]
    assert verdict["differences"] == {}


def test_ranking_against_a_few_random_items_is_a_group_of_its_own() -> None:
    experiment = small_experiment(evaluation__sampled_negatives=3)
    recipe = replace(RECIPE, experiment=experiment)
    base = cut(experiment, DATASET)[0]
    contenders = {"release": Contender(experiment.model, initial(experiment.model, base.n_items, recipe))}
    counts = {"counts": np.ones(base.n_items_test, np.float32)}
    rows = judge(contenders, base, PoolLink(DATASET, 2), recipe, counts)["rows"]["release"]
    assert rows["sampled"]["metrics"]["hr@5"]["value"] == 1.0  # one of four is always among the best five
    assert rows["all"]["metrics"]["hr@5"]["value"] < 1.0


@pytest.mark.parametrize("model", [EXPERIMENT.model, PopularityConfig()])
def test_growing_keeps_every_old_number_and_two_steps_are_one(model: object) -> None:
    small = initial(model, 10, RECIPE)  # type: ignore[arg-type]
    name = "item" if "item" in small else "counts"
    small = {key: value + 1 if key == name else value for key, value in small.items()}
    at_once = grown(model, small, 30, RECIPE)  # type: ignore[arg-type]
    stepwise = grown(model, grown(model, small, 17, RECIPE), 30, RECIPE)  # type: ignore[arg-type]
    assert same_bytes(at_once, stepwise)
    assert len(at_once[name]) == 30
    assert same_bytes({**at_once, name: at_once[name][:10]}, small)
    assert same_bytes(grown(model, small, 10, RECIPE), small)  # type: ignore[arg-type]
