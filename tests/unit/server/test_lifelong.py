"""The lifelong loop: each release grows from the last, and nothing of its test window has touched it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.config import EvaluationConfig, Experiment, LeaveOneOutSplit
from fedrec.data.cleaning import Dataset
from fedrec.data.slices import LastWindow, TimeSlice, TimeWindow, resolve
from fedrec.protocol.link import Reply
from fedrec.protocol.plan import RoundPlan
from fedrec.server.lifelong import STEPS, run_stream
from fedrec.server.publish import publish, worth_promoting
from fedrec.server.registry import Registry
from fedrec.server.round import Recipe
from fedrec.server.run import cut
from fedrec.server.state import ServerState
from fedrec.server.work import Desk, Event, Work
from tests.support import PoolLink, dataset_of, same_bytes, small_experiment, small_rows

DATASET = dataset_of(small_rows())
EXPERIMENT = small_experiment()


@dataclass(frozen=True)
class Life:
    """What a run left behind: its states at every checkpoint and release, its events, and the plans it sent."""

    released: list[ServerState]
    checkpoints: list[ServerState]
    events: list[Event]
    plans: list[RoundPlan]
    registry: Registry
    slices: tuple[TimeSlice, ...]


def live(
    root: Path, experiment: Experiment = EXPERIMENT, dataset: Dataset = DATASET, link: PoolLink | None = None
) -> Life:
    link = link or PoolLink(dataset, 2)
    life = Life([], [], [], link.plans, Registry(root), cut(experiment, dataset))
    recipe = Recipe(experiment, dataset.catalog.digest(), lambda: 0.0)
    state = ServerState("small/001", experiment.digest(), recipe.catalog_digest)
    desk = Desk(life.registry, dataset.catalog, life.checkpoints.append, life.events.append)
    life.released.extend(state for state, _ in run_stream(state, link, life.slices, recipe, desk))
    return life


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    return live(tmp_path_factory.mktemp("life"))


def with_other_items(dataset: Dataset, where: np.ndarray) -> Dataset:
    """Return the data set with the items of these rows replaced by others of their time, and nothing else changed."""
    item = np.array(dataset.log.item)
    there = np.searchsorted(dataset.catalog.first_seen, dataset.log.time, side="right")
    item[where] = ((item + 1 + np.arange(len(item)) % 7) % there)[where]
    changed = replace(dataset, log=replace(dataset.log, item=item))
    assert not np.array_equal(changed.log.item, dataset.log.item)
    return changed


def leaf_numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaf_numbers(inner)
    elif isinstance(value, int | float):
        yield value


def test_one_release_per_slice_in_one_line(life: Life) -> None:
    rows = life.registry.list()
    assert [(row.version, row.slice, row.parent, row.run) for row in rows] == [
        (1, 0, None, "small/001"),
        (2, 1, 1, "small/001"),
        (3, 2, 2, "small/001"),
    ]
    assert [row.version for row in life.registry.lineage()] == [3, 2, 1]
    assert [row.current for row in rows] == [False, False, True]
    assert life.registry.verify() == []
    final = life.released[-1]
    assert (final.slice, final.round, final.counted, final.parent) == (3, 0, 3, 3)
    assert [record["parent"] for record in final.releases] == [None, 1, 2]


def test_a_step_joins_the_list_and_may_add_to_the_record(tmp_path: Path) -> None:
    def weather(work: Work) -> Work:
        assert work.verdict["rows"]
        return work.noted(weather=f"fair in slice {work.time_slice.index}")

    at = STEPS.index(publish)
    steps = (*STEPS[:at], weather, *STEPS[at:])
    state = ServerState("small/001", EXPERIMENT.digest(), DATASET.catalog.digest())
    recipe = Recipe(EXPERIMENT, DATASET.catalog.digest(), lambda: 0.0)
    desk = Desk(Registry(tmp_path), DATASET.catalog, lambda state: None, lambda event: None)
    for reached, _ in run_stream(state, PoolLink(DATASET, 1), cut(EXPERIMENT, DATASET)[:1], recipe, desk, steps):
        assert reached.releases[-1]["weather"] == "fair in slice 0"


def test_new_items_grow_the_table_and_the_catalogue(life: Life) -> None:
    sizes = [one.n_items for one in life.slices]
    assert sizes == sorted(set(sizes))  # each slice brings new items, or this proves nothing
    for version, one in enumerate(life.slices, start=1):
        release = life.registry.load(version)
        assert release.params["item"].shape == (one.n_items, 8)
        assert release.manifest.n_items == len(release.catalog) == one.n_items
        assert release.catalog.ids == DATASET.catalog.ids[: one.n_items]
        assert life.released[version - 1].counts["counts"].shape == (one.n_items,)


def test_a_release_holds_the_average_and_the_next_slice_starts_from_it(life: Life) -> None:
    for version, state in enumerate(life.released, start=1):
        assert same_bytes(life.registry.load(version).params, state.average)
        assert not same_bytes(state.average, state.params)
    first = next(plan for plan in life.plans if plan.slice == 1 and plan.task.kind == "fit")
    n = life.slices[0].n_items
    for name, value in life.released[0].average.items():
        np.testing.assert_array_equal(first.params[name][:n] if name == "item" else first.params[name], value)


def test_the_previous_release_is_judged_again_from_the_second_slice_on(life: Life) -> None:
    records = life.released[-1].releases
    own = {"release", "popularity", "local_only"}
    assert [set(record["rows"]) for record in records] == [own, own | {"previous"}, own | {"previous"}]
    assert [set(record["differences"]) for record in records] == [{"popularity"}, *[{"popularity", "previous"}] * 2]
    assert life.registry.manifest(3).metrics == records[-1]["rows"]


def test_every_metric_of_a_group_with_people_is_a_finite_number(life: Life) -> None:
    n_checked = 0
    for record in life.released[-1].releases:
        for groups in record["rows"].values():
            assert groups["all"]["n"] > 0
            for group in groups.values():
                if not group["n"]:
                    continue
                for name, estimate in group["metrics"].items():
                    assert math.isfinite(estimate["value"]), name
                    # One person has no interval, and neither has what is measured of all lists together.
                    if group["n"] > 1 and name not in ("coverage", "gini"):
                        assert 0 <= estimate["low"] <= estimate["high"] < math.inf, name
                    n_checked += 1
        assert all(math.isfinite(number) for number in leaf_numbers(record["differences"]))
    assert n_checked > 100


def test_popularity_counts_are_those_of_the_log_before_the_test(life: Life) -> None:
    log = DATASET.log
    for one, state in zip(life.slices, life.released, strict=True):
        expected = np.zeros(one.n_items)
        for earlier in life.slices[: one.index + 1]:
            assert isinstance(earlier.train, TimeWindow)
            inside = (log.time >= earlier.train.start) & (log.time < earlier.train.end)
            taken = {(int(u), int(i)) for u, i in zip(log.user[inside], log.item[inside], strict=True)}
            np.add.at(expected, [item for _, item in taken], 1)
        assert isinstance(one.test, TimeWindow)
        assert set(log.item[log.time < one.test.start].tolist()) == set(np.flatnonzero(expected).tolist())
        np.testing.assert_array_equal(state.counts["counts"], expected)
        judged = [plan for plan in life.plans if plan.slice == one.index and plan.task.kind == "evaluate"]
        for plan in judged:
            np.testing.assert_array_equal(plan.inputs["popularity"][: one.n_items], expected)
            assert not plan.inputs["popularity"][one.n_items :].any()


def test_plans_of_training_name_only_the_training_window(life: Life) -> None:
    for plan in life.plans:
        one = life.slices[plan.slice]
        assert plan.task.window == (one.test if plan.task.kind == "evaluate" else one.train)
        assert plan.n_items == (one.n_items_test if plan.task.kind == "evaluate" else one.n_items)
        if plan.task.kind == "evaluate" and plan.task.personalise:
            assert isinstance(plan.task.personalise.window, TimeWindow)
            assert plan.task.personalise.window.end == one.test.start


@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_happens_in_the_test_window_does_not_touch_the_release(life: Life, tmp_path: Path, index: int) -> None:
    start = life.slices[index].test.start
    other = live(tmp_path, dataset=with_other_items(DATASET, np.asarray(DATASET.log.time) >= start))
    assert other.slices == life.slices
    for place in range(3):
        same = same_bytes(life.released[place].released, other.released[place].released)
        assert same == (place <= index)
        assert same_bytes(life.released[place].counts, other.released[place].counts) == (place <= index)
    assert life.released[index].releases[-1]["rows"] != other.released[index].releases[-1]["rows"]


def test_events_come_in_order(life: Life) -> None:
    rounds = [6, 3, 3]
    expected = [kind for n in rounds for kind in ("slice", *["round"] * n, "evaluate", "release")]
    assert [event.kind for event in life.events] == expected
    slices = [event.record for event in life.events if event.kind == "slice"]
    assert [(one["slice"], one["rounds"], one["done"]) for one in slices] == [(0, 6, 0), (1, 3, 0), (2, 3, 0)]
    assert [event.record["round"] for event in life.events if event.kind == "round"] == [
        n for r in rounds for n in range(r)
    ]
    assert tuple(event.record for event in life.events if event.kind == "release") == life.released[-1].releases


def test_a_checkpoint_comes_every_so_many_rounds_and_after_each_release(life: Life) -> None:
    assert [(state.slice, state.round) for state in life.checkpoints] == [
        (0, 2), (0, 4), (0, 6), (1, 0), (1, 2), (2, 0), (2, 2), (3, 0)
    ]  # fmt: skip


def test_the_same_experiment_gives_the_same_bytes_and_another_seed_gives_others(life: Life, tmp_path: Path) -> None:
    again = live(tmp_path / "again")
    other = live(tmp_path / "other", small_experiment(seed=4))
    assert [s.releases for s in again.released] == [s.releases for s in life.released]
    assert again.released[-1].rounds == life.released[-1].rounds
    assert not same_bytes(other.released[-1].params, life.released[-1].params)


@pytest.mark.parametrize("stop", [0, 3, 5, 6])
def test_going_on_from_any_checkpoint_ends_at_the_same_state(life: Life, tmp_path: Path, stop: int) -> None:
    state = life.checkpoints[stop]
    recipe = Recipe(EXPERIMENT, DATASET.catalog.digest(), lambda: 0.0)
    shutil.copytree(life.registry.root, tmp_path / "registry")  # what the first run left there
    registry = Registry(tmp_path / "registry")
    desk = Desk(registry, DATASET.catalog, lambda state: None, lambda event: None)
    *_, (state, _) = run_stream(state, PoolLink(DATASET, 2), life.slices, recipe, desk)
    final = life.released[-1]
    assert (state.rounds, state.releases) == (final.rounds, final.releases)
    for part in ("params", "average", "memory", "counts"):
        assert same_bytes(getattr(state, part), getattr(final, part)), part
    assert len(registry.list()) == 3


def test_a_slice_without_rounds_releases_what_it_had(tmp_path: Path) -> None:
    life = live(tmp_path, small_experiment(training__later__rounds=0, training__later__warmup=0))
    n = life.slices[0].n_items
    first, second = life.registry.load(1).params, life.registry.load(2).params
    np.testing.assert_array_equal(second["item"][:n], first["item"])
    np.testing.assert_array_equal(second["start"], first["start"])
    assert [record["rounds"] for record in life.released[-1].releases] == [6, 0, 0]


def test_a_node_that_joins_or_leaves_is_noticed_before_the_next_round(tmp_path: Path) -> None:
    class Leaving(PoolLink):
        """Node 101 is gone after four rounds."""

        def nodes(self) -> list[int]:
            gone = sum(plan.task.kind == "fit" for plan in self.plans) > 8
            return [node for node in super().nodes() if not (gone and node == 101)]

    link = Leaving(
        DATASET, 2, {101: lambda verb, reply: [reply] if 101 in link.nodes() else [Reply(101, None, "gone")]}
    )
    life = live(tmp_path, small_experiment(split__later=0), link=link)
    cohorts = [record["cohort"] for record in life.released[-1].rounds]
    refused = [record["refused"] for record in life.released[-1].rounds]
    assert len(cohorts) == 6
    assert refused[-1] == []  # whoever is not there is not asked
    assert life.released[-1].releases[0]["rows"]["release"]["all"]["n"] > 0


LEFT_OUT = small_experiment(split=LeaveOneOutSplit().model_dump())


def test_leave_one_out_is_one_release_that_has_not_seen_the_last_two(tmp_path: Path) -> None:
    life = live(tmp_path / "a", LEFT_OUT)
    [record] = life.released[-1].releases
    assert (record["train_end"], record["parent"], record["n_items"]) == (None, None, len(DATASET.catalog))
    low, high = resolve(DATASET.log, LastWindow(skip=2))
    place = np.arange(len(DATASET.log)) - DATASET.log.offsets[DATASET.log.user]
    other = live(tmp_path / "b", LEFT_OUT, with_other_items(DATASET, place >= high[DATASET.log.user]))
    assert same_bytes(other.released[0].released, life.released[0].released)
    assert other.released[0].releases[0]["rows"] != record["rows"]
    third = live(tmp_path / "c", LEFT_OUT, with_other_items(DATASET, place >= high[DATASET.log.user] - 1))
    assert not same_bytes(third.released[0].released, life.released[0].released)
    assert (low == 0).all()


def test_leave_one_out_on_validation_never_looks_at_the_last(tmp_path: Path) -> None:
    validation = small_experiment(split=LeaveOneOutSplit(test="validation").model_dump())
    life = live(tmp_path / "a", validation)
    last = np.zeros(len(DATASET.log), bool)
    last[DATASET.log.offsets[1:] - 1] = True
    other = live(tmp_path / "b", validation, with_other_items(DATASET, last))
    assert same_bytes(other.released[0].released, life.released[0].released)
    assert other.released[0].releases == life.released[0].releases


@pytest.mark.parametrize(
    ("margin", "own", "parent", "promoted"),
    [
        (None, 0.1, 0.9, True), (0.1, 0.9, 1.0, True), (0.1, 0.89, 1.0, False),
        (0.0, 0.5, 0.5, True), (0.0, 0.4, 0.5, False),
    ],
)  # fmt: skip
def test_a_release_is_promoted_unless_it_is_worse_than_its_parent_beyond_the_margin(
    margin: float | None, own: float, parent: float, promoted: bool
) -> None:
    settings = EvaluationConfig(ks=(5, 10), promotion_margin=margin)
    rows = {
        name: {"all": {"metrics": {"ndcg@5": {"value": value}, "ndcg@10": {"value": 0.0}}}}
        for name, value in (("release", own), ("previous", parent))
    }
    assert worth_promoting(rows, settings) is promoted
    assert worth_promoting({"release": rows["release"]}, settings)
    assert worth_promoting({}, settings)


def test_what_is_not_promoted_is_kept_and_the_run_goes_on_from_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = iter([True, False, True])
    monkeypatch.setattr("fedrec.server.publish.worth_promoting", lambda rows, settings: next(verdicts))
    life = live(tmp_path, small_experiment(evaluation__promotion_margin=0.5))
    rows = life.registry.list()
    assert [(row.version, row.parent, row.promoted, row.current) for row in rows] == [
        (1, None, True, False),
        (2, 1, False, False),
        (3, 1, True, True),
    ]
    assert [record["promoted"] for record in life.released[-1].releases] == [True, False, True]
    parent = life.registry.load(1).params
    assert same_bytes(life.released[1].params, parent)
    assert life.released[1].memory == {}
    first = next(plan for plan in life.plans if plan.slice == 2 and plan.task.kind == "fit")
    np.testing.assert_array_equal(first.params["item"][: len(parent["item"])], parent["item"])
    counted = life.released[-1].counts["counts"].sum()
    assert counted == sum(record["train_rows"] for record in life.released[-1].releases)
    assert life.registry.rollback() == 1
