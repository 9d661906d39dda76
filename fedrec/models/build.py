"""From settings to a model."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

from fedrec.models.blend import Blend
from fedrec.models.configs import (
    AnyModelConfig,
    BlendConfig,
    FactorisationConfig,
    GruConfig,
    LanguageConfig,
    LightGcnConfig,
    MachineConfig,
    NcfConfig,
    NearestConfig,
    PopularityConfig,
    SpectralConfig,
    TextTransformerConfig,
    TransformerConfig,
)
from fedrec.models.factorisation import Factorisation
from fedrec.models.freeze import trains
from fedrec.models.gru import Gru
from fedrec.models.language import LanguageModel
from fedrec.models.lightgcn import LightGcn
from fedrec.models.machine import FactorisationMachine
from fedrec.models.ncf import Ncf
from fedrec.models.nearest import Nearest
from fedrec.models.popularity import Popularity
from fedrec.models.recommender import Recommender, set_params
from fedrec.models.spectral import Spectral
from fedrec.models.text import TextTransformer
from fedrec.models.transformer import Transformer
from fedrec.params import Params
from fedrec.random import Key

MODELS: dict[type[Any], type[Any]] = {
    PopularityConfig: Popularity,
    SpectralConfig: Spectral,
    FactorisationConfig: Factorisation,
    TransformerConfig: Transformer,
    TextTransformerConfig: TextTransformer,
    GruConfig: Gru,
    NcfConfig: Ncf,
    MachineConfig: FactorisationMachine,
    LightGcnConfig: LightGcn,
    LanguageConfig: LanguageModel,
    NearestConfig: Nearest,
    BlendConfig: Blend,
}


def build(config: AnyModelConfig, n_items: int, key: Key) -> Recommender:
    """Return a fresh model for `n_items` items, its initial values drawn from `key`."""
    model: Recommender = MODELS[type(config)](config, n_items, key)
    for name, value in model.named_parameters():
        value.requires_grad_(trains(config, name))
    return model


def restore(config: AnyModelConfig, n_items: int, params: Params) -> Recommender:
    """Return the model with these parameters, ready to score.

    Raises:
        FedrecError: the parameters belong to another model.
    """
    model = copy.deepcopy(_skeleton(config, n_items))
    set_params(model, params)
    return model.eval()


def trained(config: AnyModelConfig) -> AnyModelConfig:
    """Return the settings of what rounds train: of a blend the fitted part."""
    return config.fitted if isinstance(config, BlendConfig) else config


@lru_cache(maxsize=8)
def _skeleton(config: AnyModelConfig, n_items: int) -> Recommender:
    """Return a model to copy: drawing initial values that are overwritten at once would cost a round milliseconds."""
    return build(config, n_items, Key.from_seed(0))
