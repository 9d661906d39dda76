"""A gated recurrent unit over the sequence of items."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedrec.models.configs import GruConfig
from fedrec.models.layers import LayerNorm, Linear, seeded_dropout
from fedrec.models.sequence import NextItem
from fedrec.random import Key


class Gru(NextItem):
    r"""A state that each interaction updates.

    .. math:: z, r = \sigma(W x + U h), \quad n = \tanh(W_n x + r \odot U_n h), \quad h \leftarrow (1 - z) n + z h

    The cell is made of `Linear`, since torch's own takes no axis of clients.

    Source: Hidasi et al., ICLR 2016 (GRU4Rec); cell: Cho et al., EMNLP 2014, equations 5-8.
    """

    def __init__(self, config: GruConfig, n_items: int, key: Key) -> None:
        """Draw the weights from `key`."""
        super().__init__(config, n_items, key)
        self.reads = Linear(config.dim, 3 * config.dim, key.child("reads"))
        self.keeps = Linear(config.dim, 3 * config.dim, key.child("keeps"))
        self.norm = LayerNorm(config.dim)

    def trunk(
        self, x: Float[Tensor, "b l d"], items: Int[Tensor, "b l"], seeds: Int[Tensor, " b"] | None
    ) -> Float[Tensor, "b l e"]:
        """Return the state after each input."""
        x = seeded_dropout(x * self.settings.dim**0.5, self.settings.dropout, seeds, 0)
        h, found = torch.zeros_like(x[:, :1]), []
        for own in self.reads(x).split(1, dim=1):
            z, r, n = own.chunk(3, dim=-1)
            uz, ur, un = self.keeps(h).chunk(3, dim=-1)
            z = torch.sigmoid(z + uz)
            h = (1.0 - z) * torch.tanh(n + torch.sigmoid(r + ur) * un) + z * h
            found.append(h)
        out: Tensor = self.norm(seeded_dropout(torch.cat(found, 1), self.settings.dropout, seeds, 1))
        return out
