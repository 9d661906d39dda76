"""The whole audit: one document, one page, one table, and an exit code that says whether the claim holds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from typer.testing import CliRunner

from fedrec.audit.audit import AuditSettings, audit
from fedrec.audit.life import auditable
from fedrec.cli import app
from fedrec.client import pool
from fedrec.config import Experiment
from fedrec.data.sources import load_dataset
from fedrec.errors import PrivacyError
from fedrec.evaluation.audit_page import _epsilons, print_audit, render_audit, write_audit
from fedrec.evaluation.plots import HALF
from fedrec.params import scale
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.protocol.tally import Expectation
from tests.support import dataset_of, merged, small_document, small_rows, to_toml

DATASET = dataset_of(small_rows(n_users=60, n=1500))
LIGHT = AuditSettings(canaries=300, people=8)
PRIVATE: dict[str, Any] = {
    "model": {"kind": "spectral", "item_rank": 5, "feature_rank": 4, "length": 8},
    "training": {
        "statistics": {"features": {"rank": 4, "fourier": 0}},
        "base": {"rounds": 0},
        "later": {"rounds": 0},
    },
    "privacy": {"mode": "central", "epsilon": 2.0, "delta": 1e-5, "noise": "seed", "metrics": "research"},
}


def experiment(private: bool, **changes: Any) -> Experiment:
    document = merged(small_document(**changes), PRIVATE)
    return Experiment.parse(document if private else {k: v for k, v in document.items() if k != "privacy"})


@pytest.fixture(scope="module")
def sound() -> dict[str, Any]:
    return audit(experiment(True), DATASET, LIGHT, command="fedrec audit small.toml")


@pytest.fixture(scope="module")
def bare() -> dict[str, Any]:
    return audit(experiment(False), DATASET, LIGHT)


@pytest.fixture
def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def noised(self: GaussianMechanism, total: Any, expected_cohort: float, charge: Any, noise: Any) -> Any:
        return scale(total, 1.0 / expected_cohort)

    monkeypatch.setattr(GaussianMechanism, "noised", noised)


def test_a_sound_run_holds_and_the_document_is_json(sound: dict[str, Any]) -> None:
    assert json.loads(json.dumps(sound, allow_nan=False))["holds"] is True
    assert [row["attack"] for row in sound["bounds"]] == ["canaries", "noise", "people"]
    for row in sound["bounds"]:
        assert 0 <= row["audited"] <= row["claimed"] <= 2.0
    assert {row["view"] for row in sound["uploads"]} == {"upload", "noised"}
    assert "cannot prove one" in sound["verdict"]
    assert sum(sound["scores"]["in"]) + sum(sound["scores"]["out"]) == 300


def test_a_run_without_privacy_is_said_to_leak_with_the_figure(bare: dict[str, Any]) -> None:
    assert bare["holds"] is None
    assert bare["verdict"].startswith("LEAKING")
    canaries, noise, _ = bare["bounds"]
    assert canaries["audited"] > 2
    assert f"{canaries['audited']:.2f}" in bare["verdict"]
    assert noise["unbounded"]
    assert noise["audited"] is None
    assert {row["view"] for row in bare["uploads"]} == {"upload"}
    assert min(row["auc_low"] for row in bare["uploads"]) > 0.5


def test_the_same_seed_gives_the_same_audit(sound: dict[str, Any]) -> None:
    assert audit(experiment(True), DATASET, LIGHT, command="fedrec audit small.toml") == sound


def test_an_audit_without_noise_is_broken(without_noise: None) -> None:
    found = audit(experiment(True), DATASET, LIGHT)
    assert found["holds"] is False
    assert found["verdict"].startswith("BROKEN")
    assert [row["exceeded"] for row in found["bounds"]][:2] == [True, True]


def test_people_who_are_not_clipped_break_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Canaries are clipped by the same function; here the pool forgets to use it on real people's counts."""
    monkeypatch.setattr(pool, "clip_factors", lambda norms, bound: np.ones(len(norms), np.float32))
    monkeypatch.setattr(Expectation, "check", lambda self, tally: None)
    found = audit(experiment(True, privacy__count_clip=0.5), DATASET, LIGHT)
    assert found["holds"] is False
    assert found["longest"] > 1.001
    assert "times the norm" in found["verdict"]


