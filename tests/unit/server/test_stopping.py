"""A slice's rounds end when validation has had enough, and what it liked best is released."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.config import Experiment
from fedrec.errors import ConfigError
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.server.guard import planned
from fedrec.server.lifelong import run_stream
from fedrec.server.registry import Registry
from fedrec.server.round import Recipe
from fedrec.server.run import LEDGER, check, cut
from fedrec.server.state import ServerState
from fedrec.server.work import Desk
from tests.support import PoolLink, dataset_of, same_bytes, simulated, small_experiment, small_rows

DATASET = dataset_of(small_rows())
HASTY: dict[str, Any] = {
    "training__server": {"kind": "sgd", "learning_rate": 40.0},  # so fast that it soon does harm
    "training__base": {"rounds": 12},
    "training__later": {"rounds": 2},
    "training__stopping": {"every": 1, "patience": 2},
    "runtime__checkpoint_every": 1,
    "evaluation__local_only": {"people": 0},
}


def live(root: Path, experiment: Experiment, begin: ServerState | None = None) -> tuple[list[ServerState], Registry]:
    recipe = Recipe(experiment, DATASET.catalog.digest(), lambda: 0.0)
    found: list[ServerState] = []
    desk = Desk(Registry(root), DATASET.catalog, found.append, lambda event: None)
    state = begin or ServerState("small/001", experiment.digest(), recipe.catalog_digest)
    for _ in run_stream(state, PoolLink(DATASET, 1), cut(experiment, DATASET)[:1], recipe, desk):
        pass
    return found, desk.registry


def test_rounds_end_early_the_best_is_released_and_a_killed_run_ends_at_the_same_round(tmp_path: Path) -> None:
    experiment = small_experiment(**HASTY)
    states, registry = live(tmp_path / "a", experiment)
    record = states[-1].releases[0]
    tried, best = record["stopping"]["tried"], record["stopping"]["round"]
    assert record["stopping"]["ended"]
    assert record["rounds"] == len(tried) == best + 2 < 12
    assert tried[best - 1] == max(tried)
    then = next(state for state in states if state.round == best)
    assert same_bytes(registry.load(1).params, then.released)
    middle = next(state for state in states if state.round == best + 1)
    again, other = live(tmp_path / "b", experiment, ServerState.from_record(*middle.to_record()))
    assert other.manifest("newest") == registry.manifest("newest")
    assert again[-1].releases[0]["stopping"] == record["stopping"]


def test_a_private_run_plans_and_pays_for_every_question(tmp_path: Path) -> None:
    central = {"mode": "central", "epsilon": 8.0, "delta": 1e-3, "noise": "seed", "population": 29}
    experiment = small_experiment(**HASTY | {"training__server": {"kind": "sgd"}, "training__base": {"rounds": 3}},
                                  privacy=central, split__later=0)  # fmt: skip
    wanted = [event for name, event in planned(experiment, (29, 29), 1.0) if name.endswith("validation of the rounds")]
    assert [event.count for event in wanted] == [3]  # type: ignore[union-attr]
    document, folder = simulated(experiment, DATASET, tmp_path)
    names = [entry.name for entry in PrivacyLedger.read(next(Path(tmp_path).rglob(LEDGER))).entries()]
    asked = len(document["releases"][0]["stopping"]["tried"])
    assert sum("metrics of round" in name for name in names) == asked >= 1
    assert document["privacy"]["epsilon"] <= 8.0
    assert folder is not None


def test_a_device_may_train_its_own_copy_before_the_test(tmp_path: Path) -> None:
    adapt = {"steps": 5, "learning_rate": 0.5}
    experiment = small_experiment(evaluation__adapt=adapt, evaluation__local_only={"people": 0}, split__later=0)
    document, registry = simulated(experiment, DATASET, tmp_path)
    rows = document["releases"][0]["rows"]
    assert rows["adapted"]["all"]["n"] == rows["release"]["all"]["n"]
    assert rows["adapted"] != rows["release"]
    plain, other = simulated(small_experiment(evaluation__local_only={"people": 0}, split__later=0), DATASET,
                             tmp_path / "plain")  # fmt: skip
    assert plain["releases"][0]["rows"]["release"] == rows["release"]
    assert np.array_equal(registry.load(1).params["item"], other.load(1).params["item"])


def test_what_cannot_adapt_or_stop_is_refused() -> None:
    spectral = small_experiment(
        model={"kind": "spectral"}, training__statistics={}, training__base={"rounds": 0},
        training__later={"rounds": 0}, evaluation__adapt={},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="cannot train a model"):
        check(spectral, DATASET)
    local = small_experiment(
        privacy={"mode": "local", "epsilon": 8.0, "delta": 1e-5, "metrics": "research"}, training__stopping={}
    )
    with pytest.raises(ConfigError, match="nobody pays for validation"):
        check(local, DATASET)
