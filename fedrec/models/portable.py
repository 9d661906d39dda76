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
    AnySequenceConfig,
    BlendConfig,
    FactorisationConfig,
    GruConfig,
    LanguageConfig,
    LightGcnConfig,
    MachineConfig,
    NcfConfig,
    NearestConfig,
    PopularityConfig,
    SequenceConfig,
    SpectralConfig,
    TasksConfig,
    TextTransformerConfig,
    TransformerConfig,
)
from fedrec.params import Array, Params

Floats = NDArray[np.float32]
_NORM_EPSILON = 1e-5
NOT_HERE = "A language model needs torch and its own weights; give devices a student ([training.student]) instead."
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
    if isinstance(config, NearestConfig):
        return {"text": (n_items, config.features.rank)}
    if isinstance(config, LanguageConfig):
        raise ProtocolError(NOT_HERE)
    heads = _head_shapes(config.tasks, config.dim) if config.tasks else {}
    heads |= {"moment": (config.dim, config.context.width)} if config.context else {}
    heads |= {"popularity": (n_items, 1)} if config.popularity_weight else {}
    if isinstance(config, TextTransformerConfig):
        return _text_shapes(config, n_items) | heads
    if isinstance(config, TransformerConfig):
        return _transformer_shapes(config, n_items) | heads
    return _other_shapes(config, n_items) | heads


def _head_shapes(tasks: TasksConfig, dim: int) -> dict[str, tuple[int, ...]]:
    outs = {"value": bool(tasks.value_weight), "event": len(tasks.events) * bool(tasks.event_weight)}
    found: dict[str, tuple[int, ...]] = {"heads.balance": (3,)} if tasks.weights == "learned" else {}
    for name, n in outs.items():
        if n:
            found |= {f"heads.{name}.weight": (int(n), 2 * dim), f"heads.{name}.bias": (int(n),)}
    return found


def _other_shapes(
    config: GruConfig | NcfConfig | MachineConfig | LightGcnConfig, n_items: int
) -> dict[str, tuple[int, ...]]:
    d = config.dim
    shapes: dict[str, tuple[int, ...]] = {"item": (n_items, d), "start": (d,)}
    if isinstance(config, GruConfig):
        shapes |= {f"{name}.weight": (3 * d, d) for name in ("reads", "keeps")}
        return shapes | {"reads.bias": (3 * d,), "keeps.bias": (3 * d,), "norm.weight": (d,), "norm.bias": (d,)}
    if isinstance(config, NcfConfig):
        h = config.hidden
        return shapes | {"gate": (d,), "person.weight": (h, d), "person.bias": (h,), "thing": (h, d), "out": (1, h)}
    return shapes | ({"taken": (n_items, d), "bias": (n_items, 1)} if isinstance(config, MachineConfig) else {})


def _transformer_shapes(config: TransformerConfig | TextTransformerConfig, n_items: int) -> dict[str, tuple[int, ...]]:
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
    shapes = _transformer_shapes(config, n_items)
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


def score(config: AnyModelConfig, params: Params, history: Sequence[int], moment: Floats | None = None) -> Floats:
    """Return [n_items] scores of the whole catalogue for one history of item numbers, oldest first.

    `moment` [m] is what is known of the request, as the model's context says; None: nothing.
    """
    if isinstance(config, PopularityConfig):
        return np.asarray(params["counts"], np.float32)
    if isinstance(config, SpectralConfig):
        return _spectral(config, params, history)
    if isinstance(config, BlendConfig):
        prior = _spectral(config.prior, part_of(params, "prior."), history)
        fitted = part_of(params, "fitted.")
        user = _user(config.fitted, fitted, history)
        variance = float(user @ params["spread"] @ user)
        scale = float(params["weight"][0]) / math.sqrt(variance) if variance > 0 else 0.0
        blended: Floats = prior + fitted["item"] @ (user * np.float32(scale))
        return blended
    if isinstance(config, NearestConfig):
        return _nearest(config, params, history)
    if isinstance(config, TextTransformerConfig):
        config, params = merged(config, params)
    user = _user(config, params, history)
    if moment is not None and "moment" in params:
        user = np.asarray(user + params["moment"] @ moment, np.float32)
    scores: Floats = np.asarray(params["item"] @ (user * params["gate"] if isinstance(config, NcfConfig) else user))
    if isinstance(config, NcfConfig):
        inner = params["thing"] @ params["item"].T + _linear(params, "person", user[None])[0][:, None]
        scores = np.asarray(scores + (params["out"] @ np.maximum(inner, 0.0))[0])
    if isinstance(config, MachineConfig):
        scores = scores + params["bias"][:, 0]
    if isinstance(config, SequenceConfig) and config.popularity_weight:
        scores = np.asarray(scores + np.float32(config.popularity_weight) * params["popularity"][:, 0])
    return scores


