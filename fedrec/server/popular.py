"""Released popularity as a model's prior: post-processing of counts, which costs no privacy."""

from __future__ import annotations

import numpy as np

from fedrec.models.configs import AnyModelConfig, SequenceConfig
from fedrec.models.freeze import PRIOR
from fedrec.params import Array, Params


def with_popularity(model: AnyModelConfig, params: Params, counts: Array, deviation: float = 0.0) -> Params:
    """Return the parameters with the logarithms of the counts in place, where the model asks for them.

    Args:
        model: its settings.
        params: its parameters, for n items.
        counts: [n] released counts.
        deviation: standard deviation of the noise in them.
    """
    if not isinstance(model, SequenceConfig) or not model.popularity_weight:
        return params
    return {**params, PRIOR: log_popularity(counts, deviation)[:, None]}


def log_popularity(counts: Array, deviation: float = 0.0) -> Array:
    r"""Return [n] ``log(1 + max(c, 0) / max(1, sigma))``: what lies below the noise hardly tells items apart.

    A softmax over scores to which this is added learns how much more than its popularity speaks for an item.

    Source: Menon et al., ICLR 2021 (logit adjustment).
    """
    unit = np.float32(max(1.0, deviation))
    return np.asarray(np.log1p(np.maximum(counts, 0.0) / unit), np.float32)
