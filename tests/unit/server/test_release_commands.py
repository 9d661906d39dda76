"""`fedrec releases`: what it prints for people, what it prints for machines, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fedrec.data.catalog import ItemCatalog
from fedrec.errors import CorruptRelease, RegistryError
from fedrec.server.registry import Registry

if TYPE_CHECKING:
    from click.testing import Result

# Flower holds typer below 0.21, at whose import click 8.5 warns: so it is imported inside the tests only.
pytestmark = pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")

RUN = "spring [bold]tide[/bold]"


def ndcg(value: float) -> dict[str, Any]:
    found = {"value": value, "low": value - 0.01, "high": value + 0.01}
    return {"all": {"n": 100, "metrics": {"ndcg@10": found}}}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "r", now=lambda: 86_400 * 365)
    items = ItemCatalog(("i",), ("t",), ((),), np.zeros(1, np.int64))
    metrics: list[dict[str, Any]] = [{"release": ndcg(0.25), "popularity": ndcg(0.125)}, {}, {"release": {"all": None}}]
    for slice, measured in enumerate(metrics):
        registry.publish(
            {"w": np.full(2, slice)},
            items,
            run=RUN,
            slice=slice,
            parent=slice or None,
            model={"kind": "mf"},
            experiment={"seed": 1},
            experiment_digest="e" * 64,
            metrics=measured,
            privacy={"epsilon": 1.5},
        )
    return registry


def invoke(*words: str, **environment: str) -> Result:
    from typer.testing import CliRunner

    from fedrec.server.commands import app

    return CliRunner().invoke(app, words, env={"COLUMNS": "200"} | environment)


def call(registry: Registry, *words: str) -> Result:
    return invoke(*words, "--registry", str(registry.root))


def document(registry: Registry, *words: str) -> Any:
    result = call(registry, *words, "--json")
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_list_shows_a_line_for_each_release(registry: Registry) -> None:
    result = call(registry, "list")
    assert result.exit_code == 0
    title, header, *lines = [line.strip() for line in result.stdout.splitlines() if line.strip(" ─")]
    assert title == f"Releases in {registry.root}"
    assert re.split(r"\s{2,}", header) == ["version", "slice", "run", "parent", "NDCG@10", "created (UTC)"]
    assert [re.split(r"\s{2,}", line) for line in lines] == [
        ["1", "0", RUN, "0.2500", "1971-01-01 00:00"],
        ["2", "1", RUN, "1", "1971-01-01 00:00"],
        ["3", "2", RUN, "2", "current", "1971-01-01 00:00"],
    ]


def test_list_fits_a_terminal_of_80_columns(registry: Registry) -> None:
    lines = invoke("list", "--registry", str(registry.root), COLUMNS="80").stdout.splitlines()
    assert sum("1971-01-01 00:00" in line for line in lines) == 3
    assert "0.2500" in "".join(lines)


def test_list_as_json(registry: Registry) -> None:
    found = document(registry, "list")
    assert found["registry"] == str(registry.root)
    assert found["current"] == 3
    assert [row["version"] for row in found["releases"]] == [1, 2, 3]
    first = found["releases"][0]
    assert first["metrics"]["release"]["all"]["metrics"]["ndcg@10"]["value"] == 0.25
    assert (first["run"], first["parent"], first["promoted"], first["current"], first["damaged"]) == (
        RUN,
        None,
        True,
        False,
        False,
    )


def test_list_shows_the_others_when_one_is_damaged(registry: Registry) -> None:
    (registry.root / "releases" / "0001" / "manifest.json").write_text("{")
    assert "damaged" in call(registry, "list").stdout
    releases = document(registry, "list")["releases"]
    assert [(row["damaged"], row["metrics"] is None) for row in releases] == [
        (True, True),
        (False, False),
        (False, False),
    ]


def test_list_of_a_registry_without_a_release(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.prepare()
    assert document(registry, "list")["releases"] == []
    assert document(registry, "list")["current"] is None
    assert call(registry, "list").exit_code == 0


def test_show_tells_where_a_release_came_from(registry: Registry) -> None:
    text = call(registry, "show", "1").stdout
    assert "Release 1 in" in text
    for part in (RUN, "0.2500 [0.2400, 0.2600]", "0.1250 [0.1150, 0.1350]", '{"epsilon": 1.5}', "e" * 64):
        assert part in text
    assert "3 <- 2 <- 1" in call(registry, "show", "latest").stdout
    assert call(registry, "show").stdout == call(registry, "show", "3").stdout


def test_show_as_json(registry: Registry) -> None:
    found = document(registry, "show", "newest")
    assert (found["version"], found["lineage"], found["current"]) == (3, [3, 2, 1], True)
    assert found["manifest"]["privacy"] == {"epsilon": 1.5}


def test_promote_and_rollback(registry: Registry) -> None:
    assert call(registry, "promote", "1").stdout == "Release 1 is current.\n"
    assert registry.row().version == 1
    assert call(registry, "rollback").stdout == "Rolled back: release 3 is current.\n"
    assert registry.row().version == 3
    assert document(registry, "rollback") == {"current": 2}
    assert document(registry, "promote", "newest") == {"current": 3}


def test_verify(registry: Registry) -> None:
    assert call(registry, "verify").stdout == "Checked releases: 3; problems: 0.\n"
    assert document(registry, "verify") == {"registry": str(registry.root), "releases": 3, "problems": []}


def test_verify_fails_and_names_each_damaged_file(registry: Registry) -> None:
    paths = [registry.root / "releases" / name for name in ("0001/model.safetensors", "0003/manifest.json")]
    for path in paths:
        path.write_bytes(b"x")
    result = call(registry, "verify")
    assert result.exit_code == 1
    *problems, summary = result.stdout.splitlines()
    assert len(problems) == 2
    assert all(str(path) in problem for path, problem in zip(paths, problems, strict=True))
    assert summary == "Checked releases: 3; problems: 2."
    result = call(registry, "verify", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"] == problems


@pytest.mark.parametrize("words", [["list"], ["show"], ["promote", "1"], ["rollback"], ["verify"]])
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_no_registry(tmp_path: Path, words: list[str], as_json: list[str]) -> None:
    result = call(Registry(tmp_path / "none"), *words, *as_json)
    assert isinstance(result.exception, RegistryError)
    assert "run `fedrec simulate` first or pass --registry" in str(result.exception)
    assert result.stdout == ""
    assert not (tmp_path / "none").exists()


def test_mistakes_are_raised_and_print_nothing(registry: Registry) -> None:
    result = call(registry, "show", "9")
    assert isinstance(result.exception, RegistryError)
    assert "there is 1 to 3" in str(result.exception)
    (registry.root / "releases" / "0001" / "manifest.json").unlink()
    result = call(registry, "show", "1")
    assert isinstance(result.exception, CorruptRelease)
    assert result.stdout == ""


def test_the_environment_names_the_registry(registry: Registry) -> None:
    result = invoke("list", "--json", FEDREC_REGISTRY=str(registry.root))
    assert json.loads(result.stdout)["current"] == 3


def test_the_default_is_runs_registry(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDREC_REGISTRY", raising=False)
    monkeypatch.chdir(registry.root.parent)
    (registry.root.parent / "runs").mkdir()
    registry.root.rename(registry.root.parent / "runs" / "registry")
    assert json.loads(invoke("list", "--json").stdout)["registry"] == "runs/registry"


def test_importing_the_commands_loads_nothing_heavy() -> None:
    code = (
        "import sys, fedrec.server.commands; print({'numpy', 'pydantic', 'safetensors', 'sqlite3'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
