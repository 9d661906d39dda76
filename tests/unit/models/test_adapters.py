"""Adapters that lie where public data learns."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.models.adapters import LENGTH, laid
from fedrec.models.build import build
from fedrec.models.configs import TextTransformerConfig
from fedrec.models.freeze import trainable
from fedrec.models.recommender import get_params
from fedrec.random import Key

SIZES = {"dim": 8, "length": 6, "expand": 1, "residual": 3, "features": {"rank": 6, "fourier": 0}}
PLAIN = TextTransformerConfig.model_validate(SIZES)
WANTED = TextTransformerConfig.model_validate({**SIZES, "lora": 2, "train": "ffa"})


def test_a_change_along_the_gradient_is_within_reach_of_what_is_trained() -> None:
    params = get_params(build(PLAIN, 12, Key.from_seed(1)))
    random = np.random.default_rng(0)
    low = {n: v for n, v in params.items() if n.endswith(".weight") and v.ndim == 2}
    gradient = {n: random.normal(size=(len(v), 2)) @ random.normal(size=(2, v.shape[1])) for n, v in low.items()}
    found = laid(WANTED, params, gradient)
    assert found.keys() == get_params(build(WANTED, 12, Key.from_seed(1))).keys()
    for name, wanted in gradient.items():
        layer = name.removesuffix("weight")
        up, down = found[layer + "up"].astype(np.float64), found[layer + "down"].astype(np.float64)
        assert not (up @ down).any()  # nothing is changed yet
        outward = name == "projection.weight"
        fixed, free = (up, layer + "down") if outward else (down.T, layer + "up")
        assert free in trainable(WANTED, found)
        np.testing.assert_allclose(fixed.T @ fixed, LENGTH**2 * np.eye(2), atol=1e-4)
        along = fixed / LENGTH
        reached = along @ (along.T @ wanted) if outward else (wanted @ along) @ along.T
        np.testing.assert_allclose(reached, wanted, atol=1e-4)
    mixed = found["mix"].astype(np.float64)
    np.testing.assert_allclose(mixed.T @ mixed, LENGTH**2 * np.eye(3), atol=1e-4)
    assert set(params) - set(low) - {"mix"} <= {n for n in params if np.array_equal(params[n], found[n])}


def test_what_is_drawn_and_what_is_zero() -> None:
    wide = WANTED.model_copy(update={"dim": 256})
    params = get_params(build(wide, 12, Key.from_seed(1)))
    assert not params["projection.down"].any()
    assert not params["blocks.0.widen.up"].any()
    for half, axis in ((params["projection.up"], 0), (params["blocks.0.widen.down"], 1)):
        assert np.linalg.norm(half, axis=axis).mean() == pytest.approx(wide.reach, rel=0.2)
