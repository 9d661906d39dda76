"""Adapters that lie where public data learns: its directions cost no privacy, and most others carry noise alone."""

from __future__ import annotations

import numpy as np

from fedrec.models.configs import TextTransformerConfig
from fedrec.params import Array, Params

LENGTH = 3.0
"""Of every direction; Adam moves numbers by about the same, so it says how far a step moves a layer."""


def laid(config: TextTransformerConfig, params: Params, gradient: Params) -> dict[str, Array]:
    """Return the parameters with adapters, and the items' mixing, along the singular vectors of a gradient.

    With ``G = sum_k s_k u_k v_k^T`` of a layer ``y = W x``, the rows of D are ``v_1 .. v_r``: most of what the layer
    would learn is a change of W along them. U is 0. Of the projection U has ``u_1 .. u_r``, and D is 0, for what texts
    say differs between catalogues, and where in the space of items it is said hardly does. Nor does where items
    differ, so the mixing has ``u_1 .. u_k``.

    Args:
        config: the model, with adapters.
        params: of the model without adapters.
        gradient: of the loss on public data, where items have no numbers of their own.

    Source: Zhou et al., ICLR 2021 (a public subspace of gradients); Wang et al., NeurIPS 2024 (LoRA-GA).
    """
    found = {name: np.asarray(value) for name, value in params.items()}
    for name, value in params.items():
        if not name.endswith(".weight") or value.ndim != 2:
            continue
        layer, rank = name.removesuffix("weight"), config.lora
        left, _, right = np.linalg.svd(np.asarray(gradient[name], np.float64), full_matrices=False)
        if name == "projection.weight":
            found["mix"] = _array(left[:, : config.residual])
            found[layer + "up"] = _array(left[:, :rank])
            found[layer + "down"] = np.zeros((rank, value.shape[1]), np.float32)
        else:
            found[layer + "down"] = _array(right[:rank])
            found[layer + "up"] = np.zeros((value.shape[0], rank), np.float32)
    return found


def _array(directions: Array) -> Array:
    return np.ascontiguousarray(LENGTH * directions, np.float32)