def part_of(params: Params, prefix: str) -> Params:
    """Return the parameters whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def _user(config: FactorisationConfig | AnySequenceConfig, params: Params, history: Sequence[int]) -> Floats:
    """Return the vector whose products with the item vectors are the scores, or most of them."""
    if isinstance(config, FactorisationConfig):
        return _factorised(config, params, history)
    if isinstance(config, LanguageConfig):
        raise ProtocolError(NOT_HERE)
    items, x = _read(config, params, history)
    if isinstance(config, GruConfig):
        return _recurrent(config, params, x)
    scale, n = np.float32(config.dim**0.5), len(items)
    if isinstance(config, NcfConfig):
        return np.asarray(x.mean(0) * scale)
    if isinstance(config, MachineConfig):
        return np.asarray(x.sum(0) / np.float32(n**0.5))
    if isinstance(config, LightGcnConfig):
        odd = np.float32(((config.layers + 1) // 2) / (config.layers + 1))
        return np.asarray(((1 - odd) * params["start"] + odd * x.sum(0) / np.float32(n**0.5)) * scale)
    return _transformed(config, params, x)


def _read(config: AnySequenceConfig, params: Params, history: Sequence[int]) -> tuple[NDArray[np.int64], Floats]:
    """Return the newest items, or `START`, and what a model reads them as: [n d]."""
    items, mask = histories_of([list(history)], BatchSpec("causal", config.length))
    items = items[0][: max(int(mask[0].sum()), 1)]
    table = params["taken" if isinstance(config, MachineConfig) else "item"]
    return items, np.where((items == START)[:, None], params["start"], table[np.maximum(items, 0)])


def _recurrent(config: GruConfig, params: Params, x: Floats) -> Floats:
    h: Floats = np.zeros(config.dim, np.float32)
    for own in _linear(params, "reads", x * np.float32(config.dim**0.5)):
        (z, r, n), (uz, ur, un) = np.split(own, 3), np.split(_linear(params, "keeps", h), 3)
        z, r = 1.0 / (1.0 + np.exp(-(z + uz))), 1.0 / (1.0 + np.exp(-(r + ur)))
        h = ((1.0 - z) * np.tanh(n + r * un) + z * h).astype(np.float32)
    return _norm(params, "norm", h)


def _nearest(config: NearestConfig, params: Params, history: Sequence[int]) -> Floats:
    text = params["text"]
    unit = text / np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-12)
    newest = np.array(list(history)[-config.length :], np.int64)
    user = (config.decay ** np.arange(len(newest))[::-1]).astype(np.float32) @ unit[newest]
    scores: Floats = unit @ (user / max(float(np.linalg.norm(user)), 1e-12)).astype(np.float32)
    return scores


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


def _transformed(config: TransformerConfig | TextTransformerConfig, params: Params, x: Floats) -> Floats:
    x = x * np.float32(config.dim**0.5) + params["position"][: len(x)]
    for index in range(config.blocks):
        prefix = f"blocks.{index}."
        x = _block(config, part_of(params, prefix), x)
    user: Floats = _norm(params, "norm", x[-1:])[0]
    return user


def _block(config: TransformerConfig | TextTransformerConfig, own: Params, x: Floats) -> Floats:
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
