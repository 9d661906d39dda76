"""LightGCN on all of the graph that a device knows: the person and what they took."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from fedrec.models.configs import LightGcnConfig
from fedrec.models.layers import seeded_dropout
from fedrec.models.sequence import NextItem, running_mean
from fedrec.random import Key


class LightGcn(NextItem):
    r"""The mean of a person's states over K rounds of passing messages in a star.

    The person has degree |H| and, on the device, every item has degree 1, so an odd number of steps leads to
    :math:`|H|^{-1/2} \sum_H v_j` and an even one back to where it began:

    .. math:: u = (1 - o) u_0 + o \, |H|^{-1/2} \sum_{j \in H} v_j, \qquad o = \lceil K / 2 \rceil / (K + 1)

    with one start u_0 for everybody. That is the limit of the ego graph: no message comes from another person, and a
    second step brings nothing new. What people have in common reaches the item vectors through training alone.

    Source: He et al., SIGIR 2020, equations 7 and 8.
    """

    def __init__(self, config: LightGcnConfig, n_items: int, key: Key) -> None:
        """Draw the vectors from `key`."""
        super().__init__(config, n_items, key)
        self.odd = ((config.layers + 1) // 2) / (config.layers + 1)

    def trunk(
        self, x: Float[Tensor, "b l d"], items: Int[Tensor, "b l"], seeds: Int[Tensor, " b"] | None
    ) -> Float[Tensor, "b l e"]:
        """Return the person's state when so much was taken."""
        passed = running_mean(x, 0.5)
        own = (1.0 - self.odd) * self.start[..., None, :] + self.odd * passed
        return seeded_dropout(own * self.settings.dim**0.5, self.settings.dropout, seeds, 0)
