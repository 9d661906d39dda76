"""A spectral recommender and a fitted model, added up: the first is the prior, the second may correct it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedrec.data.batches import START, Batch, BatchSpec
from fedrec.models.configs import BlendConfig, FactorisationConfig
from fedrec.models.factorisation import Factorisation
from fedrec.models.losses import masked_mean
from fedrec.models.recommender import Recommender
from fedrec.models.spectral import Spectral, standard
from fedrec.models.transformer import Transformer
from fedrec.params import Array, Params
from fedrec.random import Key

RIDGE = 1e-3
"""Of the map from the prior's rows to item vectors, in mean squares of the rows."""


class Blend(Recommender):
    r"""``s_ui = prior_ui + w fitted_ui / sigma_u``: the fitted scores have spread 1 over the items for each person.

    .. math:: \sigma_u = \sqrt{h_u^T \mathrm{Cov}(v) h_u}

    The weight w and the covariance of the fitted item vectors are parameters, so a score stays one product and a larger
    catalogue leaves old scores alone. Rounds train the fitted model on its own.
    """

    row_names: ClassVar[frozenset[str]] = frozenset(
        {*(f"prior.{name}" for name in Spectral.row_names), *(f"fitted.{name}" for name in Transformer.row_names)}
    )
    gathers = False

    def __init__(self, config: BlendConfig, n_items: int, key: Key) -> None:
        """Build both parts; the fitted one starts from `key` and without any weight."""
        super().__init__()
        self.config = self.settings = config
        self.n_items = n_items
        kind = Factorisation if isinstance(config.fitted, FactorisationConfig) else Transformer
        self.prior = Spectral(config.prior, n_items, key)
        self.fitted: Factorisation | Transformer = kind(config.fitted, n_items, key)  # type: ignore[arg-type]
        self.spec = BatchSpec("causal", max(config.prior.length + 1, config.fitted.length), negatives=1)
        dim = config.fitted.dim
        self.weight = nn.Parameter(torch.zeros(1))
        self.spread = nn.Parameter(torch.zeros(dim, dim))

    def encode(self, items: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Return the prior's user vectors and the weighted ones of the fitted model, side by side."""
        taken = mask & (items != START)
        newest = _newest(items, mask, self.settings.fitted.length)
        if isinstance(self.fitted, Factorisation):
            newest = _newest(items.clamp(min=0), taken, self.settings.fitted.length)
        fitted = standard(self.fitted.encode(*newest), self.spread) * self.weight
        prior = self.prior.encode(*_newest(items.clamp(min=0), taken, self.settings.prior.length))
        return torch.cat([prior, fitted], dim=1)

    def score(
        self, users: Float[Tensor, "b d"], items: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b n"] | Float[Tensor, "b k"]:
        """Return the sum of both scores."""
        cut = users.shape[1] - self.settings.fitted.dim
        return self.prior.score(users[:, :cut], items) + self.fitted.score(users[:, cut:], items)

    def loss(self, batch: Batch, local: Mapping[str, Tensor] | None = None) -> Float[Tensor, " b"]:
        """Return the cross-entropy over the catalogue of each person's newest target; rounds train `fitted` alone."""
        newest = batch.target_mask.sum(-1, keepdim=True).clamp(min=1) + batch.target_mask.int().argmax(-1, True) - 1
        scores = self.score(self.encode(batch.inputs, batch.input_mask))
        wanted = scores.gather(1, batch.targets.gather(1, newest))
        return masked_mean(torch.logsumexp(scores, -1)[:, None] - wanted, batch.target_mask.gather(1, newest))

    def grow(self, n_items: int, key: Key) -> Recommender:
        """Return a copy of which both parts have grown."""
        grown = type(self)(self.settings, n_items, key)
        with torch.no_grad():
            for own, new in ((self.prior, grown.prior), (self.fitted, grown.fitted)):
                new.load_state_dict(own.grow(n_items, key).state_dict())
            grown.weight.copy_(self.weight)
            grown.spread.copy_(self.spread)
        return grown


def _newest(
    items: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"], length: int
) -> tuple[Int[Tensor, "b k"], Bool[Tensor, "b k"]]:
    """Return the last `length` entries of left-aligned histories (gaps at the front, as of `START`, are left out)."""
    order = torch.argsort(mask.int(), dim=1, descending=True, stable=True)
    count = mask.sum(1, keepdim=True)
    place = (count - length).clamp(min=0) + torch.arange(min(length, items.shape[1]))
    there = place < count
    return items.gather(1, order).gather(1, torch.where(there, place, 0)), there


def blended(prior: Params, fitted: Params, weight: float) -> dict[str, Array]:
    """Return the parameters of a `Blend` from those of its parts.

    Args:
        prior: of the spectral model.
        fitted: of the fitted model.
        weight: w.
    """
    item = fitted["item"]
    centred = item - item.mean(axis=0)
    return {
        **{f"prior.{name}": value for name, value in prior.items()},
        **{f"fitted.{name}": value for name, value in fitted.items()},
        "weight": np.array([weight], np.float32),
        "spread": (centred.T @ centred / np.float32(max(1, len(item)))).astype(np.float32),
    }


def mixed(prior: Params, mix: Sequence[float]) -> dict[str, Array]:
    """Return the prior with its weights of items, features and popularity multiplied.

    A part's scores are divided by their spread, so a spread that is said to be smaller is a larger weight.
    """
    items, features, popularity = (np.float32(factor) for factor in mix)
    return {
        **prior,
        "item_spread": prior["item_spread"] / items**2,
        "feature_spread": prior["feature_spread"] / features**2,
        "popularity": prior["popularity"] * popularity,
    }


def started(prior: Params, fresh: Params, config: BlendConfig) -> dict[str, Array]:
    """Return the fitted model's first parameters: item vectors that lie to each other as the prior's do.

    They are the prior's scoring rows, reduced to the leading directions, with the spread of the fresh vectors, so that
    the first scores have the temperature that the model was made for. Items of which the prior knows nothing keep
    their fresh vectors.
    """
    rows = _scoring_rows(prior, config)
    item, dim = fresh["item"].copy(), config.fitted.dim
    known = np.flatnonzero(np.abs(rows).sum(axis=1) > 0)
    if len(known) == 0:
        return dict(fresh)
    values, vectors = np.linalg.eigh((rows[known].T @ rows[known]).astype(np.float64))
    lead = vectors[:, ::-1][:, :dim] * (values[::-1][:dim] > 1e-12 * values[-1])
    reduced = (rows[known] @ lead).astype(np.float32)
    scale = item.std() / max(float(reduced.std()), 1e-12)
    item[known] = 0.0
    item[known, : reduced.shape[1]] = reduced * np.float32(scale)
    return {**fresh, "item": item}


def joined(prior: Params, fitted: Params, n_before: int, config: BlendConfig) -> dict[str, Array]:
    r"""Return the fitted parameters with the items that have just joined where the prior has them.

    .. math:: v_i = r_i W, \qquad W = \arg\min_W \sum_{j < n} |v_j - r_j W|^2 + \lambda |W|^2

    with r the prior's scoring rows and n the items of before: the map that is true for those is good for the new ones.
    Items of which the prior knows nothing keep their fresh vectors.

    Args:
        prior: of the spectral model, all items.
        fitted: of the fitted model, all items.
        n_before: n.
        config: of the blend.
    """
    rows, item = _scoring_rows(prior, config).astype(np.float64), fitted["item"].copy()
    new = n_before + np.flatnonzero(np.abs(rows[n_before:]).sum(axis=1) > 0)
    if len(new) == 0 or n_before == 0:
        return dict(fitted)
    old = rows[:n_before]
    square = old.T @ old
    square += (RIDGE * np.trace(square) / len(square)) * np.eye(len(square))
    item[new] = (rows[new] @ np.linalg.solve(square, old.T @ item[:n_before])).astype(item.dtype)
    return {**fitted, "item": item}


def turned(prior: Params, fitted: Params, n_before: int, config: BlendConfig) -> dict[str, Array]:
    r"""Return the fitted parameters with all item vectors laid anew in the prior's geometry, turned to lie as before.

    .. math:: v_i = c \, s_i Q, \qquad Q = \arg\min_{Q^T Q = 1} \sum_{j < n} |v_j - s_j Q|^2

    with s what `started` would give: distances are those of the statistic as it is now, directions those that the rest
    of the model has learnt to read, and c gives the old items the spread that they had.

    Args:
        prior: of the spectral model, all items.
        fitted: of the fitted model, all items.
        n_before: n, how many there were before.
        config: of the blend.

    Source: Schoenemann, Psychometrika 1966 (orthogonal Procrustes).
    """
    known = np.flatnonzero(np.abs(_scoring_rows(prior, config)).sum(axis=1) > 0)
    old = known[known < n_before]
    if len(old) == 0:
        return dict(fitted)
    new, item = started(prior, fitted, config)["item"].astype(np.float64), fitted["item"].copy()
    left, _, right = np.linalg.svd(new[old].T @ item[old])
    scale = float(item[old].std()) / max(float(new[old].std()), 1e-12)
    item[known] = (scale * new[known] @ (left @ right)).astype(item.dtype)
    return {**fitted, "item": item}


def _scoring_rows(prior: Params, config: BlendConfig) -> Array:
    return np.concatenate(
        [config.prior.item_weight * prior["items"], config.prior.feature_weight * prior["features"]], axis=1
    )
