"""Slices in which little happens: no data, new people only, items that nobody takes any more. Nothing is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.slices import TimeSlice, TimeWindow
from fedrec.server.lifelong import run_stream
from fedrec.server.registry import Registry
from fedrec.server.round import Recipe
from fedrec.server.run import cut
from fedrec.server.state import ServerState
from fedrec.server.work import Desk
from tests.support import PoolLink, dataset_of, small_experiment, small_rows

ROWS = small_rows()
SPECTRAL: dict[str, Any] = {
    "model": {"kind": "spectral", "item_rank": 8, "feature_rank": 0},
    "training__statistics": {"item_share": 1.0, "feature_share": 0.0},
    "training__base": {"rounds": 0},
    "training__later": {"rounds": 0},
}
TAUGHT: dict[str, Any] = {
    "training__statistics": {"item_share": 1.0, "feature_share": 0.0},
    "training__distil": {
        "steps": 3, "batch": 4, "places": 3, "prior": {"item_rank": 4, "feature_rank": 0, "length": 8},
        "transfer": {"histories": 8, "length": 6},
    },
}  # fmt: skip
OURS: dict[str, Any] = {
    "model": {
        "kind": "blend", "prior": {"item_rank": 8, "feature_rank": 0}, "weights": [0.5, 1.0], "follow": "all",
        "fitted": {"kind": "transformer", "dim": 8, "heads": 1, "length": 8},
    },
    "training__statistics": {"item_share": 1.0, "feature_share": 0.0, "recency": 0.5},
    "training__local": {"replay": 0.5},
}  # fmt: skip
MODELS = pytest.mark.parametrize(
    "changes",
    [{}, {"training__ewc": {}, "training__local": {"imitate": 0.5, "replay": 0.5}}, SPECTRAL, TAUGHT, OURS],
    ids=["plain", "guarded", "spectral", "distilled", "blend"],
)


def lived(
    tmp_path: Path, dataset: Dataset, changes: dict[str, Any], slices: Sequence[TimeSlice] | None = None
) -> tuple[ServerState, Registry]:
    experiment = small_experiment(evaluation__local_only={"people": 0}, **changes)
    recipe, registry = Recipe(experiment, dataset.catalog.digest(), lambda: 0.0), Registry(tmp_path)
    state = ServerState("gaps/001", experiment.digest(), recipe.catalog_digest)
    desk = Desk(registry, dataset.catalog, lambda state: None, lambda event: None)
    for reached, _ in run_stream(state, PoolLink(dataset, 2), slices or cut(experiment, dataset), recipe, desk):
        state = reached
    return state, registry


def with_gap(experiment: Experiment, dataset: Dataset) -> list[TimeSlice]:
    """Return the slices with one more in the middle in which nobody did anything."""
    first, *later = cut(experiment, dataset)
    assert isinstance(first.test, TimeWindow)
    edge = first.test.start
    nothing = TimeWindow(start=edge, end=edge)
    validation = None if first.validation is None else nothing
    gap = replace(later[0], train=nothing, validation=validation, test=first.test, n_items=first.n_items)
    return [replace(one, index=i) for i, one in enumerate([first, gap, *later])]


@MODELS
def test_a_slice_without_data_is_released_as_its_parent_was_and_life_goes_on(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    dataset = dataset_of(ROWS)
    state, registry = lived(tmp_path, dataset, changes, with_gap(small_experiment(**changes), dataset))
    assert [record["train_rows"] == 0 for record in state.releases] == [False, True, False, False]
    first, empty = (registry.load(version).params for version in (1, 2))
    for name, value in first.items():
        np.testing.assert_allclose(empty[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert state.releases[1]["parent"] == 1
    assert state.releases[2]["train_rows"] > 0
    assert all(np.isfinite(value).all() for value in registry.load(4).params.values())
    assert registry.verify() == []


@MODELS
def test_a_slice_of_new_people_alone_keeps_what_the_others_taught(tmp_path: Path, changes: dict[str, Any]) -> None:
    start, n = ROWS[0][2], len(ROWS)
    rows = [(f"{'early' if place < n // 2 else 'late'} {u}", i, t) for place, (u, i, t) in enumerate(ROWS)]
    dataset = dataset_of(rows)
    state, registry = lived(tmp_path, dataset, changes)
    assert min(t for u, _, t in rows if u.startswith("late")) - start >= 0
    groups = state.releases[0]["rows"]["release"]
    assert "returning" not in groups
    assert groups["new"]["n"] == groups["all"]["n"] > 0
    counts = state.counts["counts"]
    assert counts.sum() == sum(record["train_rows"] for record in state.releases)
    assert all(np.isfinite(value).all() for value in registry.load(3).params.values())


@MODELS
def test_items_that_vanish_stay_in_the_catalogue_with_their_counts(tmp_path: Path, changes: dict[str, Any]) -> None:
    gone = {f"i{n}" for n in range(6)}
    cut_off = ROWS[len(ROWS) // 2][2]
    rows = [(u, f"i{int(i[1:]) % 14 + 6}" if i in gone and t >= cut_off else i, t) for u, i, t in ROWS]
    dataset = dataset_of(rows)
    state, registry = lived(tmp_path, dataset, changes)
    last = registry.load(3)
    numbers = [last.catalog.ids.index(item) for item in sorted(gone)]
    assert (state.counts["counts"][numbers] > 0).all()
    tables = [v for name, v in last.params.items() if v.ndim == 2 and len(v) == len(last.catalog)]
    assert tables
    assert all(np.abs(table[numbers]).sum() > 0 for table in tables if np.abs(table).sum() > 0)
    if "training__distil" in changes:
        assert all(record["lesson"]["done"] and record["lesson"]["epsilon"] == 0.0 for record in state.releases)
