"""Privacy that cannot be had is refused by the command line in one sentence, before anything is sent or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedrec.cli import app
from fedrec.errors import FedrecError
from tests.support import dataset_of, fedrec, merged, small_document, small_rows, to_toml

CENTRAL: dict[str, Any] = {"mode": "central", "epsilon": 8.0, "delta": 1e-3, "metrics": "research"}
MASKED: dict[str, Any] = {"mode": "distributed", "epsilon": 8.0, "delta": 1e-3, "metrics": "research"}


def written(root: Path, *changes: dict[str, Any]) -> Path:
    dataset_of(small_rows()).save(root / "data")
    document = small_document(data__source=str(root / "data"))
    document["training"].pop("cohort", None)
    for change in changes:
        document = merged(document, change)
    path = root / "small.toml"
    path.write_text(to_toml(document), encoding="utf-8")
    return path


def simulated(path: Path) -> FedrecError:
    """Run the experiment, and return why it was refused; no ledger, release or report may be left."""
    root = path.parent
    done = CliRunner().invoke(
        app, ["simulate", str(path), "--out", str(root / "runs"), "--registry", str(root / "registry")]
    )
    assert isinstance(done.exception, FedrecError), (done.output, done.exception)
    assert not list(root.rglob("ledger.jsonl"))
    assert not list(root.rglob("report.json"))
    return done.exception


@pytest.mark.parametrize(
    ("privacy", "cohort", "words"),
    [
        ({**CENTRAL, "epsilon": 0.0}, {}, "privacy.epsilon"),
        ({**CENTRAL, "epsilon": -2.0}, {}, "privacy.epsilon"),
        ({**CENTRAL, "delta": 1.0}, {}, "privacy.delta"),
        (CENTRAL, {"kind": "fixed", "size": 5}, "fixed size"),
        (CENTRAL, {"kind": "turns", "groups": 3}, "not sampled"),
        ({**MASKED, "secure_sum": {"threshold": 0.4}}, {}, "threshold"),
        ({**MASKED, "secure_sum": {"minimum": 2}}, {}, "minimum"),
        ({**MASKED, "secure_sum": {"minimum": 500}}, {}, "500"),
    ],
)
def test_bad_privacy_is_refused_before_anything_is_written(
    privacy: dict[str, Any], cohort: dict[str, Any], words: str, tmp_path: Path
) -> None:
    training = {"training": {"cohort": cohort or {"kind": "poisson", "expected": 8.0}}}
    path = written(tmp_path, training, {"privacy": privacy})
    sentence = str(simulated(path))
    assert words in sentence
    assert sentence.endswith((".", "?"))


def test_a_release_that_passes_the_budget_stops_the_run_before_it_is_paid(tmp_path: Path) -> None:
    cohort = {"training": {"cohort": {"kind": "poisson", "expected": 8.0}}}
    tight = {"privacy": {**CENTRAL, "epsilon": 0.01, "calibrate": False}}
    path = written(tmp_path, cohort, tight)
    done = CliRunner().invoke(
        app, ["simulate", str(path), "--out", str(tmp_path / "runs"), "--registry", str(tmp_path / "registry")]
    )
    assert type(done.exception).__name__ == "BudgetExhausted", done.output
    [ledger] = tmp_path.rglob("ledger.jsonl")
    assert len(ledger.read_text(encoding="utf-8").splitlines()) == 1  # the header: nothing was paid


def test_a_run_whose_budget_is_spent_is_refused_again_when_it_is_resumed_and_sends_nothing(tmp_path: Path) -> None:
    cohort = {"training": {"cohort": {"kind": "poisson", "expected": 8.0}}}
    path = written(tmp_path, cohort, {"privacy": {**CENTRAL, "calibrate": False, "count": 0.5, "fit": 0.5}})
    where = ("--out", tmp_path / "runs", "--registry", tmp_path / "registry")
    first = fedrec("simulate", path, *where, root=tmp_path)
    again = fedrec("simulate", path, *where, "--resume", root=tmp_path)
    [ledger] = tmp_path.rglob("ledger.jsonl")
    paid = ledger.read_bytes()
    once_more = fedrec("simulate", path, *where, "--resume", root=tmp_path)
    for result in (first, again, once_more):
        assert result.returncode == 1
        assert result.stdout == ""
        [sentence] = [line for line in result.stderr.splitlines() if line.startswith("fedrec: ")]
        assert "budget" in sentence
        assert sentence.endswith(".")
        assert "Traceback" not in result.stderr
    # Whatever is sent is paid for first: a ledger that did not grow says that nothing was.
    assert len(paid.splitlines()) > 1
    assert ledger.read_bytes() == paid


def test_a_delta_of_one_over_the_people_is_warned_about(tmp_path: Path) -> None:
    path = written(tmp_path, {"training": {"cohort": {"kind": "poisson", "expected": 8.0}}}, {"privacy": CENTRAL})
    done = CliRunner().invoke(app, ["privacy", "plan", str(path), "--delta", "0.05", "--population", "40"])
    assert done.exit_code == 0, done.output
    assert "40 people" in done.output
    assert "delta" in done.stderr
