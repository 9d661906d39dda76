"""The spectral recommender: eigenvectors of a noised co-occurrence statistic, scored by a decayed history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedrec.data.batches import Batch, BatchSpec
from fedrec.models.configs import SpectralConfig
from fedrec.models.layers import by_age
from fedrec.models.losses import masked_mean
from fedrec.models.recommender import Recommender, copy_grown
from fedrec.random import Key


class Spectral(Recommender):
    r"""Two linear item-to-item models and popularity, each brought to the same spread.

    .. math:: s_{ui} = w_I \frac{q_u^T a_i}{\sigma(q_u)} + w_F \frac{p_u^T b_i}{\sigma(p_u)} + w_P \, c_i, \qquad
              q_u = \sum_t decay^{age(t)} a_{x_t}, \quad \sigma(q) = \sqrt{q^T \mathrm{Cov}(a) \, q}

    with a the eigenvectors of the items' statistic times a power of their eigenvalues, b those of the feature space
    carried back to items, and c the standardised popularity. The covariances of the rows are kept as parameters, so a
    score stays one product of a user vector with an item row.
    """

    row_names: ClassVar[frozenset[str]] = frozenset({"items", "features", "popularity"})
    gathers = False

    def __init__(self, config: SpectralConfig, n_items: int, key: Key) -> None:
        """Start without any knowledge: all rows are zero; `key` is not needed."""
        super().__init__()
        self.config = self.settings = config
        self.n_items = n_items
        self.spec = BatchSpec("pairs", length=config.length, targets=32, negatives=1)
        self.items = nn.Parameter(torch.zeros(n_items, config.item_rank))
        self.features = nn.Parameter(torch.zeros(n_items, config.feature_rank))
        self.popularity = nn.Parameter(torch.zeros(n_items))
        self.item_spread = nn.Parameter(torch.zeros(config.item_rank, config.item_rank))
        self.feature_spread = nn.Parameter(torch.zeros(config.feature_rank, config.feature_rank))
        self._rows: Tensor | None = None

    def encode(self, items: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Return the scaled user vectors of both parts, and the weight of popularity."""
        decays = (self.settings.decay, self.settings.feature_decay or self.settings.decay)
        weights = (by_age(mask, decay) for decay in decays)
        parts = (
            standard(torch.einsum("bl,bld->bd", weight, table[items]), spread) * factor
            for weight, table, spread, factor in zip(
                weights,
                (self.items, self.features),
                (self.item_spread, self.feature_spread),
                (self.settings.item_weight, self.settings.feature_weight),
                strict=True,
            )
        )
        ones = torch.full((len(items), 1), self.settings.popularity_weight)
        return torch.cat([*parts, ones], dim=1)

    def score(
        self, users: Float[Tensor, "b d"], items: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b n"] | Float[Tensor, "b k"]:
        """Return the products of user vectors and item rows."""
        rows = self._table()
        return users @ rows.T if items is None else torch.einsum("bd,bkd->bk", users, rows[items])

    def score_into(self, users: Float[Tensor, "b d"], out: Float[Tensor, "b n"]) -> None:
        """Write the scores of the whole catalogue into `out`."""
        torch.mm(users, self._table().T, out=out)

    def loss(self, batch: Batch, local: Mapping[str, Tensor] | None = None) -> Float[Tensor, " b"]:
        """Return the cross-entropy over the catalogue of each person's targets, given the history; to compare with."""
        scores = self.score(self.encode(batch.inputs, batch.input_mask))
        wanted = scores.gather(1, batch.targets)
        return masked_mean(torch.logsumexp(scores, -1)[..., None] - wanted, batch.target_mask)

    def grow(self, n_items: int, key: Key) -> Recommender:
        """Return a copy whose new items score 0 until the next statistic; `key` is not needed."""
        grown = type(self)(self.settings, n_items, key)
        copy_grown(self, grown)
        return grown

    def train(self, mode: bool = True) -> Spectral:
        """Forget what was computed from the parameters, which may have been replaced."""
        self._rows = None
        return super().train(mode)

    def _table(self) -> Tensor:
        if torch.is_grad_enabled() or self._rows is None:
            self._rows = torch.cat([self.items, self.features, self.popularity[:, None]], dim=1)
        return self._rows


def standard(users: Float[Tensor, "b d"], covariance: Float[Tensor, "d d"]) -> Float[Tensor, "b d"]:
    """Return user vectors whose scores have spread 1 over the items; a vector of zeros stays one."""
    variance = ((users @ covariance) * users).sum(1, keepdim=True)
    return users * torch.where(variance > 0, variance.clamp(min=1e-30).rsqrt(), 0.0)
