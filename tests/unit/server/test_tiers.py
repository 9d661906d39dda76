"""Two classes of devices: each trains its own model, nobody both, and each teaches the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.errors import ConfigError
from fedrec.protocol.task import FitTask, Tier
from fedrec.server.state import ServerState
from fedrec.server.tiers import check_tiers, tier_of
from tests.support import same_bytes, small_experiment
from tests.unit.server.test_private import CENTRAL
from tests.unit.server.test_teach import DISTIL, STATISTICS, copied, live

SMALL = {
    "kind": "transformer", "dim": 4, "heads": 2, "expand": 1, "length": 6,
    "softmax": {"kind": "sampled", "negatives": 4},
}  # fmt: skip
TIERS: dict[str, Any] = {
    "training__statistics": STATISTICS,
    "training__distil": DISTIL,
    "training__student": {
        "model": SMALL, "share": 0.6, "steps": 3, "batch": 4, "places": 2, "histories": 8, "length": 5,
    },
    "training__tiers": {"share": 0.4},
    "runtime__checkpoint_every": 1,
    "split__later": 1,
}  # fmt: skip


def test_every_device_belongs_to_exactly_one_tier_for_life() -> None:
    experiment = small_experiment(**TIERS)
    small, large = tier_of(experiment, small=True), tier_of(experiment, small=False)
    assert small is not None
    assert large is not None
    ids = np.arange(5000)
    assert (small.taken(ids) != large.taken(ids)).all()
    assert small.taken(ids).mean() == pytest.approx(0.4, abs=0.03)
    assert (small.taken(ids[::-1])[::-1] == small.taken(ids)).all()
    assert tier_of(small_experiment(), small=True) is None


def test_each_tier_learns_and_is_taught_and_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    experiment = small_experiment(**TIERS)
    states, registry = live(tmp_path / "whole", experiment)
    records = states[-1].releases
    assert ["small" in record["lesson"]["teachers"] for record in records] == [True, True]
    loaded = registry.load("newest")
    assert loaded.student is not None
    assert same_bytes(loaded.student, states[-1].small)
    after = next(state for state in states if state.slice == 1 and state.round == 1)
    published = registry.load(1).student
    assert published is not None
    assert not same_bytes({"start": after.small["start"]}, {"start": published["start"]})
    copied(registry.root, tmp_path / "again", 1)
    again, other = live(tmp_path / "again", experiment, ServerState.from_record(*after.to_record()))
    assert same_bytes(again[-1].small, states[-1].small)
    assert other.manifest("newest") == registry.manifest("newest")


def test_the_tier_is_in_the_plan() -> None:
    tier = {"small": True, "share": 0.5, "key": "0" * 64}
    task = FitTask.model_validate({"window": {"kind": "last", "skip": 0}, "tier": tier})
    assert FitTask.model_validate_json(task.model_dump_json()) == task
    assert isinstance(task.tier, Tier)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training__distil": None}, "Tiers teach each other"),
        ({"training__student": None}, "Tiers teach each other"),
        ({"training__student": {"model": {"kind": "spectral"}}}, "small devices cannot train it"),
        ({"privacy": CENTRAL}, "not accounted for yet"),
    ],
)
def test_impossible_tiers_are_refused(changes: dict[str, Any], said: str) -> None:
    check_tiers(small_experiment(**TIERS))
    with pytest.raises(ConfigError, match=said):
        check_tiers(small_experiment(**TIERS | changes))
