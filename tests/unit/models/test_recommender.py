"""Copying parameters in and out of models, and building models from settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedrec.data.batches import histories_of
from fedrec.errors import FedrecError
from fedrec.models.build import MODELS, build, restore
from fedrec.models.configs import AnyModelConfig, FactorisationConfig, PopularityConfig, TransformerConfig
from fedrec.models.recommender import Recommender, get_params, score_all, set_params, to_torch
from fedrec.random import Key
from tests.contracts.recommender import drawn, everybody, uneven_log

KEY = Key.from_seed(2)
CONFIG = FactorisationConfig(dim=3)


def test_parameters_are_copies() -> None:
    model = build(CONFIG, 4, KEY)
    params = get_params(model)
    params["item"] += 1
    assert not np.array_equal(params["item"], get_params(model)["item"])
    set_params(model, params)
    before = params["item"].copy()
    params["item"] += 1
    assert np.array_equal(get_params(model)["item"], before)


def test_parameters_of_another_model_are_refused_and_nothing_is_changed() -> None:
    model = build(CONFIG, 4, KEY)
    before = get_params(model)
    with pytest.raises(FedrecError, match=r"missing \['item'\], unknown \['items'\]"):
        set_params(model, {"items": before["item"]})
    with pytest.raises(FedrecError, match=r"'item' has shape \(4, 2\), the model needs \(4, 3\)"):
        set_params(model, {"item": before["item"][:, :2]})
    assert np.array_equal(get_params(model)["item"], before["item"])


def test_read_only_and_strided_arrays_can_be_loaded() -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    values.flags.writeable = False
    model = restore(CONFIG, 4, {"item": values[:, ::2]})
    assert np.array_equal(get_params(model)["item"], values[:, ::2])
    assert not model.training


@pytest.mark.parametrize("config", [PopularityConfig(), CONFIG, TransformerConfig(dim=4)])
def test_every_config_has_its_model(config: AnyModelConfig) -> None:
    model = build(config, 5, KEY)
    assert isinstance(model, Recommender)
    assert type(model) is MODELS[type(config)]
    assert (model.config, model.n_items) == (config, 5)


def test_a_batch_becomes_tensors_with_the_same_numbers() -> None:
    model = build(TransformerConfig(dim=4), 9, KEY)
    batch = drawn(model, everybody(uneven_log((2, 5), 9, KEY)))
    assert all(isinstance(part, torch.Tensor) for part in batch)
    assert batch.inputs.dtype == torch.int64
    assert batch.input_mask.dtype == torch.bool
    again = to_torch(type(batch)(*(part.numpy()[:, ::-1] if part.ndim > 1 else part.numpy() for part in batch)))
    assert torch.equal(again.inputs, batch.inputs.flip(1))


def test_scoring_needs_no_gradients() -> None:
    model = build(CONFIG, 9, KEY)
    scores = score_all(model, histories_of([[1, 2], []], model.spec))
    assert scores.shape == (2, 9)
    assert scores.dtype == np.float32
