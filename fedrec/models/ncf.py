"""Neural collaborative filtering: a product and a small network, side by side."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedrec.models.configs import NcfConfig
from fedrec.models.layers import Linear, normal, product, seeded_dropout
from fedrec.models.sequence import NextItem, running_mean
from fedrec.random import Key


class Ncf(NextItem):
    r"""NeuMF whose user vector is the mean of what the person took, so nobody has to be trained in.

    .. math:: s_{ui} = g^T (u \odot v_i) + w^T \mathrm{relu}(A u + B v_i + b), \qquad
              u = \sqrt{d} \; |H|^{-1} \sum_{j \in H} v_j

    Source: He et al., WWW 2017, equations 7, 10 and 12, with one hidden layer.
    """

    def __init__(self, config: NcfConfig, n_items: int, key: Key) -> None:
        """Draw the weights from `key`."""
        super().__init__(config, n_items, key)
        self.gate = nn.Parameter(torch.ones(config.dim))
        self.person = Linear(config.dim, config.hidden, key.child("person"))
        self.thing = nn.Parameter(normal(key.child("thing"), (config.hidden, config.dim), config.dim**-0.5))
        self.out = nn.Parameter(normal(key.child("out"), (1, config.hidden), config.hidden**-0.5))

    def trunk(
        self, x: Float[Tensor, "b l d"], items: Int[Tensor, "b l"], seeds: Int[Tensor, " b"] | None
    ) -> Float[Tensor, "b l e"]:
        """Return the mean of what was taken so far."""
        scaled = running_mean(x, 1.0) * self.settings.dim**0.5
        return seeded_dropout(scaled, self.settings.dropout, seeds, 0)

    def match(self, states: Float[Tensor, "b l d"], vectors: Float[Tensor, "*own k d"]) -> Float[Tensor, "b l k"]:
        """Return both terms, of every vector at every state."""
        linear = (states * self.gate[..., None, :]) @ vectors.transpose(-1, -2)
        inner = self.person(states)[..., :, None, :] + product(vectors, self.thing)[..., None, :, :]  # [b l k h]
        return linear + (torch.relu(inner) * self.out[..., None, :, :]).sum(-1)

    def match_each(self, states: Float[Tensor, "b l d"], vectors: Float[Tensor, "b l d"]) -> Float[Tensor, "b l"]:
        """Return both terms, of one vector at each state."""
        inner = torch.relu(self.person(states) + product(vectors, self.thing))
        return (states * self.gate[..., None, :] * vectors).sum(-1) + (inner * self.out).sum(-1)
