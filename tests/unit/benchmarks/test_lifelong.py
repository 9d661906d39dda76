"""The benchmark of a life reads the published blocks as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.lifelong import FITTED, SPECTRAL, VARIANTS, experiment_of, f3crec_blocks, live, row_of
from fedrec.data.blocks import block_slices
from fedrec.data.slices import resolve
from fedrec.errors import DataError


def write_blocks(folder: Path) -> None:
    for number in range(4):
        taken: dict[str, dict[str, list[int]]] = {"train": {}, "valid": {}, "test": {}}
        for user in range(12):
            items = [(user * 3 + number * 7 + step) % 40 for step in range(6)]
            taken["train"][str(user)] = items[:4]
            taken["valid"][str(user)] = items[4:5]
            taken["test"][str(user)] = items[5:]
        (folder / f"TASK_{number}.json").write_text(json.dumps(taken), encoding="utf-8")


def test_the_blocks_are_read_as_published(tmp_path: Path) -> None:
    write_blocks(tmp_path)
    dataset = f3crec_blocks(tmp_path, "test")
    one = block_slices(dataset, 4)[1]
    user = list(dataset.log.user_ids).index("5")
    for window, items in ((one.train, [22, 23, 24, 25]), (one.test, [27])):
        low, high = resolve(dataset.log, window)
        start = int(dataset.log.offsets[user])
        found = dataset.log.item[start + int(low[user]) : start + int(high[user])]
        assert [int(dataset.catalog.ids[i]) for i in found] == items


def test_missing_blocks_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"TASK_0\.json' is missing"):
        f3crec_blocks(tmp_path, "test")


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_is_a_valid_experiment_that_differs_where_it_says(changes: dict[str, Any]) -> None:
    training = experiment_of(FITTED, changes, 1).training.model_dump()
    plain = experiment_of(FITTED, {}, 1).training.model_dump()
    assert (training != plain) is bool(changes)
    assert training["base"] == plain["base"]


def test_a_life_gives_finite_rows(tmp_path: Path) -> None:
    write_blocks(tmp_path)
    life, seconds = live(experiment_of(SPECTRAL, {}, 1), f3crec_blocks(tmp_path, "validation"))
    rows = row_of("statistic", [life])
    assert len(rows) == 4
    assert all(np.isfinite(row.value) for row in rows)
    assert 0 < life.harmonic <= 1
    assert seconds == 0.0
