"""From settings to a model."""

from __future__ import annotations

from typing import Any

from fedrec.models.configs import AnyModelConfig, FactorisationConfig, PopularityConfig, TransformerConfig
from fedrec.models.factorisation import Factorisation
from fedrec.models.popularity import Popularity
from fedrec.models.recommender import Recommender, set_params
from fedrec.models.transformer import Transformer
from fedrec.params import Params
from fedrec.random import Key

MODELS: dict[type[Any], type[Any]] = {
    PopularityConfig: Popularity,
    FactorisationConfig: Factorisation,
    TransformerConfig: Transformer,
}


def build(config: AnyModelConfig, n_items: int, key: Key) -> Recommender:
    """Return a fresh model for `n_items` items, its initial values drawn from `key`."""
    model: Recommender = MODELS[type(config)](config, n_items, key)
    return model


def restore(config: AnyModelConfig, n_items: int, params: Params) -> Recommender:
    """Return the model with these parameters, ready to score.

    Raises:
        FedrecError: the parameters belong to another model.
    """
    model = build(config, n_items, Key.from_seed(0))
    set_params(model, params)
    return model.eval()
