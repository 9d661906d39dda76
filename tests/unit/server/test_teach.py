"""A slice ends with teaching: who teaches, that it resumes, and what is impossible is said in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.config import Experiment
from fedrec.errors import ConfigError
from fedrec.server.lifelong import run_stream
from fedrec.server.registry import Registry
from fedrec.server.release import Student
from fedrec.server.round import Recipe
from fedrec.server.run import cut
from fedrec.server.state import ServerState
from fedrec.server.teach import check_distil, reliability
from fedrec.server.work import Desk
from tests.support import PoolLink, dataset_of, same_bytes, small_experiment, small_rows

DATASET = dataset_of(small_rows())
PRIOR = {"item_rank": 4, "feature_rank": 0, "length": 8}
DISTIL: dict[str, Any] = {
    "steps": 4, "batch": 4, "places": 3, "prior": PRIOR, "transfer": {"histories": 8, "length": 6, "previous": 1.0},
}  # fmt: skip
STATISTICS = {"item_share": 1.0, "feature_share": 0.0}


def experiment_of(**changes: Any) -> Experiment:
    settings = {"training__statistics": STATISTICS, "training__distil": DISTIL, "runtime__checkpoint_every": 1}
    return small_experiment(**settings | changes)


def live(root: Path, experiment: Experiment, begin: ServerState | None = None) -> tuple[list[ServerState], Registry]:
    """Return every state that was stored, the last release included."""
    recipe = Recipe(experiment, DATASET.catalog.digest(), lambda: 0.0)
    found: list[ServerState] = []
    desk = Desk(Registry(root), DATASET.catalog, found.append, lambda event: None)
    state = begin or ServerState("small/001", experiment.digest(), recipe.catalog_digest)
    for _ in run_stream(state, PoolLink(DATASET, 1), cut(experiment, DATASET), recipe, desk):
        pass
    return found, desk.registry


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[ServerState], Registry]:
    return live(tmp_path_factory.mktemp("life"), experiment_of())


def test_every_release_says_who_taught_it_and_that_it_was_free(life: tuple[list[ServerState], Registry]) -> None:
    states, registry = life
    lessons = [record["lesson"] for record in states[-1].releases]
    assert [set(lesson["teachers"]) for lesson in lessons] == [
        {"fitted", "statistic"}, {"fitted", "statistic", "previous"}, {"fitted", "statistic", "previous"},
    ]  # fmt: skip
    assert [lesson["epsilon"] for lesson in lessons] == [0.0] * 3
    assert all(lesson["step"] == 4 and lesson["done"] for lesson in lessons)
    assert lessons[1]["teachers"]["previous"]["knows"] < 1.0  # items joined
    assert registry.manifest("newest").lesson == lessons[-1]


def test_what_is_released_is_the_student_and_the_next_slice_begins_with_it(
    life: tuple[list[ServerState], Registry], tmp_path: Path
) -> None:
    states, registry = life
    untaught, _ = live(tmp_path, experiment_of(training__distil=None))
    assert not same_bytes(untaught[-1].released, states[-1].released)
    after = next(state for state in states if state.slice == 1)
    assert same_bytes(registry.load(1).params, after.released)
    assert (after.study, after.average) == ({}, {})


def test_a_state_stored_in_the_middle_of_teaching_goes_on_to_the_same_bytes(
    life: tuple[list[ServerState], Registry], tmp_path: Path
) -> None:
    states, registry = life
    middle = [state for state in states if state.study]
    assert {state.lesson["step"] for state in middle} == {1, 2, 3}
    chosen = next(state for state in middle if state.slice == 1 and state.lesson["step"] == 2)
    began = next(state for state in states if state.slice == 1)
    for number, begin in enumerate((chosen, began)):
        root = tmp_path / str(number)
        copied(registry.root, root, 1)
        again, other = live(root, experiment_of(), ServerState.from_record(*begin.to_record()))
        assert same_bytes(again[-1].params, states[-1].params)
        assert other.manifest("newest") == registry.manifest("newest")


def copied(source: Path, target: Path, n_releases: int) -> None:
    """Copy a registry as it was after its first releases, by publishing them again."""
    old, new = Registry(source), Registry(target)
    for version in range(1, n_releases + 1):
        one = old.load(version)
        m = one.manifest
        new.publish(
            one.params, one.catalog, run=m.run, slice=m.slice, parent=m.parent, model=m.model, experiment=m.experiment,
            experiment_digest=m.experiment_digest, metrics=m.metrics, privacy=m.privacy, lesson=m.lesson,
            student=None if m.student is None else Student(m.student["model"], one.student or {}, m.student["facts"]),
        )  # fmt: skip


def test_noise_lowers_what_the_statistic_is_trusted_with() -> None:
    counts = np.array([0.0, 1.0, 3.0, 30.0], np.float32)
    assert reliability({"counts": counts}, 4).tolist() == [0.0, 1.0, 1.0, 1.0]
    noised = reliability({"counts": counts, "count_variance": np.float32([4.0])}, 4)
    assert noised == pytest.approx([0.0, 0.0, 5 / 9, 896 / 900])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training__statistics": None}, "but none is gathered"),
        (
            {"training__distil": DISTIL | {"statistic": 0.0, "fitted": 0.0, "transfer": {"statistic": 0.0}}},
            "no previous",
        ),
        ({"training__distil": DISTIL | {"transfer": {"statistic": 0.0, "fitted": 0.0}}}, "first slice histories"),
        ({"training__distil": DISTIL | {"statistic": 0.0}}, "does not teach"),
        ({"model": {"kind": "spectral"}}, "is made from the statistic and not taught"),
    ],
)
def test_what_cannot_teach_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_distil(experiment_of(**changes))
    check_distil(replace_distil(None))


def replace_distil(distil: None) -> Experiment:
    return experiment_of(training__distil=distil, training__statistics=None)
