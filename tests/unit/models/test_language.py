"""A frozen language model as the trunk, tried with a tiny one of random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="the extra 'language' is not installed")
pytest.importorskip("peft", reason="the extra 'language' is not installed")

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from fedrec.config import Experiment
from fedrec.data.batches import BatchSpec, histories_of
from fedrec.errors import ConfigError, ProtocolError
from fedrec.grid.simulate import simulate
from fedrec.models import portable
from fedrec.models.build import build, restore
from fedrec.models.configs import LanguageConfig
from fedrec.models.language import weights_digest
from fedrec.models.recommender import get_params, learnt, score_all
from fedrec.random import Key
from fedrec.server.recommend import recommend
from fedrec.server.registry import Registry
from tests.support import dataset_of, merged, small_document, small_rows

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
SETTINGS: dict[str, Any] = {
    "kind": "language", "dim": 8, "length": 8, "residual": 2, "lora": 2,
    "features": {"rank": 6, "fourier": 0}, "softmax": {"kind": "sampled", "negatives": 8},
}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    LlamaModel(LlamaConfig(**SIZE, max_position_embeddings=64)).save_pretrained(tmp_path / "models" / "tiny")
    monkeypatch.setenv("FEDREC_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def config(models: Path, name: str = "tiny", **changes: Any) -> LanguageConfig:
    return LanguageConfig(**{**SETTINGS, "name": name, "sha256": weights_digest(models / name), **changes})


def test_adapters_are_trained_and_the_language_model_stays_and_does_not_travel(models: Path) -> None:
    own = config(models)
    model = build(own, 30, Key.from_seed(0))
    frozen = sum(buffer.numel() for buffer in model.body.buffers())  # type: ignore[operator,union-attr]
    names = set(learnt(model))
    assert any(".lora_A." in name for name in names)
    assert "text" not in names
    assert all(".lora_" in name for name in names if name.startswith("body."))
    assert sum(value.numel() for name, value in learnt(model).items() if ".lora_" in name) < 0.5 * frozen
    again = get_params(build(own, 30, Key.from_seed(0)))
    assert all(np.array_equal(value, again[name]) for name, value in get_params(model).items())  # drawn from the key
    copied = copy.deepcopy(model)
    assert next(copied.body.buffers()) is next(model.body.buffers())  # type: ignore[operator,union-attr]
    assert copied.text is not model.text


def test_a_growing_catalogue_leaves_old_scores_alone(models: Path) -> None:
    model = build(config(models), 20, Key.from_seed(0))
    with torch.no_grad():
        model.text.copy_(torch.randn(20, 6, generator=torch.Generator().manual_seed(1)))  # type: ignore[operator]
    asked = histories_of([[1, 2, 3], [4]], BatchSpec("causal", 8))
    before = score_all(model, asked)
    after = score_all(model.grow(25, Key.from_seed(2)), asked)
    np.testing.assert_allclose(after[:, :20], before, atol=1e-5)


def test_a_federated_run_learns_through_the_adapters_alone(models: Path, tmp_path: Path) -> None:
    training = {"base": {"rounds": 12}, "later": {"rounds": 4}, "server": {"kind": "adam", "learning_rate": 2e-2}}
    wanted = Experiment.parse(
        merged(
            {**small_document(), "model": config(models).model_dump()}, {"training": training, "split": {"later": 1}}
        )
    )
    document, _ = simulate(wanted, runs=tmp_path, registry=tmp_path / "r", dataset=dataset_of(small_rows()))
    losses = [record["loss"] for record in document["rounds"]]
    assert losses[11] < losses[0]
    release = Registry(tmp_path / "r").load("newest")
    assert np.abs(next(v for name, v in release.params.items() if ".lora_B." in name)).max() > 0
    assert recommend(release, ["i2", "i4"], 3).items
    small = sum(value.nbytes for name, value in release.params.items() if name != "text")
    assert document["rounds"][0]["bytes_up"] < 1.3 * small + 10_000


def test_what_is_not_here_or_not_the_same_or_reads_ahead_is_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = config(models, sha256="0" * 64)
    with pytest.raises(ConfigError, match="must hold the same"):
        build(other, 5, Key.from_seed(0))
    with pytest.raises(ConfigError, match="adapted"):
        build(config(models, adapted=["nowhere"]), 5, Key.from_seed(0))
    BertModel(BertConfig(**SIZE, max_position_embeddings=64)).save_pretrained(models / "ahead")
    with pytest.raises(ConfigError, match="reads ahead"):
        build(config(models, "ahead"), 5, Key.from_seed(0))
    with pytest.raises(ProtocolError, match="student"):
        portable.score(config(models), {}, [1])
    own = config(models)
    monkeypatch.delenv("FEDREC_MODELS")
    with pytest.raises(ConfigError, match="FEDREC_MODELS"):
        build(own, 5, Key.from_seed(0))
    with pytest.raises(ValueError, match="name"):
        LanguageConfig(**{**SETTINGS, "name": "../up", "sha256": "0" * 64})


def test_a_restored_model_scores_as_the_trained_one(models: Path) -> None:
    own = config(models)
    model = build(own, 12, Key.from_seed(3)).eval()
    asked = histories_of([[1, 2, 3]], BatchSpec("causal", 8))
    np.testing.assert_allclose(
        score_all(restore(own, 12, get_params(model)), asked), score_all(model, asked), atol=1e-6
    )
