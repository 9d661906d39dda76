"""Files for devices: small, checked when read, and nearly the same recommendations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedrec.errors import FedrecError, ProtocolError
from fedrec.models import portable
from fedrec.models.build import build
from fedrec.models.compress import DeviceModel, prune, quantised, read_device, restored, slim, write_device
from fedrec.models.configs import AnyModelConfig, TransformerConfig
from fedrec.models.recommender import get_params
from fedrec.params import Params, n_bytes
from tests.contracts.recommender import KEY, RECOMMENDERS

N_ITEMS = 60
kinds = pytest.mark.parametrize("kind", RECOMMENDERS)


def drawn(config: AnyModelConfig, n_items: int = N_ITEMS) -> Params:
    draws = KEY.child("params").numpy()
    fresh = get_params(build(config, n_items, KEY))
    params = {name: draws.normal(0, 0.3, v.shape).astype(np.float32) for name, v in fresh.items()}
    return params | {name: value @ value.T for name, value in params.items() if name.endswith("spread")}


def what(config: AnyModelConfig, **changes: Any) -> DeviceModel:
    return DeviceModel(
        **{"model": config, "n_items": N_ITEMS, "catalog_digest": "c", "release": 1, "release_digest": "d"} | changes
    )


@kinds
def test_a_file_of_32_bits_scores_the_same_and_one_of_8_bits_nearly(kind: str) -> None:
    config = RECOMMENDERS[kind].config
    params = drawn(config)
    small, own = slim(config, params)
    history = [1, 5, 9, 5]
    expected = portable.score(config, params, history)
    for bits, tolerance in ((32, 1e-4), (8, 0.05)):
        read, again = read_device(write_device(what(small), own, bits))
        assert read == what(small)
        scores = portable.score(read.model, again, history)
        assert np.abs(scores - expected).max() <= tolerance * max(1.0, np.abs(expected).max()), bits


def test_eight_bits_are_a_quarter_of_the_bytes_and_off_by_half_a_step_at_most() -> None:
    params = drawn(TransformerConfig(dim=64, length=50), 2000)
    small = quantised(params)
    assert n_bytes(small) < 0.28 * n_bytes(params)
    again = restored(small)
    for name, value in params.items():
        step = np.abs(value).max(axis=-1, keepdims=True) / 127 if value.ndim > 1 else 0.0
        assert (np.abs(again[name] - value) <= 0.51 * step + 1e-9).all(), name


def test_rows_of_zeros_stay_zeros() -> None:
    assert not restored(quantised({"item": np.zeros((3, 4), np.float32)}))["item"].any()


@pytest.mark.parametrize("kind", ["spectral", "transformer", "blend"])
def test_pruning_leaves_out_what_weighs_least(kind: str) -> None:
    config = RECOMMENDERS[kind].config
    params = {name: np.array(value) for name, value in drawn(config).items()}
    weak = {"spectral": "items", "blend": "prior.items"}.get(kind)
    if weak:
        params[weak][:, ::2] *= 1e-4  # every other direction says nothing
    else:
        params["blocks.0.narrow.weight"][:, ::2] *= 1e-4
    small, own = prune(config, params, 0.5)
    assert n_bytes(own) < n_bytes(params)
    portable.check_params(small, N_ITEMS, own)
    if weak:
        np.testing.assert_array_equal(own[weak], params[weak][:, 1::2])
    else:
        np.testing.assert_array_equal(own["blocks.0.narrow.weight"], params["blocks.0.narrow.weight"][:, 1::2])
    same, all_of_it = prune(config, params, 1.0)
    assert same == config
    assert n_bytes(all_of_it) == n_bytes(params)


def test_what_is_no_device_file_is_refused() -> None:
    config = RECOMMENDERS["factorisation"].config
    good = write_device(what(config), drawn(config))
    for bad in (b"", b"abc", good[:50], good[:-40], b"\xff" * 200):
        with pytest.raises(ProtocolError):
            read_device(bad)
    with pytest.raises(ProtocolError, match="the model needs"):
        read_device(write_device(what(config, n_items=7), drawn(config)))
    with pytest.raises(FedrecError, match="8 or 32"):
        write_device(what(config), drawn(config), 4)
    with pytest.raises(FedrecError, match="share"):
        prune(config, drawn(config), 0.0)
