"""Secrets are fair coins; a model that remembers is caught, a private one is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedrec.audit.membership import attack, draw, whole, without
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.slices import resolve
from fedrec.errors import PrivacyError
from fedrec.random import Key
from fedrec.server.run import cut
from tests.support import START, dataset_of, small_rows

SMALL = dataset_of(small_rows())


def strangers(n_users: int = 120, n_items: int = 300, length: int = 8) -> Dataset:
    """Return people who have nothing in common: whatever predicts one of them was learnt from that one."""
    random = Key.from_seed(4).child("strangers").numpy()
    rows = []
    for step in range(length + 2):
        for user in range(n_users):
            rows.append((f"u{user}", f"i{int(random.integers(n_items))}", START + 60 * (step * n_users + user)))
    return dataset_of(rows)


STRANGERS = strangers()


def experiment(privacy: dict[str, Any] | None = None) -> Experiment:
    document: dict[str, Any] = {
        "name": "strangers",
        "split": {"kind": "leave_one_out"},
        "model": {"kind": "spectral", "item_rank": 200, "feature_rank": 0, "popularity_weight": 0.0, "length": 8},
        "training": {
            "statistics": {"item_share": 1.0, "feature_share": 0.0, "decay": 0.5},
            "base": {"rounds": 0},
            "later": {"rounds": 0},
        },
    }
    return Experiment.parse(document | ({"privacy": privacy} if privacy else {}))


def test_secrets_are_two_different_interactions_in_the_window() -> None:
    window = whole(cut(experiment(), STRANGERS))
    secrets = draw(STRANGERS.log, window, Key.from_seed(1))
    low, high = resolve(STRANGERS.log, window, secrets.able)
    for place in (secrets.kept, secrets.dropped):
        assert (low <= place).all()
        assert (place < high).all()
    assert (secrets.kept != secrets.dropped).all()
    assert abs(float(secrets.member.mean()) - 0.5) < 0.2
    assert abs(float((secrets.kept < secrets.dropped).mean()) - 0.5) < 0.2


def test_the_run_sees_members_only_and_none_of_the_dropped() -> None:
    secrets = draw(SMALL.log, whole(cut(experiment(), SMALL)), Key.from_seed(1))
    log = without(SMALL.log, secrets, secrets.member)
    dropped = dict(zip(secrets.able.tolist(), secrets.dropped.tolist(), strict=True))
    assert log.n_users == SMALL.log.n_users
    for user in range(log.n_users):
        expected = SMALL.log.history(user)
        if user in dropped:
            expected = np.delete(expected, dropped[user])
        assert log.history(user).tolist() == (expected.tolist() if secrets.member[user] else [])


def attacked(settings: Experiment, seed: int = 1, shadows: int = 0) -> Any:
    return attack(settings, STRANGERS, cut(settings, STRANGERS), 1e-5, 0.95, Key.from_seed(seed), shadows=shadows)


def test_a_model_without_noise_remembers_people_and_interactions() -> None:
    found = attacked(experiment())
    assert found.person.auc_low > 0.8
    assert found.interaction.auc_low > 0.6
    assert found.bound.epsilon > 0.7
    assert found.person.members + found.person.others == 120


def test_shadow_runs_leave_what_is_told_of_a_person_apart() -> None:
    assert attacked(experiment(), shadows=2).person.auc_low > 0.8


def test_noise_brings_both_attacks_to_chance() -> None:
    private = experiment({"mode": "central", "epsilon": 0.5, "delta": 1e-5, "noise": "seed", "metrics": "research"})
    found = [attacked(private, seed) for seed in (1, 2, 3)]
    for kind in ("person", "interaction"):  # an interval of 95 % may miss once
        detections = [getattr(one, kind) for one in found]
        assert sum(one.auc_low < 0.5 < one.auc_high for one in detections) >= 2
        assert all(one.auc_low < 0.6 for one in detections)
    assert max(one.bound.epsilon for one in found) <= 0.5


def test_a_handful_of_people_is_refused() -> None:
    few = dataset_of([(f"u{n % 2}", f"i{n % 7}", START + n) for n in range(20)])
    settings = experiment()
    with pytest.raises(PrivacyError, match="Too few people"):
        attack(settings, few, cut(settings, few), 1e-5, 0.95, Key.from_seed(1))
