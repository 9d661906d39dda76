"""Content-based nearest neighbours: what is like the newest items, by public vectors alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedrec.data.batches import Batch, BatchSpec
from fedrec.models.configs import NearestConfig
from fedrec.models.layers import by_age
from fedrec.models.losses import masked_mean
from fedrec.models.recommender import Recommender, copy_grown
from fedrec.random import Key


class Nearest(Recommender):
    r"""Likeness to a decayed history, without any training: ``s_ui = cos(t_i, u)``.

    .. math:: u = \sum_j decay^{age(j)} \, t_j / |t_j|

    Source: Pazzani and Billsus, The Adaptive Web 2007, section 10.4.2.
    """

    row_names: ClassVar[frozenset[str]] = frozenset({"text"})
    gathers = False

    def __init__(self, config: NearestConfig, n_items: int, key: Key) -> None:
        """Start with vectors of zeros, until the server places them; `key` is not needed."""
        super().__init__()
        self.config = self.settings = config
        self.n_items = n_items
        self.spec = BatchSpec("pairs", length=config.length, targets=32, negatives=1)
        self.text = nn.Parameter(torch.zeros(n_items, config.features.rank))

    def encode(self, items: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Return the decayed sum of each history."""
        weight = by_age(mask, self.settings.decay)
        return torch.einsum("bl,bld->bd", weight, F.normalize(self.text, dim=-1)[items])

    def score(
        self, users: Float[Tensor, "b d"], items: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b n"] | Float[Tensor, "b k"]:
        """Return cosines."""
        unit, own = F.normalize(self.text, dim=-1), F.normalize(users, dim=-1)
        return own @ unit.T if items is None else torch.einsum("bd,bkd->bk", own, unit[items])

    def loss(self, batch: Batch, local: Mapping[str, Tensor] | None = None) -> Float[Tensor, " b"]:
        """Return the cross-entropy over the catalogue of each person's targets, given the history; to compare with."""
        scores = self.score(self.encode(batch.inputs, batch.input_mask))
        wanted = scores.gather(1, batch.targets)
        return masked_mean(torch.logsumexp(scores, -1)[..., None] - wanted, batch.target_mask)

    def grow(self, n_items: int, key: Key) -> Recommender:
        """Return a copy with vectors of zeros for the new items, until the server places theirs."""
        grown = type(self)(self.settings, n_items, key)
        copy_grown(self, grown)
        return grown
