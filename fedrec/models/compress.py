"""A release made small for devices: merged, pruned, and written with 8 bits a number.

Everything here is computed from a release that is public already, so it costs no privacy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from fedrec.errors import FedrecError, ProtocolError
from fedrec.models.configs import (
    AnyModelConfig,
    BlendConfig,
    ModelConfig,
    SpectralConfig,
    TextTransformerConfig,
    TransformerConfig,
)
from fedrec.models.portable import check_params, merged, part_of
from fedrec.params import Array, Params

FORMAT = "fedrec-device-1"
_SCALE = "/scale"


class DeviceModel(BaseModel):
    """What a device file holds, beside its numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: ModelConfig
    """Settings of the model as it was written, which may be smaller than those of the release."""
    n_items: int
    """How many items it scores."""
    catalog_digest: str
    """The catalogue that item numbers refer to."""
    release: int
    """The release that it was made from."""
    release_digest: str
    """`fedrec.params.digest` of that release's tensors."""


def slim(config: AnyModelConfig, params: Params) -> tuple[AnyModelConfig, dict[str, Array]]:
    """Return the smallest model with the same scores: adapters and texts become plain weights and item vectors."""
    if isinstance(config, TextTransformerConfig):
        return merged(config, params)
    return config, dict(params)


def prune(config: AnyModelConfig, params: Params, keep: float) -> tuple[AnyModelConfig, dict[str, Array]]:
    """Return a smaller model that keeps this share of what can be left out; scores change.

    Of a spectral model the directions with the least energy over the items go, of a transformer the units of each
    feed-forward layer whose way in and out is weakest (whole multiples of `dim` stay). Of a blend both parts are
    pruned; other models have nothing to leave out.

    Source: magnitude pruning of whole units as in Li et al., ICLR 2017, section 3.1.
    """
    if not 0 < keep <= 1:
        raise FedrecError(f"Cannot keep {keep:g} of a model; give a share above 0 and up to 1.")
    if isinstance(config, SpectralConfig):
        return _fewer_directions(config, params, keep)
    if isinstance(config, TransformerConfig):
        return _fewer_units(config, params, keep)
    if isinstance(config, BlendConfig):
        prior, kept = _fewer_directions(config.prior, part_of(params, "prior."), keep)
        fitted, own = prune(config.fitted, part_of(params, "fitted."), keep)
        rest = {name: value for name, value in params.items() if name in ("weight", "spread")}
        found = {f"prior.{name}": value for name, value in kept.items()}
        found |= {f"fitted.{name}": value for name, value in own.items()}
        return config.model_copy(update={"prior": prior, "fitted": fitted}), {**rest, **found}
    return config, dict(params)


def _fewer_directions(config: SpectralConfig, params: Params, keep: float) -> tuple[SpectralConfig, dict[str, Array]]:
    found, ranks = dict(params), {}
    for table, spread, rank in (("items", "item_spread", "item_rank"), ("features", "feature_spread", "feature_rank")):
        n = params[table].shape[1]
        energy = np.square(params[table], dtype=np.float64).sum(axis=0)
        best = np.sort(np.argsort(-energy, kind="stable")[: round(keep * n)])
        found[table], found[spread] = params[table][:, best], params[spread][np.ix_(best, best)]
        ranks[rank] = len(best)
    return config.model_copy(update=ranks), found


def _fewer_units(config: TransformerConfig, params: Params, keep: float) -> tuple[TransformerConfig, dict[str, Array]]:
    expand, found = max(1, round(keep * config.expand)), dict(params)
    for index in range(config.blocks):
        name = f"blocks.{index}"
        into, out = params[f"{name}.widen.weight"], params[f"{name}.narrow.weight"]
        strength = np.linalg.norm(into, axis=1) * np.linalg.norm(out, axis=0)
        best = np.sort(np.argsort(-strength, kind="stable")[: expand * config.dim])
        found[f"{name}.widen.weight"], found[f"{name}.widen.bias"] = into[best], params[f"{name}.widen.bias"][best]
        found[f"{name}.narrow.weight"] = out[:, best]
    return config.model_copy(update={"expand": expand}), found


def quantised(params: Params) -> dict[str, Array]:
    """Return every matrix as int8 with one float32 scale a row.

    ``q_ij = round(x_ij / s_i)`` with ``s_i = max_j |x_ij| / 127``. Vectors stay float32: they are few and matter more.
    """
    found: dict[str, Array] = {}
    for name, value in params.items():
        if value.ndim < 2 or value.shape[1] < 2:
            found[name] = np.asarray(value, np.float32)
            continue
        scale = np.abs(value).max(axis=1).astype(np.float32) / np.float32(127)
        found[name] = np.rint(value / np.maximum(scale, np.float32(1e-30))[:, None]).clip(-127, 127).astype(np.int8)
        found[name + _SCALE] = scale
    return found


def restored(tensors: Params) -> dict[str, Array]:
    """Return what `quantised` wrote as float32."""
    plain = {name: value for name, value in tensors.items() if not name.endswith(_SCALE)}
    return {
        name: value.astype(np.float32) * tensors[name + _SCALE][:, None] if name + _SCALE in tensors else value
        for name, value in plain.items()
    }


def write_device(what: DeviceModel, params: Params, bits: int = 8) -> bytes:
    """Return the device file: safetensors with the settings in its header.

    Args:
        what: settings and where they came from.
        params: the model's parameters.
        bits: 8, or 32 for the numbers as they are.

    Raises:
        FedrecError: another number of bits.
    """
    if bits not in (8, 32):
        raise FedrecError(f"Device files hold 8 or 32 bits a number, not {bits}.")
    tensors = quantised(params) if bits == 8 else {name: np.asarray(v, np.float32) for name, v in params.items()}
    header = {"format": FORMAT, "model": what.model_dump_json()}
    return safetensors.numpy.save({name: np.array(v, order="C") for name, v in tensors.items()}, metadata=header)


def read_device(document: bytes | Path) -> tuple[DeviceModel, dict[str, Array]]:
    """Return settings and float32 parameters of a device file, checked.

    Raises:
        ProtocolError: it is not a device file, or holds what does not fit its settings.
    """
    data = document.read_bytes() if isinstance(document, Path) else document
    try:
        header: Mapping[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if header["format"] != FORMAT:
            raise ProtocolError(f"This device file has format '{header['format']}', this fedrec reads '{FORMAT}'.")
        what = TypeAdapter(DeviceModel).validate_json(header["model"])
        tensors = safetensors.numpy.load(data)
        params = restored(tensors)
    except (ValueError, KeyError, TypeError, IndexError, ValidationError, safetensors.SafetensorError) as error:
        raise ProtocolError(f"This is not a device file of fedrec: {error}") from error
    check_params(what.model, what.n_items, params)
    return what, params
