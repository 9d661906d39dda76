"""A factorisation machine over the bag of a person's items and the item that is scored."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedrec.models.configs import MachineConfig
from fedrec.models.layers import normal_rows, rows, seeded_dropout
from fedrec.models.sequence import INITIAL, NextItem, running_mean
from fedrec.random import Key


class FactorisationMachine(NextItem):
    r"""All that depends on the scored item in a second-order factorisation machine.

    .. math:: s_{ui} = w_i + v_i^T \sum_{j \in H} x_j q_j, \qquad x_j = |H|^{-1/2}

    with v the factors of an item that is scored and q those of one that was taken.

    Source: Rendle, ICDM 2010, equation 1, with the features "taken before" and "scored".
    """

    row_names: ClassVar[frozenset[str]] = frozenset({"popularity", "item", "taken", "bias"})
    reads_apart: ClassVar[bool] = True

    def __init__(self, config: MachineConfig, n_items: int, key: Key) -> None:
        """Draw both tables from `key`."""
        super().__init__(config, n_items, key)
        self.taken = nn.Parameter(normal_rows(key.child("taken"), 0, n_items, config.dim, 10 * INITIAL))
        self.bias = nn.Parameter(torch.zeros(n_items, 1))

    def vectors(self, numbers: Int[Tensor, "b k"]) -> Float[Tensor, "b k e"]:
        """Return the factors of scored items, with their weight as one more number."""
        return torch.cat([rows(self.item, numbers), rows(self.bias, numbers)], -1)

    def table(self) -> Float[Tensor, "*own n e"]:
        """Return the same of all items."""
        return torch.cat([self.item, self.bias], -1)

    def read(self, numbers: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        """Return the factors of items that were taken."""
        return rows(self.taken, numbers)

    def trunk(
        self, x: Float[Tensor, "b l d"], items: Int[Tensor, "b l"], seeds: Int[Tensor, " b"] | None
    ) -> Float[Tensor, "b l e"]:
        """Return the sum of what was taken so far, and a 1 that meets the weight."""
        h = seeded_dropout(running_mean(x, 0.5), self.settings.dropout, seeds, 0)
        return torch.cat([h, torch.ones_like(h[..., :1])], -1)
