"""`fedrec export` writes what a release says, in one file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedrec.cli import app
from fedrec.errors import FedrecError
from fedrec.models import portable
from fedrec.models.build import build
from fedrec.models.compress import read_device
from fedrec.models.configs import AnyModelConfig, FactorisationConfig, TransformerConfig
from fedrec.models.recommender import get_params
from fedrec.random import Key
from fedrec.server.registry import Registry, Release
from fedrec.serving.devices import export
from tests.unit.server.test_recommend import CATALOG, N

CONFIG = TransformerConfig(dim=16, length=8)


def published(root: Path, config: AnyModelConfig = CONFIG) -> Release:
    Registry(root).publish(
        get_params(build(config, N, Key.from_seed(1))), CATALOG, run="r/001", slice=0, parent=None,
        model=config.model_dump(mode="json"), experiment={}, experiment_digest="", metrics={}, privacy={},
    )  # fmt: skip
    return Registry(root).load()


def test_a_device_file_is_small_and_names_its_release(tmp_path: Path) -> None:
    release = published(tmp_path / "r")
    found = export(release, tmp_path / "m.fedrec")
    assert found.bytes == (tmp_path / "m.fedrec").stat().st_size
    assert found.overlap > 0.8
    what, params = read_device(tmp_path / "m.fedrec")
    assert (what.release, what.catalog_digest) == (1, CATALOG.digest())
    expected = portable.score(CONFIG, release.params, [1, 2])
    np.testing.assert_allclose(portable.score(what.model, params, [1, 2]), expected, atol=0.02)
    pruned = export(release, tmp_path / "p.fedrec", keep=0.5)
    assert pruned.bytes < found.bytes


def test_the_verb_writes_both_formats_and_refuses_in_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    published(tmp_path / "r")
    for kind in ("device", "onnx"):
        out = tmp_path / f"m.{kind}"
        shown = CliRunner().invoke(
            app, ["export", "--out", str(out), "--format", kind, "--registry", str(tmp_path / "r"), "--json"]
        )
        assert shown.exit_code == 0, shown.output
        assert json.loads(shown.stdout)["bytes"] == out.stat().st_size
    with pytest.raises(FedrecError, match="--format device"):
        export(published(tmp_path / "f", FactorisationConfig(dim=4)), tmp_path / "no.onnx", "onnx")
    assert not (tmp_path / "no.onnx").exists()
    wrong = CliRunner().invoke(
        app, ["export", "--out", str(tmp_path / "x"), "--format", "pickle", "--registry", str(tmp_path / "r")]
    )
    assert wrong.exit_code != 0
