"""A life in blocks: every release on every held-back test, and the report that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.data.blocks import SPAN, block_slices, in_blocks
from fedrec.data.slices import TimeWindow, resolve
from fedrec.errors import FedrecError
from fedrec.evaluation.continual import matrix, measure
from fedrec.evaluation.life_plot import life_plot
from fedrec.protocol.task import EvaluateTask, FitTask
from fedrec.server.lifelong import run_stream
from fedrec.server.registry import Registry
from fedrec.server.round import Recipe
from fedrec.server.run import check, cut
from fedrec.server.state import ServerState
from fedrec.server.work import Desk
from tests.support import PoolLink, dataset_of, simulated, small_experiment, small_rows

ROWS = list({(u, i): (u, i, t) for u, i, t in small_rows()}.values())
DATASET = in_blocks(dataset_of(ROWS), base=0.5, later=2)
BLOCKS = {"kind": "blocks", "later": 2}
ONCE = {"evaluation__probes": None, "evaluation__local_only": {"people": 0}}


def plans(tmp_path: Path, refit: Any) -> PoolLink:
    experiment = small_experiment(split={**BLOCKS, "refit": refit}, **ONCE)
    link = PoolLink(DATASET, 2)
    recipe = Recipe(experiment, DATASET.catalog.digest(), lambda: 0.0)
    state = ServerState("life/001", experiment.digest(), recipe.catalog_digest)
    desk = Desk(Registry(tmp_path), DATASET.catalog, lambda state: None, lambda event: None)
    for _ in run_stream(state, link, cut(experiment, DATASET), recipe, desk):
        pass
    return link


@pytest.mark.parametrize("refit", ["no", "warm", "fresh"])
def test_no_plan_trains_on_what_is_held_back_and_every_test_is_asked_of_every_release(
    tmp_path: Path, refit: Any
) -> None:
    link = plans(tmp_path, refit)
    slices = block_slices(DATASET, 3, refit)
    held = min(window.start for window in slices[0].life)
    for plan in link.plans:
        one, task = slices[plan.slice], plan.task
        if isinstance(task, FitTask):
            assert task.window == (one.fit or one.train)
        elif isinstance(task, EvaluateTask):
            assert task.known == one.known
            assert task.window in one.life
        else:
            assert task.window == one.train
        end = (task.known if isinstance(task, EvaluateTask) else task.window).end  # type: ignore[union-attr]
        assert end <= held
    asked = {(plan.slice, plan.task.window) for plan in link.plans if isinstance(plan.task, EvaluateTask)}
    assert asked == {(i, window) for i in range(3) for window in slices[0].life}


def test_what_is_known_is_neither_later_than_the_release_nor_held_back() -> None:
    """Changing what comes after a release's own block changes nothing of its row in the matrix."""
    from dataclasses import replace

    experiment = small_experiment(split=BLOCKS, **ONCE)
    slices = block_slices(DATASET, 3)
    log = DATASET.log
    item = np.array(log.item)
    low, high = resolve(log, TimeWindow(start=2 * SPAN, end=3 * SPAN))  # the last block, without its test
    where = np.concatenate([np.arange(a, b) + s for a, b, s in zip(low, high, log.offsets[:-1], strict=True)])
    item[where] = (item[where] + 1) % slices[2].n_items
    other = replace(DATASET, log=replace(log, item=item))
    rows = []
    for dataset in (DATASET, other):
        link = PoolLink(dataset, 1)
        pool = link.pools[100]
        plan = _plan(experiment, dataset, slices[1])
        n = pool.census(plan.task.window, dataset.catalog.digest())
        rows.append(pool.run(replace(plan, slots=np.arange(n))).sums)
    assert rows[0].keys() == rows[1].keys()
    for name in rows[0]:
        np.testing.assert_array_equal(rows[0][name], rows[1][name])


def _plan(experiment, dataset, one):  # type: ignore[no-untyped-def]
    from fedrec.protocol.plan import RoundPlan
    from fedrec.random import Key
    from fedrec.server.judge import initial

    recipe = Recipe(experiment, dataset.catalog.digest(), lambda: 0.0)
    n = one.n_items_test
    task = EvaluateTask(window=one.life[0], known=one.known, ks=(5,), replicates=2, n_known_items=one.n_items)
    return RoundPlan(
        1, 0, task, experiment.model, n, initial(experiment.model, n, recipe), Key.from_seed(1), recipe.catalog_digest,
        np.zeros(0, np.int64), {"popularity": np.ones(n, np.float32)},
    )  # fmt: skip


