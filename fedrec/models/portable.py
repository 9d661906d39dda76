"""Scores of a released model in NumPy alone, for devices without torch; equal to the torch models but for rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedrec.data.batches import START, BatchSpec, histories_of
from fedrec.errors import ProtocolError
from fedrec.models.configs import (
    AnyModelConfig,
    FactorisationConfig,
    PopularityConfig,
    SpectralConfig,
    TransformerConfig,
)
from fedrec.params import Params

Floats = NDArray[np.float32]
_NORM_EPSILON = 1e-5
_erf = np.vectorize(math.erf, otypes=[np.float32])


def expected_shapes(config: AnyModelConfig, n_items: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a model of these settings."""
    if isinstance(config, PopularityConfig):
        return {"counts": (n_items,)}
    if isinstance(config, FactorisationConfig):
        return {"item": (n_items, config.dim)}
    if isinstance(config, SpectralConfig):
        a, b = config.item_rank, config.feature_rank
        spreads: dict[str, tuple[int, ...]] = {"item_spread": (a, a), "feature_spread": (b, b)}
        return {"items": (n_items, a), "features": (n_items, b), "popularity": (n_items,), **spreads}
    d, wide = config.dim, config.expand * config.dim
    block: dict[str, tuple[int, ...]] = {"recency": (config.heads, config.length)}
    block |= {f"{norm}.{name}": (d,) for norm in ("norm1", "norm2") for name in ("weight", "bias")}
    for name, n_in, n_out in (
        ("query_key_value", d, 3 * d),
        ("project", d, d),
        ("widen", d, wide),
        ("narrow", wide, d),
    ):
        block |= {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}
    shapes = {f"blocks.{i}.{name}": shape for i in range(config.blocks) for name, shape in block.items()}
    ends: dict[str, tuple[int, ...]] = {"norm.weight": (d,), "norm.bias": (d,), "start": (d,)}
    return {"item": (n_items, d), "position": (config.length, d), **ends, **shapes}


def check_params(config: AnyModelConfig, n_items: int, params: Params) -> None:
    """Refuse parameters that do not fit the settings, or hold a NaN or an infinity.

    Raises:
        ProtocolError: the first thing that is wrong.
    """
    shapes = expected_shapes(config, n_items)
    if odd := sorted(shapes.keys() ^ params.keys()):
        raise ProtocolError(f"The parameters belong to another model: missing or unknown {odd[0]}.")
    for name, shape in shapes.items():
        if params[name].shape != shape or params[name].dtype != np.float32:
            raise ProtocolError(f"'{name}' is {params[name].dtype}{params[name].shape}, the model needs {shape}.")
        if not np.isfinite(params[name]).all():
            raise ProtocolError(f"'{name}' holds a NaN or an infinity.")


def score(config: AnyModelConfig, params: Params, history: Sequence[int]) -> Floats:
    """Return [n_items] scores of the whole catalogue for one history of item numbers, oldest first."""
    if isinstance(config, PopularityConfig):
        return np.asarray(params["counts"], np.float32)
    if isinstance(config, FactorisationConfig):
        return _factorised(config, params, history)
    if isinstance(config, SpectralConfig):
        return _spectral(config, params, history)
    return _transformed(config, params, history)


def _factorised(config: FactorisationConfig, params: Params, history: Sequence[int]) -> Floats:
    item = params["item"]
    seen = item[list(history)[-config.length :]]
    gram = seen.T @ seen + config.unobserved_weight * (item.T @ item)
    ridge = config.regularisation * max(len(seen), 1) * np.eye(config.dim, dtype=np.float32)
    scores: Floats = (item @ np.linalg.solve(gram + ridge, seen.sum(0))).astype(np.float32)
    return scores


def _spectral(config: SpectralConfig, params: Params, history: Sequence[int]) -> Floats:
    newest = np.array(list(history)[-config.length :], np.int64)
    weight = (config.decay ** np.arange(len(newest))[::-1]).astype(np.float32)
    scores: Floats = config.popularity_weight * params["popularity"].astype(np.float32)
    for table, spread, factor in (
        ("items", "item_spread", config.item_weight),
        ("features", "feature_spread", config.feature_weight),
    ):
        user = weight @ params[table][newest]
        variance = float(user @ params[spread] @ user)
        if variance > 0:
            scores = scores + params[table] @ (user * np.float32(factor / math.sqrt(variance)))
    return scores


def _transformed(config: TransformerConfig, params: Params, history: Sequence[int]) -> Floats:
    items, mask = histories_of([list(history)], BatchSpec("causal", config.length))
    items = items[0][: max(int(mask[0].sum()), 1)]
    x = np.where((items == START)[:, None], params["start"], params["item"][np.maximum(items, 0)])
    x = x * np.float32(config.dim**0.5) + params["position"][: len(items)]
    for index in range(config.blocks):
        prefix = f"blocks.{index}."
        own = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
        x = _block(config, own, x)
    scores: Floats = params["item"] @ _norm(params, "norm", x[-1:])[0]
    return scores


def _block(config: TransformerConfig, own: Params, x: Floats) -> Floats:
    n, d = x.shape
    qkv = _linear(own, "query_key_value", _norm(own, "norm1", x)).reshape(n, 3, config.heads, d // config.heads)
    q, k, v = qkv.transpose(1, 2, 0, 3)  # each [heads n d/heads]
    apart = np.arange(n)[:, None] - np.arange(n)
    recency = np.where(apart >= 0, own["recency"][:, np.maximum(apart, 0)], -np.inf)
    logits = (q * np.float32((d // config.heads) ** -0.5)) @ k.transpose(0, 2, 1) + recency
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    x = x + _linear(own, "project", (weights @ v).transpose(1, 0, 2).reshape(n, d).astype(np.float32))
    wide = _linear(own, "widen", _norm(own, "norm2", x))
    gelu = wide * (0.5 * (1.0 + _erf(wide / math.sqrt(2.0)))).astype(np.float32)
    return x + _linear(own, "narrow", gelu)


def _linear(own: Params, name: str, x: Floats) -> Floats:
    out: Floats = x @ own[f"{name}.weight"].T + own[f"{name}.bias"]
    return out


def _norm(own: Params, name: str, x: Floats) -> Floats:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + _NORM_EPSILON)
    out: Floats = (scaled * own[f"{name}.weight"] + own[f"{name}.bias"]).astype(np.float32)
    return out
