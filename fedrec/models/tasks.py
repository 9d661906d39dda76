"""Heads beside the next item: what somebody will do with an item, and how much they will value it."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from fedrec.data.batches import Batch
from fedrec.models.configs import TasksConfig
from fedrec.models.layers import Linear
from fedrec.models.losses import masked_mean
from fedrec.random import Key


class Heads(nn.Module):
    r"""A value and the kind of an interaction, each read from the state before it and the item's vector.

    .. math:: \hat v = \sigma(a^T [h; v_i] + b), \qquad \hat k = \mathrm{softmax}(A [h; v_i] + c)

    The loss of a person is :math:`L_{item} + w_v L_v + w_k L_k`, L_v the mean squared error of values scaled to
    [0, 1] and L_k the cross-entropy of kinds; learned weights add a number s for each of the three,
    :math:`\sum_t e^{-s_t} w_t L_t + s_t`.

    Source: shared trunk: Caruana, Machine Learning 1997; learned weights: Kendall et al., CVPR 2018, equation 10, with
    s the log of twice the variance.
    """

    def __init__(self, config: TasksConfig, dim: int, key: Key) -> None:
        """Draw the heads from `key`."""
        super().__init__()
        self.config = config
        if config.value_weight:
            self.value = Linear(2 * dim, 1, key.child("value"))
        if config.event_weight:
            self.event = Linear(2 * dim, len(config.events), key.child("event"))
        if config.weights == "learned":
            self.balance = nn.Parameter(torch.zeros(3))

    def values(self, states: Float[Tensor, "b t d"], vectors: Float[Tensor, "b t d"]) -> Float[Tensor, "b t"]:
        """Return the expected value of each item at each state, in the units of the data."""
        low, high = self.config.value_range
        return low + (high - low) * torch.sigmoid(self.value(torch.cat([states, vectors], -1))[..., 0])

    def kinds(self, states: Float[Tensor, "b t d"], vectors: Float[Tensor, "b t d"]) -> Float[Tensor, "b t k"]:
        """Return the logits of the kinds of interaction, in the order of `TasksConfig.events`."""
        found: Tensor = self.event(torch.cat([states, vectors], -1))
        return found

    def loss(
        self, item: Float[Tensor, " b"], states: Float[Tensor, "b t d"], vectors: Float[Tensor, "b t d"], batch: Batch
    ) -> Float[Tensor, " b"]:
        """Return the weighted sum of all losses of each person; 0 for somebody without targets, at first."""
        c, zero = self.config, torch.zeros_like(item)
        low, high = c.value_range
        value = kind = zero
        if c.value_weight:
            there = batch.target_mask & ~batch.values.isnan()
            off = (self.values(states, vectors) - torch.nan_to_num(batch.values, nan=low)) / (high - low)
            value = c.value_weight * masked_mean(off**2, there)
        if c.event_weight:
            there = batch.target_mask & (batch.events >= 0)
            logits = F.log_softmax(self.kinds(states, vectors), -1)
            taken = logits.gather(-1, batch.events.clamp(min=0)[..., None])[..., 0]
            kind = c.event_weight * masked_mean(-taken, there)
        if c.weights == "fixed":
            return item + value + kind
        s = self.balance  # [3], or [b 3] with an axis of clients
        anybody = batch.target_mask.any(-1).to(item.dtype)
        losses = torch.stack([item, value, kind], -1)
        weighted: Tensor = ((-s).exp() * losses).sum(-1)
        found: Tensor = weighted + anybody * s.sum(-1)
        return found
