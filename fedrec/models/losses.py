"""Losses per person, never reduced over people."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
    """Return the mean of each person's valid values, 0 where there is none."""
    weight = mask.to(values.dtype)
    return (values * weight).sum(-1) / weight.sum(-1).clamp(min=1.0)


def sampled_softmax(
    positive: Float[Tensor, "b t"],
    wanted: Float[Tensor, "b t"],
    negative: Float[Tensor, "b t n"],
    excluded: Bool[Tensor, "b t n"],
    mask: Bool[Tensor, "b t"],
    stands_for: float,
) -> Float[Tensor, " b"]:
    """Return the softmax loss estimated from N negatives, each of which stands for r items of the catalogue.

    ``mean_t(log(exp p_t + r sum_{j not excluded} exp z_tj) - w_t)``. With all items as negatives and r = 1 it is the
    softmax cross-entropy itself; with fewer, uniform ones its temperature is the same.

    Args:
        positive: logit of each target.
        wanted: what is pulled up: the target's logit, or a mean of it and those of the next targets.
        negative: logits of the negatives.
        excluded: negatives that are none at this position: the target itself, and what the person already has.
        mask: which positions count.
        stands_for: r, ``(n_items - 1) / N`` for uniform negatives.

    Source: Bengio and Senecal, IEEE Trans. Neural Networks 2008 (importance-sampled softmax, uniform proposal).
    """
    raised = negative + math.log(stands_for)
    everything = torch.cat([positive[..., None], raised.masked_fill(excluded, float("-inf"))], -1)
    return masked_mean(torch.logsumexp(everything, -1) - wanted, mask)


def imitation(
    own: Float[Tensor, "b t n"],
    teacher: Float[Tensor, "b t n"],
    excluded: Bool[Tensor, "b t n"],
    mask: Bool[Tensor, "b t"],
) -> Float[Tensor, " b"]:
    """Return how far the choice among candidates is from the teacher's: ``mean_t KL(softmax teacher, softmax own)``.

    Args:
        own: logits of the candidates.
        teacher: those of the teacher.
        excluded: candidates that do not count at this position.
        mask: which positions count.

    Source: Hinton et al., 2015, at temperature 1; on sampled candidates.
    """
    least = torch.finfo(own.dtype).min
    logs = torch.log_softmax(own.masked_fill(excluded, least), -1)
    wanted = torch.log_softmax(teacher.masked_fill(excluded, least), -1)
    return masked_mean((wanted.exp() * (wanted - logs).masked_fill(excluded, 0.0)).sum(-1), mask)


def lookahead(logits: Float[Tensor, "b t h"], valid: Bool[Tensor, "b t h"], decay: float) -> Float[Tensor, "b t"]:
    """Return the weighted mean of the next h targets' logits, weight ``decay^j`` for the j-th, where they are valid."""
    weight = valid * decay ** torch.arange(logits.shape[-1], dtype=logits.dtype)
    return (logits * weight).sum(-1) / weight.sum(-1).clamp(min=1e-9)
