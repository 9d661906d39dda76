"""Popularity: everybody gets what most people took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedrec.data.batches import Batch, BatchSpec
from fedrec.models.configs import PopularityConfig
from fedrec.models.losses import masked_mean
from fedrec.models.recommender import Recommender, copy_grown
from fedrec.random import Key


class Popularity(Recommender):
    """Score of an item = how many times it was taken: ``s_ui = c_i``, for every u."""

    row_names: ClassVar[frozenset[str]] = frozenset({"counts"})
    personal: ClassVar[bool] = False
    gathers = False

    def __init__(self, config: PopularityConfig, n_items: int, key: Key) -> None:
        """Start with every count at zero; `key` is not needed."""
        super().__init__()
        self.config = config
        self.n_items = n_items
        self.spec = BatchSpec("pairs", length=1, targets=32)
        self.counts = nn.Parameter(torch.zeros(n_items))

    def encode(self, items: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b 1"]:
        """Return ones: nobody is different."""
        return torch.ones(len(items), 1)

    def score(
        self, users: Float[Tensor, "b 1"], items: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b n"] | Float[Tensor, "b k"]:
        """Return the counts."""
        return users * (self.counts if items is None else self.counts[items])

    def loss(self, batch: Batch, local: Mapping[str, Tensor] | None = None) -> Float[Tensor, " b"]:
        """Return ``-log((c_t + 1) / sum_j (c_j + 1))``, averaged over each person's targets."""
        smoothed = torch.log(self.counts.clamp(min=0) + 1.0)
        wanted = smoothed.expand(len(batch.targets), -1).gather(1, batch.targets)
        return masked_mean(torch.logsumexp(smoothed, -1)[..., None] - wanted, batch.target_mask)

    def grow(self, n_items: int, key: Key) -> Recommender:
        """Return a copy with zero counts for the new items."""
        grown = type(self)(PopularityConfig(), n_items, key)
        copy_grown(self, grown)
        return grown
