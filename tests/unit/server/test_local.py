"""A whole run in which nobody is trusted: planned and paid agree, ledgers stop clients, the impossible is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedrec.cli import app
from fedrec.config import Experiment
from fedrec.errors import ConfigError, PrivacyError
from fedrec.grid.simulate import LEDGERS, simulate
from fedrec.privacy.accounting import epsilon
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.server.local import client_life, local_mode
from fedrec.server.run import LEDGER, check
from tests.support import dataset_of, merged, small_document, small_rows, to_toml

DATASET = dataset_of(small_rows())
LOCAL: dict[str, Any] = {
    "mode": "local", "epsilon": 20.0, "delta": 1e-3, "noise": "seed", "participations": 3, "metrics": "research",
}  # fmt: skip
WINDOW = {"unit": {"kind": "window", "length": 4, "sampling": 0.5}}


def local(changes: Mapping[str, Any] | None = None, **others: Any) -> Experiment:
    return Experiment.parse(merged(small_document(**others), {"privacy": {**LOCAL, **(changes or {})}}))


@pytest.mark.parametrize(
    ("changes", "unit"), [({}, "user"), (WINDOW, "a window of 4 successive interactions of one person")]
)
def test_a_run_in_which_nobody_is_trusted(tmp_path: Path, changes: dict[str, Any], unit: str) -> None:
    experiment = local(changes)
    document, folder = simulate(experiment, runs=tmp_path, registry=tmp_path / "registry", dataset=DATASET)
    assert document["privacy"]["unit"] == unit
    assert document["privacy"]["epsilon"] == 20.0
    assert "nobody is trusted" in document["privacy"]["statement"]
    assert "NOT covered" in document["privacy"]["statement"]
    assert "protects nobody" in document["privacy"]["statement"]
    assert all(release["epsilon"] == 20.0 for release in document["releases"])
    assert all(record["loss"] is None and record["clipped"] == 0.0 for record in document["rounds"])
    assert not any(record["refused"] for record in document["rounds"])
    assert sum(record["clients"] for record in document["rounds"]) > 0
    assert sum(record["spent"] for record in document["rounds"]) > 0, "12 rounds of 8 of 30 people, 3 each at most"
    assert not (folder / LEDGER).exists()
    books = [PrivacyLedger.read(path) for path in sorted((folder / LEDGERS).iterdir())]
    assert books
    assert all(0 < book.spent() <= 20.0 * (1 + 1e-9) and book.unit == unit for book in books)
    rounds = [sum("round" in entry.name for entry in book.entries()) for book in books]
    assert sum(rounds) == sum(record["clients"] for record in document["rounds"])
    counted = [sum("counts" in entry.name for entry in book.entries()) for book in books]
    full = [book.spent() for book, n, c in zip(books, rounds, counted, strict=True) if (n, c) == (3, 3)]
    mode = local_mode(experiment)
    assert mode is not None
    planned = epsilon([event for _, event in client_life(experiment, mode.scale)], 1e-3)
    assert 19.9 < planned <= 20.0
    assert full == pytest.approx([planned] * len(full), rel=1e-3)


def test_the_same_seed_gives_the_same_run_and_the_system_never_does(tmp_path: Path) -> None:
    def digests(name: str, noise: str) -> list[str]:
        root = tmp_path / name
        document, _ = simulate(local({"noise": noise}), runs=root, registry=root / "r", dataset=DATASET)
        return [release["digest"] for release in document["releases"]]

    assert digests("a", "seed") == digests("b", "seed")
    assert digests("c", "system") != digests("d", "system")


@pytest.mark.parametrize("changes", [{}, pytest.param(WINDOW, marks=pytest.mark.slow)])
def test_a_larger_budget_or_fewer_participations_need_less_noise(changes: dict[str, Any]) -> None:
    def noise(**more: Any) -> float:
        mode = local_mode(local({**changes, **more}))
        assert mode is not None
        return mode.fit.noise_multiplier

    assert noise(epsilon=40.0) < noise() < noise(epsilon=5.0)
    assert noise(participations=1) < noise() < noise(participations=12)
    assert noise(calibrate=False, fit=1.5) == 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "privacy.epsilon"),
        ({"delta": 1.0}, "privacy.delta"),
        ({"metrics": "private"}, "privacy.metrics"),
        ({"unit": {"kind": "window", "sampling": 0.0}}, "privacy.unit.sampling"),
        ({"unit": {"kind": "window", "lenght": 3}}, "lenght"),
        ({"participations": 0}, "privacy.participations"),
        ({"population": 10}, "population"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        local(changes)


def test_exact_metrics_have_to_be_written_down() -> None:
    with pytest.raises(ConfigError, match=r"privacy.metrics' is missing"):
        Experiment.parse(small_document(privacy={"mode": "local", "epsilon": 1.0}))


def test_statistics_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    experiment = local(training__statistics={"features": {"rank": 4, "fourier": 0}})
    with pytest.raises(PrivacyError, match="statistics are not to be had"):
        check(experiment, DATASET)
    with pytest.raises(PrivacyError, match="statistics are not to be had"):
        simulate(experiment, runs=tmp_path, registry=tmp_path / "registry", dataset=DATASET)
    assert not (tmp_path / "small").exists()


def test_the_command_line_plans_what_a_client_spends_and_shows_its_ledger(tmp_path: Path) -> None:
    runner, path = CliRunner(), tmp_path / "local.toml"
    path.write_text(to_toml(small_document(privacy={**LOCAL, **WINDOW})), encoding="utf-8")
    planned = runner.invoke(app, ["privacy", "plan", str(path), "--json"])
    assert planned.exit_code == 0, planned.output
    document = json.loads(planned.output)
    assert document["unit"].startswith("a window of 4")
    assert 19.9 < document["epsilon"] <= 20.0 < document["epsilon_rdp"] * 1.01
    assert [(event["sampling"], event["count"]) for event in document["events"]] == [(1.0, 3), (0.5, 3)]
    text = runner.invoke(app, ["privacy", "plan", str(path), "--population", "5000"])
    assert "one client spends" in text.output
    assert "not below 1 / 5,000" in text.output
    _, folder = simulate(local(), runs=tmp_path, registry=tmp_path / "registry", dataset=DATASET)
    shown = runner.invoke(app, ["privacy", "show", str(sorted((folder / LEDGERS).iterdir())[0])])
    assert "unit: user" in shown.output