def test_the_report_shows_the_matrix_and_agrees_with_the_table(tmp_path: Path) -> None:
    document, registry = simulated(small_experiment(split=BLOCKS, **ONCE), DATASET, tmp_path)
    a = matrix(document["releases"], "ndcg@10")
    assert a.shape == (3, 3)
    assert np.isfinite(a).all()
    for i, release in enumerate(document["releases"]):
        own = release["rows"]["release"]["all"]["metrics"]["ndcg@10"]["value"]
        assert a[i, i] == pytest.approx(own, abs=1e-12)
    life = measure(a)
    assert life.learning == pytest.approx(np.diag(a).mean())
    plot = life_plot(document["releases"])
    assert plot is not None
    assert "Learning average" in plot.caption
    page = next((tmp_path / "runs").rglob("report.html")).read_text(encoding="utf-8")
    assert "What is learnt and what is retained" in page
    assert registry.verify() == []


def test_who_and_what_was_new_in_a_slice_stays_new_in_its_test_for_life(tmp_path: Path) -> None:
    document, _ = simulated(small_experiment(split=BLOCKS, **ONCE), DATASET, tmp_path)
    log, slices = DATASET.log, block_slices(DATASET, 3)
    for release in document["releases"]:
        for j, groups in enumerate(release["life"]):
            tested = np.diff(np.stack(resolve(log, slices[0].life[j])), axis=0)[0] > 0
            first = np.asarray(log.time)[log.offsets[:-1]]
            came = int((tested & (first >= j * SPAN)).sum())
            assert groups.get("new", {"n": 0})["n"] == came
            assert groups.get("returning", {"n": 0})["n"] == int(tested.sum()) - came
    last = document["releases"][-1]["life"]
    assert last[1]["new_items"]["n"] > 0
    caption = life_plot(document["releases"]).caption  # type: ignore[union-attr]
    assert "Items that came with it: learning" in caption


def test_the_published_mask_leaves_what_is_known_from_other_blocks_among_the_candidates(tmp_path: Path) -> None:
    changes = {"training__base": {"rounds": 1}, "training__later": {"rounds": 0}}
    lives = {}
    for mask in ("known", "block"):
        experiment = small_experiment(split={**BLOCKS, "mask": mask}, **ONCE, **changes)
        document, _ = simulated(experiment, DATASET, tmp_path / mask)
        lives[mask] = matrix(document["releases"], "recall@10")
    assert (lives["block"][2] < lives["known"][2]).any()
    assert lives["block"][0, 0] == lives["known"][0, 0]
    assert measure(lives["block"]).retained < measure(lives["known"]).retained


def test_data_in_blocks_and_settings_must_agree(tmp_path: Path) -> None:
    with pytest.raises(FedrecError, match="laid out in blocks"):
        cut(small_experiment(), DATASET)
    with pytest.raises(FedrecError, match="is not laid out in 3 blocks"):
        cut(small_experiment(split=BLOCKS), dataset_of(small_rows()))


def test_a_blend_in_blocks_is_tried_on_the_blocks_own_validation_part(tmp_path: Path) -> None:
    blend = {"kind": "blend", "fitted": {"kind": "factorisation", "dim": 4}, "weights": [0.5]}
    experiment = small_experiment(
        split=BLOCKS, model=blend, training__statistics={"feature_share": 0.0}, **{**ONCE, "evaluation__ks": [5]}
    )
    document, registry = simulated(experiment, DATASET, tmp_path)
    assert [set(one["adoption"]["tried"]) for one in document["releases"]] == [{"weight 0", "weight 0.5"}] * 3
    assert all(one["adoption"]["tried"]["weight 0"] > 0 for one in document["releases"])
    assert np.isfinite(matrix(document["releases"], "ndcg@5")).all()
    assert registry.verify() == []


@pytest.mark.parametrize("local", [{"replay": 0.5}, {"history_negatives": False}], ids=str)
def test_mode_local_refuses_what_it_would_not_do(local: dict[str, object]) -> None:
    experiment = small_experiment(
        privacy={"mode": "local", "epsilon": 8.0, "delta": 1e-5, "metrics": "research"},
        training__local=local,
        split=BLOCKS,
    )
    with pytest.raises(FedrecError, match="at their defaults"):
        check(experiment, DATASET)


def test_a_stream_without_held_back_tests_has_no_heat_map() -> None:
    assert life_plot([{"slice": 0, "life": []}, {"slice": 1, "life": []}]) is None
    entry = {"all": {"metrics": {"ndcg@10": {"value": 0.5}}}}
    assert matrix([{"life": [entry, {}]}], "ndcg@10").tolist()[0][0] == 0.5
