"""A run with masked sums: the same life as a central one, whose server never sees a sum without its noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.config import Experiment
from fedrec.errors import PrivacyError
from fedrec.grid.simulate import simulate
from fedrec.privacy.accounting import epsilon
from fedrec.privacy.events import GaussianEvent
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.server.guard import guard_of, planned
from fedrec.server.judge import initial
from fedrec.server.round import Recipe, run_round, take_census
from fedrec.server.run import LEDGER, cut
from fedrec.server.state import ServerState
from tests.support import PoolLink, dataset_of, merged, small_document, small_rows

DATASET = dataset_of(small_rows())
PRIVATE: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-3, "noise": "seed"}
DISTRIBUTED: dict[str, Any] = {**PRIVATE, "mode": "distributed", "secure_sum": {"minimum": 5}}
SPECTRAL: dict[str, Any] = {
    "model": {"kind": "spectral", "item_rank": 0, "feature_rank": 4, "length": 8},
    "training": {
        "statistics": {
            "sketch": "features",
            "item_share": 0.0,
            "feature_share": 1.0,
            "features": {"rank": 4, "fourier": 0},
        },
        "base": {"rounds": 0},
        "later": {"rounds": 0},
    },
}


def spectral(privacy: Mapping[str, Any], *changes: Mapping[str, Any]) -> Experiment:
    document = merged(merged(small_document(), SPECTRAL), {"privacy": dict(privacy)})
    for change in changes:
        document = merged(document, dict(change))
    return Experiment.parse(document)


def fitted(privacy: Mapping[str, Any], expected: float = 15.0) -> Experiment:
    cohort = {"training": {"cohort": {"kind": "poisson", "expected": expected}}}
    return Experiment.parse(merged(merged(small_document(), cohort), {"privacy": dict(privacy)}))


def live(experiment: Experiment, root: Path) -> tuple[dict[str, Any], PrivacyLedger]:
    document, folder = simulate(experiment, runs=root, registry=root / "registry", dataset=DATASET)
    return document, PrivacyLedger.read(folder / LEDGER)


def test_a_life_with_masks_charges_what_a_central_one_does_and_can_be_repeated(tmp_path: Path) -> None:
    masked, book = live(spectral(DISTRIBUTED), tmp_path / "masked")
    again, _ = live(spectral(DISTRIBUTED), tmp_path / "again")
    central, other = live(spectral({**PRIVATE, "mode": "central"}), tmp_path / "central")
    assert masked["privacy"]["mode"] == "distributed"
    assert "masked sums" in masked["privacy"]["statement"]
    assert book.spent() == other.spent() == masked["privacy"]["epsilon"]
    assert [entry.event for entry in book.entries()] == [entry.event for entry in other.entries()]
    assert [r["digest"] for r in masked["releases"]] == [r["digest"] for r in again["releases"]]
    assert [r["digest"] for r in masked["releases"]] != [r["digest"] for r in central["releases"]]


def test_with_hardly_any_noise_a_masked_life_ends_where_a_central_one_does(tmp_path: Path) -> None:
    quiet = {"calibrate": False, "count": 1e-3, "statistics": 1e-3, "metrics_noise": 1e-3, "epsilon": 1e12}
    masked, _ = live(spectral({**DISTRIBUTED, **quiet}), tmp_path / "masked")
    central, _ = live(spectral({**PRIVATE, **quiet, "mode": "central"}), tmp_path / "central")
    for ours, theirs in zip(masked["releases"], central["releases"], strict=True):
        assert ours["train_rows"] == pytest.approx(theirs["train_rows"], abs=2)
        a, b = (row["rows"]["release"]["all"]["metrics"] for row in (ours, theirs))
        # Counts that are rounded to a grid turn the space of features a little, which moves single ranks.
        assert a["ndcg@10"]["value"] == pytest.approx(b["ndcg@10"]["value"], abs=1e-2)
        assert b["ndcg@10"]["value"] > 0.05


def test_clients_who_fall_silent_leave_the_charge_and_the_release_as_they_are(tmp_path: Path) -> None:
    silent = {**DISTRIBUTED, "secure_sum": {"minimum": 5, "simulated_dropouts": 0.2}}
    document, book = live(spectral(silent), tmp_path)
    assert 7.9 < book.spent() <= 8.0
    assert len(document["releases"]) == spectral(silent).n_slices


def test_nothing_is_claimed_from_sampling_against_a_server_that_draws_the_cohort() -> None:
    rates = {}
    for against in ("server", "readers"):
        life = planned(fitted({**DISTRIBUTED, "against": against}), (40, 40), 1.0)
        rates[against] = {e.sampling for name, e in life if "rounds" in name and isinstance(e, GaussianEvent)}
    assert rates == {"server": {1.0}, "readers": {15.0 / 40.0}}


def test_rounds_of_training_are_masked_too_and_charged_as_planned(tmp_path: Path) -> None:
    experiment = fitted({**DISTRIBUTED, "metrics": "research", "population": 30})
    document, book = live(experiment, tmp_path)
    trained = [record for record in document["rounds"] if record["clients"]]
    assert len(trained) > len(document["rounds"]) / 2
    assert all(record["update_norm"] > 0 for record in trained)
    assert {e.event.sampling for e in book.entries() if isinstance(e.event, GaussianEvent)} == {1.0}
    life = [event for _, event in planned(experiment, (30, 30), document["privacy"]["scale"])]
    assert book.spent() == pytest.approx(epsilon(life, 1e-3), rel=1e-3)


def test_a_round_with_too_few_clients_is_abandoned_and_paid() -> None:
    experiment = fitted({**DISTRIBUTED, "secure_sum": {"minimum": 14}, "population": 1000}, expected=14.0)
    ledger = PrivacyLedger(None, epsilon=8.0, delta=1e-3)
    recipe = Recipe(experiment, DATASET.catalog.digest(), lambda: 0.0, guard_of(experiment, ledger, 1000))
    base, link = cut(experiment, DATASET)[0], PoolLink(DATASET, 2)
    params = initial(experiment.model, base.n_items, recipe)
    state = ServerState("small/001", experiment.digest(), DATASET.catalog.digest(), params=params)
    moved, record = run_round(state, link, recipe, base, take_census(link, base.train, recipe))
    assert "abandoned" in record["refused"][0]["reason"]
    assert "fewer than the 14" in record["refused"][0]["reason"]
    assert len(ledger.entries()) == 1
    assert moved.round == 1
    for name, value in params.items():
        np.testing.assert_array_equal(moved.params[name], value)


@pytest.mark.parametrize(
    ("experiment", "people", "words"),
    [
        (spectral(DISTRIBUTED, {"training": {"statistics": {"sketch": "pairs"}}}), 40, "sparse, which would tell"),
        (spectral({**DISTRIBUTED, "secure_sum": {"minimum": 50}}), 40, "needs 50 clients at least, but only 40"),
        (fitted({**DISTRIBUTED, "secure_sum": {"minimum": 20}}), 40, "cohort of 15 is smaller than the 20"),
    ],
)
def test_what_masks_cannot_keep_is_refused_before_anything_is_sent(
    experiment: Experiment, people: int, words: str, tmp_path: Path
) -> None:
    with pytest.raises(PrivacyError, match=words):
        planned(experiment, (people, people), 1.0)


def test_too_few_people_stop_a_run_before_it_writes_anything(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="needs 500 clients at least, but only 29 are there"):
        live(spectral({**DISTRIBUTED, "secure_sum": {"minimum": 500}}), tmp_path)
    assert not list(tmp_path.rglob("*.jsonl"))
