"""A release is asked again what its run asked, and answers the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedrec.data.cleaning import Dataset
from fedrec.errors import ConfigError, FedrecError
from fedrec.grid.evaluate import evaluate
from fedrec.grid.simulate import simulate
from fedrec.server.registry import Registry
from tests.support import dataset_of, small_experiment, small_rows

STUDENT: dict[str, Any] = {
    "model": {"kind": "transformer", "dim": 4, "blocks": 1, "heads": 1, "length": 8}, "steps": 2, "share": 0.9,
    "histories": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> tuple[Registry, dict[str, Any], Dataset]:
    root = tmp_path_factory.mktemp("life")
    data = dataset_of(small_rows())
    data.save(root / "data")
    experiment = small_experiment(data__source=str(root / "data"), training__student=STUDENT)
    document, _ = simulate(experiment, runs=root / "runs", registry=root / "registry")
    return Registry(root / "registry"), json.loads(json.dumps(document)), data


@pytest.mark.parametrize("version", [1, 3])
def test_the_figures_are_those_of_the_run(life: tuple[Registry, dict[str, Any], Dataset], version: int) -> None:
    registry, report, _ = life
    found = json.loads(json.dumps(evaluate(registry.load(version), student=True)))
    [told] = [one for one in report["releases"] if one["version"] == version]
    assert (found["release"], found["slice"], found["learnt"]) == (version, told["slice"], "before")
    for row in ("release", "popularity", "student"):
        assert found["rows"][row] == told["rows"][row]
    assert found["differences"]["popularity"] == told["differences"]["popularity"]


def test_any_release_is_asked_about_any_slice(life: tuple[Registry, dict[str, Any], Dataset], tmp_path: Path) -> None:
    registry, report, data = life
    data.save(tmp_path / "elsewhere")
    back = evaluate(registry.load(3), index=0, source=str(tmp_path / "elsewhere"))
    assert (back["slice"], back["learnt"]) == (0, "after")
    told = report["releases"][0]["rows"]
    assert back["rows"]["popularity"].keys() == told["popularity"].keys()
    assert back["rows"]["release"]["all"]["n"] == told["release"]["all"]["n"]
    assert back["rows"]["release"] != told["release"]


def test_what_cannot_be_answered_is_refused(life: tuple[Registry, dict[str, Any], Dataset]) -> None:
    registry, _, _ = life
    release = registry.load(3)
    with pytest.raises(ConfigError, match=r"no slice 3.*0 to 2"):
        evaluate(release, index=3)
    with pytest.raises(ConfigError, match="no slice -1"):
        evaluate(release, index=-1)
    with pytest.raises(ConfigError, match="another catalogue than 'small': its first 51 items differ"):
        evaluate(release, dataset=dataset_of([("a", f"x{i}", 1_600_000_000 + i) for i in range(80)]))
    with pytest.raises(FedrecError, match="nowhere"):
        evaluate(release, source="nowhere")


def test_a_release_without_a_student_says_so(tmp_path: Path) -> None:
    data = dataset_of(small_rows())
    experiment = small_experiment(split__later=0)
    simulate(experiment, runs=tmp_path / "runs", registry=tmp_path / "registry", dataset=data)
    with pytest.raises(ConfigError, match="Release 1 has no student; leave --student out"):
        evaluate(Registry(tmp_path / "registry").load(1), dataset=data, student=True)
