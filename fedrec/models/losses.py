"""Losses per person, never reduced over people."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def masked_mean(values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """Return the mean of each person's valid values, 0 where there is none."""
    weight = mask.to(values.dtype)
    return (values * weight).sum(-1) / weight.sum(-1).clamp(min=1.0)


def full_softmax(
    logits: Float[Tensor, "b t n"], targets: Int[Tensor, "b t"], mask: Bool[Tensor, "b t"]
) -> Float[Tensor, " b"]:
    """Return ``mean_t(log sum_j exp z_tj - z_t,target)`` of each person."""
    positive = logits.gather(-1, targets[..., None])[..., 0]
    return masked_mean(torch.logsumexp(logits, -1) - positive, mask)


def sampled_softmax(
    positive: Float[Tensor, "b t"],
    negative: Float[Tensor, "b t n"],
    collides: Bool[Tensor, "b t n"],
    mask: Bool[Tensor, "b t"],
    n_items: int,
) -> Float[Tensor, " b"]:
    """Return the softmax loss estimated from N uniform negatives.

    Each negative stands for ``(n_items - 1) / N`` items, so its logit is raised by the log of that; a negative that
    equals the target is left out. The temperature is that of the full softmax.

    Source: Bengio and Senecal, IEEE Trans. Neural Networks 2008 (importance-sampled softmax, uniform proposal).
    """
    raised = negative + math.log(max(n_items - 1, 1) / negative.shape[-1])
    everything = torch.cat([positive[..., None], raised.masked_fill(collides, float("-inf"))], -1)
    return masked_mean(torch.logsumexp(everything, -1) - positive, mask)