def test_the_page_stands_alone_and_says_what_the_document_says(
    sound: dict[str, Any], bare: dict[str, Any], tmp_path: Path
) -> None:
    page = write_audit(sound, tmp_path / "new")
    text = page.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "new" / "audit.json").read_text(encoding="utf-8")) == sound
    assert "<script" not in text
    assert 'src="' not in text
    assert "No attack passed the claim" in text
    assert text.count("<svg") == 2
    assert ":root {" in text  # the style of the run report
    assert "Not private: leaking" in render_audit(bare)
    assert "LEAKING" in render_audit(bare)
    assert render_audit(sound) == text


def test_the_claim_is_named_beside_its_line_and_covers_nothing(sound: dict[str, Any]) -> None:
    for claimed in (0.05, 2.0, 8.0):  # at the left end, among the bars, far beyond them
        figure = Figure(figsize=HALF, layout="constrained")
        ax = figure.subplots()
        _epsilons(ax, {**sound, "claim": {**sound["claim"], "epsilon": claimed}})
        figure.draw_without_rendering()
        *labels, name = (text.get_window_extent() for text in ax.texts)
        assert ax.texts[-1].get_text() == f"claimed: {claimed:g}"
        assert name.y0 > ax.bbox.y1
        assert figure.bbox.contains(name.x0, name.y0)
        assert figure.bbox.contains(name.x1, name.y1)
        assert not any(label.overlaps(name) for label in labels)


def test_the_table_prints_claims_beside_findings(
    sound: dict[str, Any], bare: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    print_audit(sound, Console(width=100))
    print_audit(bare, Console(width=100))
    told, leaking = capsys.readouterr().out.split("No attack passed")
    assert "not refuted" in told
    assert f"{sound['bounds'][0]['claimed']:.3f}" in told
    assert "no noise at all" in leaking
    assert leaking.count("LEAKING") > 4


def test_modes_that_cannot_be_attacked_are_refused() -> None:
    with pytest.raises(PrivacyError, match=r'in privacy\.mode "local" each client'):
        auditable(cast(Experiment, SimpleNamespace(privacy=SimpleNamespace(mode="local"))))


class TestVerb:
    @pytest.fixture
    def toml(self, tmp_path: Path) -> Path:
        DATASET.save(tmp_path / "data")
        load_dataset(str(tmp_path / "data"))
        path = tmp_path / "small.toml"
        document = merged(small_document(data__source=str(tmp_path / "data")), PRIVATE)
        path.write_text(to_toml(document), encoding="utf-8")
        return path

    def test_prints_json_writes_a_page_and_exits_with_0(self, toml: Path, tmp_path: Path) -> None:
        arguments = ["audit", str(toml), "--canaries", "100", "--json", "--out", str(tmp_path / "out")]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["holds"] is True
        assert (tmp_path / "out" / "audit.html").is_file()

    def test_exits_with_1_if_the_claim_is_broken(self, toml: Path, without_noise: None) -> None:
        done = CliRunner().invoke(app, ["audit", str(toml), "--canaries", "100"])
        assert done.exit_code == 1
        assert "BROKEN" in done.stdout

    def test_audits_at_another_budget(self, toml: Path) -> None:
        done = CliRunner().invoke(app, ["audit", str(toml), "--canaries", "50", "--epsilon", "0.5", "--json"])
        assert json.loads(done.stdout)["claim"]["epsilon"] == pytest.approx(0.5, rel=0.01)


@pytest.mark.slow
def test_movielens_at_epsilon_8_keeps_its_claim() -> None:
    settings = Experiment.find("ml100k_private")
    found = audit(settings, load_dataset(settings.data.source), AuditSettings(canaries=1000))
    assert found["holds"] is True
    canaries, noise, _ = found["bounds"]
    assert canaries["audited"] > 0.5
    assert 7.0 < noise["audited"] <= noise["claimed"] <= 8.0
    alone = {row["part"]: row for row in found["uploads"] if row["view"] == "upload"}
    assert min(row["recall"] for row in alone.values()) > 0.9
    assert max(row["auc"] for row in found["uploads"] if row["view"] == "noised") < 0.6
