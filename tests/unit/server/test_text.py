"""A life with items that are known by their text: what is public and frozen stays, what is trained alone travels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec import params as named
from fedrec.config import Experiment
from fedrec.data.features import FeatureSettings, item_features
from fedrec.errors import ConfigError
from fedrec.grid.simulate import simulate
from fedrec.models.build import build
from fedrec.models.freeze import PUBLIC, trainable
from fedrec.models.recommender import get_params
from fedrec.random import Key
from fedrec.server.recommend import recommend
from fedrec.server.registry import Registry
from fedrec.server.run import cut
from tests.support import dataset_of, merged, small_document, small_rows

DATASET = dataset_of(small_rows())
MODEL: dict[str, Any] = {
    "kind": "text_transformer", "dim": 8, "heads": 2, "expand": 1, "length": 8, "residual": 2, "lora": 2,
    "features": {"rank": 6, "fourier": 0}, "softmax": {"kind": "sampled", "negatives": 8},
}  # fmt: skip
CENTRAL = {"mode": "central", "epsilon": 8.0, "delta": 1e-3, "noise": "seed", "metrics": "research", "population": 29}


def experiment(**changes: Any) -> Experiment:
    return Experiment.parse(merged({**small_document(), "model": MODEL}, changes))


@pytest.mark.parametrize("train", ["adapters", "ffa"])
def test_frozen_tensors_stay_bit_for_bit_and_new_items_have_their_vectors_at_once(train: str, tmp_path: Path) -> None:
    wanted = experiment(model={"train": train})
    document, _ = simulate(wanted, runs=tmp_path, registry=tmp_path / "r", dataset=DATASET)
    registry = Registry(tmp_path / "r")
    first, last = registry.load(1).params, registry.load("newest").params
    trained = set(trainable(wanted.model, first))
    assert {"residual", "blocks.0.widen.up", "projection.down"} <= trained
    assert not trained & {PUBLIC, "projection.weight", "position", "blocks.0.widen.weight"}
    both = {"blocks.0.widen.down", "projection.up", "projection.bias", "mix"}
    assert trained & both == (both if train == "adapters" else set())
    n = len(first[PUBLIC])
    assert n < len(last[PUBLIC])
    for name in first:
        one, other = first[name], last[name][:n] if name in (PUBLIC, "residual") else last[name]
        assert np.array_equal(one, other) is (name not in trained), name
    n_fitted = cut(wanted, DATASET)[0].n_items
    expected = item_features(DATASET.catalog, FeatureSettings(rank=6, fourier=0), n_fitted)
    assert np.array_equal(last[PUBLIC], expected[: len(last[PUBLIC])])
    assert np.abs(last[PUBLIC][n:]).max() > 0
    assert recommend(registry.load("newest"), ["i2", "i4"], 3).items
    assert {"release", "previous", "popularity", "local_only"} <= document["releases"][-1]["rows"].keys()


@pytest.mark.parametrize("train", ["all", "adapters", "ffa"])
def test_only_what_is_trained_is_uploaded(train: str, tmp_path: Path) -> None:
    wanted = experiment(model={"train": train}, split={"later": 0})
    document, _ = simulate(wanted, runs=tmp_path, registry=tmp_path / "r", dataset=DATASET)
    params = Registry(tmp_path / "r").load(1).params
    expected = named.n_bytes({name: params[name] for name in trainable(wanted.model, params)})
    up = [record["bytes_up"] for record in document["rounds"] if record["clients"]]
    assert min(up) > expected
    assert max(up) < expected + 6_000  # names, shapes and the envelope
    assert max(up) < named.n_bytes(params) + 6_000


def test_a_private_run_charges_and_noises_what_is_trained_alone(tmp_path: Path) -> None:
    wanted = experiment(
        model={"train": "ffa"}, privacy=CENTRAL, training={"cohort": {"expected": 15.0}}, split={"later": 0}
    )
    document, _ = simulate(wanted, runs=tmp_path, registry=tmp_path / "r", dataset=DATASET)
    assert document["totals"]["epsilon"] <= 8.0
    params = Registry(tmp_path / "r").load(1).params
    assert params["projection.down"].std() > 0
    assert params["residual"].all()  # noise on every row
    fresh = get_params(
        build(wanted.model, len(params[PUBLIC]), Key.from_seed(wanted.seed).child("model", wanted.model.kind))
    )
    for name in ("projection.weight", "projection.bias", "projection.up", "mix", "blocks.0.widen.down"):
        assert np.array_equal(params[name], fresh[name]), name  # and none on what is frozen


def test_adapters_without_a_rank_and_items_without_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="lora"):
        experiment(model={"train": "adapters", "lora": 0})
