"""The benchmark of a life reads the published blocks as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.life_rows import VARIANTS, fitted, ours, parts_of_ours, spectral
from benchmarks.lifelong import main, over_people, over_seeds, rows_of
from benchmarks.lives import DATASETS, experiment_of, f3crec_blocks, forked, live, shared_base
from fedrec.data.blocks import block_slices
from fedrec.data.slices import resolve
from fedrec.errors import DataError
from fedrec.server.teach import check_distil


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
    for window, items in ((one.train, [19, 22, 23, 24, 25]), (one.test, [27])):  # 19 was kept for validation before
        low, high = resolve(dataset.log, window)
        start = int(dataset.log.offsets[user])
        found = dataset.log.item[start + int(low[user]) : start + int(high[user])]
        assert [int(dataset.catalog.ids[i]) for i in found] == items


def test_missing_blocks_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"TASK_0\.json' is missing"):
        f3crec_blocks(tmp_path, "test")


@pytest.mark.parametrize("what", VARIANTS)
def test_every_variant_is_a_valid_experiment_that_differs_after_the_base(what: str) -> None:
    changes = VARIANTS[what]
    training = experiment_of(fitted("f3crec"), 1, {"training": changes}).training.model_dump()
    plain = experiment_of(fitted("f3crec"), 1).training.model_dump()
    assert (training != plain) is bool(changes)
    assert training["base"] == plain["base"]


@pytest.mark.parametrize("name", DATASETS)
def test_every_part_of_ours_can_be_left_out(name: str) -> None:
    found = [experiment_of(ours(name), 1, changes) for changes in ({}, *parts_of_ours(name).values())]
    assert len({one.digest() for one in found}) == len(found)
    for changed in found:
        check_distil(changed)


def test_a_fork_is_the_life_that_it_stands_for_to_the_last_bit(tmp_path: Path) -> None:
    write_blocks(tmp_path)
    dataset = f3crec_blocks(tmp_path, "test")
    small = {
        "model": {"kind": "transformer", "dim": 4, "length": 6, "softmax": {"kind": "sampled", "negatives": 4}},
        "training": {"cohort": {"kind": "poisson", "expected": 6}, "base": {"rounds": 2}, "later": {"rounds": 0}},
    }
    changed = {"training": {"later": {"rounds": 2}, "ewc": {"strength": 0.1}, "local": {"imitate": 0.5}}}
    with shared_base(experiment_of(small, 1), dataset) as (base, kept):
        other = forked(experiment_of(small, 1, changed), dataset, base, kept)
    whole = live(experiment_of(small, 1, changed), dataset)
    assert [one["digest"] for one in other.releases[1:]] != [one["digest"] for one in base.releases[1:]]
    np.testing.assert_array_equal(other.matrix, whole.matrix)
    assert len(other.seconds) == len(whole.seconds) == 4


def test_a_life_gives_finite_rows_and_an_interval_over_people(tmp_path: Path) -> None:
    write_blocks(tmp_path)
    document = spectral("f3crec")
    one = live(experiment_of(document, 1, {"evaluation": {"replicates": 20}}), f3crec_blocks(tmp_path, "validation"))
    spread = over_people(one)
    assert 0 < spread.low < spread.mean < spread.high
    assert spread.mean == one.life.harmonic
    rows = rows_of("f3crec", "statistic", [one], spread)
    assert all(np.isfinite(row.value) for row in rows)
    assert over_seeds([one]).low == one.life.harmonic


def test_an_unknown_data_set_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "netflix"]) == 2
    assert main(["--part", "some"]) == 2
    assert main(["--seeds", "9"]) == 2
    assert "--only takes one of f3crec, movietweetings, amazon-video." in capsys.readouterr().err
