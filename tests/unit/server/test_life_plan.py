"""A budget over a life: more for the base is paid as planned, and renewing it for every slice is no bargain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedrec.cli import app
from fedrec.errors import PrivacyError
from fedrec.grid.simulate import simulate
from fedrec.privacy.accounting import epsilon
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.server.guard import planned
from fedrec.server.privacy_commands import ways
from fedrec.server.run import LEDGER
from tests.support import small_experiment
from tests.unit.server.test_private import CENTRAL, DATASET, private, spectral


def test_more_for_the_base_is_what_the_ledger_holds_and_spends_the_budget(tmp_path: Path) -> None:
    experiment = private({"later_noise": 2.0})
    document, folder = simulate(experiment, runs=tmp_path, registry=tmp_path / "registry", dataset=DATASET)
    ledger = PrivacyLedger.read(folder / LEDGER)
    noise = {entry.name: entry.event.noise_multiplier for entry in ledger.entries() if "counts" in entry.name}
    assert noise["slice 1: popularity counts"] == pytest.approx(2 * noise["slice 0: popularity counts"])
    assert noise["slice 2: popularity counts"] == noise["slice 1: popularity counts"]
    people = document["privacy"]["scale"]
    life = planned(experiment, (8, 8), people)
    held = [entry.event for entry in ledger.entries()]
    assert 0.97 * 8.0 < ledger.spent() <= 8.0
    assert epsilon(held, 1e-3, "rdp") == pytest.approx(epsilon([e for _, e in life], 1e-3, "rdp"), rel=0.5)


def test_even_planning_is_the_default() -> None:
    alike = [event for _, event in planned(private(), (30, 30), 1.5)]
    assert alike == [event for _, event in planned(private({"later_noise": 1.0}), (30, 30), 1.5)]
    assert alike != [event for _, event in planned(private({"later_noise": 1.1}), (30, 30), 1.5)]


def test_a_budget_per_slice_names_less_than_it_spends_and_equal_parts_waste() -> None:
    found = {way["way"]: way for way in ways(spectral({}), 30)}
    one, anew, parts = found.values()
    assert 7.9 < one["epsilon"] <= 8.0
    assert anew["named"] == 8.0
    assert anew["epsilon"] > 1.5 * 8.0
    assert parts["epsilon"] < 0.9 * 8.0
    assert anew["scale"] < one["scale"] < parts["scale"]


def test_the_command_line_compares() -> None:
    plan = ["privacy", "plan", "quickstart", "--population", "900", "--epsilon", "4", "--compare"]
    document = json.loads(CliRunner().invoke(app, [*plan, "--json"]).output)
    assert [way["named"] for way in document["ways"]] == [4.0] * 3
    assert document["ways"][0]["epsilon"] == pytest.approx(document["epsilon"])
    shown = CliRunner().invoke(app, plan)
    assert shown.exit_code == 0
    assert "spends the large one" in shown.output
    with pytest.raises(PrivacyError):
        ways(small_experiment(), 30)
    assert CENTRAL["epsilon"] == 8.0
