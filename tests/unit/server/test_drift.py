"""Drift: the test's numbers are the literature's, and an alarm changes one learning rate and is in the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedrec.errors import PrivacyError
from fedrec.models.transfer import DriftConfig
from fedrec.server.drift import check_drift, hurried, page_hinkley, watched
from tests.support import same_bytes, small_experiment
from tests.unit.server.test_teach import live

SETTINGS = DriftConfig(tolerance=0.0, threshold=0.5, speed=3.0)


def rows(own: float, popular: float = 0.1) -> dict[str, Any]:
    return {
        name: {"all": {"metrics": {"ndcg@10": {"value": v}}}} for name, v in (("release", own), ("popularity", popular))
    }


def followed(values: list[float], settings: DriftConfig = SETTINGS) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for value in values:
        records.append({"drift": watched(records, rows(value), settings, 10)})
    return records


def test_the_statistic_is_zero_while_values_fall_and_grows_when_they_rise() -> None:
    assert page_hinkley([5.0, 4.0, 3.0, 2.0], 0.0) == [0.0] * 4
    assert page_hinkley([1.0, 1.0, 2.0], 0.0)[-1] == pytest.approx(2.0 - 4 / 3)
    assert page_hinkley([1.0, 1.0, 2.0], 0.1)[-1] == pytest.approx(2.0 - 4 / 3 - 0.1)


def test_a_lead_that_is_lost_sounds_the_alarm_once() -> None:
    found = [record["drift"]["alarm"] for record in followed([0.2, 0.2, 0.1, 0.1, 0.1])]
    assert found == [False, False, True, False, False]


def test_a_hard_slice_for_everybody_is_no_drift() -> None:
    one = followed([0.2])
    assert not watched(one, rows(0.02, popular=0.01), SETTINGS, 10)["alarm"]


def test_what_was_not_measured_says_nothing() -> None:
    found = watched(followed([0.2]), {}, SETTINGS, 10)
    assert found == {"signal": None, "statistic": 0.0, "alarm": False, "speed": 1.0}
    assert hurried([]) == 1.0
    assert hurried([{"drift": None}]) == 1.0
    assert hurried(followed([0.2, 0.05])) == 3.0


def test_an_alarm_changes_the_next_slice_and_no_other(tmp_path: Path) -> None:
    nervous = {"tolerance": 0.0, "threshold": 1e-9, "speed": 4.0}
    calm, _ = live(tmp_path / "calm", small_experiment(training__drift=nervous | {"threshold": 1e9}))
    hasty, _ = live(tmp_path / "hasty", small_experiment(training__drift=nervous))
    alarms = [record["drift"]["alarm"] for record in hasty[-1].releases]
    assert [record["drift"]["alarm"] for record in calm[-1].releases] == [False] * 3
    released = [next(state for state in states if state.slice == n) for states in (calm, hasty) for n in (1, 2, 3)]
    first = next((n for n, alarm in enumerate(alarms) if alarm), 3)
    for n in range(3):
        assert same_bytes(released[n].params, released[3 + n].params) is (n <= first)


def test_exact_metrics_of_a_private_run_decide_nothing() -> None:
    private = {"mode": "central", "epsilon": 8.0, "metrics": "research"}
    with pytest.raises(PrivacyError, match="decide shows in later releases"):
        check_drift(small_experiment(privacy=private, training__drift={}))
    check_drift(small_experiment(privacy=private | {"metrics": "private"}, training__drift={}))
    check_drift(small_experiment(privacy=private))
