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
    BlendConfig,
    FactorisationConfig,
    PopularityConfig,
    SpectralConfig,
    TextTransformerConfig,
    TransformerConfig,
)
from fedrec.params import Array, Params

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
    if isinstance(config, BlendConfig):
        parts = {"prior": expected_shapes(config.prior, n_items), "fitted": expected_shapes(config.fitted, n_items)}
        dim = config.fitted.dim
        return {
            **{f"{part}.{name}": shape for part, shapes in parts.items() for name, shape in shapes.items()},
            "weight": (1,),
            "spread": (dim, dim),
        }
    if isinstance(config, TextTransformerConfig):
        return _text_shapes(config, n_items)
    return _sequence_shapes(config, n_items)


def _sequence_shapes(config: TransformerConfig | TextTransformerConfig, n_items: int) -> dict[str, tuple[int, ...]]:
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


def _text_shapes(config: TextTransformerConfig, n_items: int) -> dict[str, tuple[int, ...]]:
    shapes = _sequence_shapes(config, n_items)
    del shapes["item"]
    rank, own = config.features.rank, config.residual
    shapes |= {"text": (n_items, rank), "residual": (n_items, own), "mix": (config.dim, own)}
    shapes |= {"projection.weight": (config.dim, rank), "projection.bias": (config.dim,)}
    if config.lora:
        for name in [name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2]:
            n_out, n_in = shapes[name]
            layer = name.removesuffix(".weight")
            shapes |= {f"{layer}.down": (config.lora, n_in), f"{layer}.up": (n_out, config.lora)}
    return shapes


def merged(config: TextTransformerConfig, params: Params) -> tuple[TransformerConfig, dict[str, Array]]:
    """Return the plain transformer that scores the same: adapters added to their weights, item vectors made once."""
    found = {name: np.asarray(value) for name, value in params.items() if not name.endswith((".down", ".up"))}
    for name in params:
        if name.endswith(".up"):
            layer = name.removesuffix(".up")
            found[f"{layer}.weight"] = found[f"{layer}.weight"] + params[name] @ params[f"{layer}.down"]
    text, weight, bias = found.pop("text"), found.pop("projection.weight"), found.pop("projection.bias")
    found["item"] = text @ weight.T + bias + found.pop("residual") @ found.pop("mix").T
    own = {"kind", "features", "residual", "lora", "train", "top"}
    return TransformerConfig(**config.model_dump(exclude=own)), found


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
    if isinstance(config, SpectralConfig):
        return _spectral(config, params, history)
    if isinstance(config, BlendConfig):
        prior = _spectral(config.prior, _part(params, "prior."), history)
        fitted = _part(params, "fitted.")
        user = _user(config.fitted, fitted, history)
        variance = float(user @ params["spread"] @ user)
        scale = float(params["weight"][0]) / math.sqrt(variance) if variance > 0 else 0.0
        blended: Floats = prior + fitted["item"] @ (user * np.float32(scale))
        return blended
    if isinstance(config, TextTransformerConfig):
        config, params = merged(config, params)
    scores: Floats = params["item"] @ _user(config, params, history)
    return scores


def _part(params: Params, prefix: str) -> Params:
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def _user(config: FactorisationConfig | TransformerConfig, params: Params, history: Sequence[int]) -> Floats:
    """Return the vector whose products with the item vectors are the scores."""
    if isinstance(config, FactorisationConfig):
        return _factorised(config, params, history)
    return _transformed(config, params, history)


def _factorised(config: FactorisationConfig, params: Params, history: Sequence[int]) -> Floats:
    item = params["item"]
    seen = item[list(history)[-config.length :]]
    gram = seen.T @ seen + config.unobserved_weight * (item.T @ item)
    ridge = config.regularisation * max(len(seen), 1) * np.eye(config.dim, dtype=np.float32)
    user: Floats = np.linalg.solve(gram + ridge, seen.sum(0)).astype(np.float32)
    return user


def _spectral(config: SpectralConfig, params: Params, history: Sequence[int]) -> Floats:
    newest = np.array(list(history)[-config.length :], np.int64)
    age = np.arange(len(newest))[::-1]
    later = config.decay if config.feature_decay is None else config.feature_decay
    scores: Floats = config.popularity_weight * params["popularity"].astype(np.float32)
    for table, spread, factor, decay in (
        ("items", "item_spread", config.item_weight, config.decay),
        ("features", "feature_spread", config.feature_weight, later),
    ):
        user = (decay**age).astype(np.float32) @ params[table][newest]
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
        x = _block(config, _part(params, prefix), x)
    user: Floats = _norm(params, "norm", x[-1:])[0]
    return user


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
