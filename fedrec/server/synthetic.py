"""Synthetic histories: what people who never lived would have taken, drawn from models that the server already has.

No client is asked and no client's data is read. Whatever is computed from noised sums is post-processing, so under
differential privacy these histories, and all that is learnt from them, cost no privacy: epsilon 0.

Source: post-processing: Dwork and Roth, Foundations and Trends 2014, proposition 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedrec.models.recommender import Recommender
from fedrec.params import Array
from fedrec.random import Key

Ints = NDArray[np.int64]
AT_ONCE = 256
"""Histories that are drawn together."""


@dataclass(frozen=True)
class Source:
    """A model that histories are drawn from.

    Attributes:
        model: scores what comes next; None: every item is drawn by popularity.
        temperature: scores are divided by it before the softmax.
        known: [n_items] in [0, 1], a factor on the probability of each item: 0 where the model knows nothing of it.
    """

    model: Recommender | None
    temperature: float = 1.0
    known: NDArray[np.float32] | None = None


def first_shares(counts: Array) -> NDArray[np.float64]:
    """Return [n] how likely each item is the first of a history: its share of the (noised) counts, none below 0.

    >>> first_shares(np.array([3.0, -0.5, 1.0])).tolist()
    [0.75, 0.0, 0.25]
    """
    taken = np.maximum(np.asarray(counts, np.float64), 0.0)
    return taken / taken.sum() if taken.sum() > 0 else np.full(len(taken), 1.0 / len(taken))


@torch.no_grad()
def sample_histories(source: Source, first: NDArray[np.float64], n: int, length: int, key: Key) -> Ints:
    r"""Return [n, l] item numbers, oldest first, no item twice in a history; l is at most the size of the catalogue.

    .. math:: x_1 \sim first, \qquad x_t \sim \mathrm{softmax}(s(x_1 \dots x_{t-1}) / T)

    over what the history does not hold yet. History h is a function of the key and h alone: more histories leave the
    first ones as they were, but for rounding.

    Args:
        source: what is drawn from.
        first: [n_items] shares of the first item.
        n: how many histories.
        length: of each.
        key: where the randomness comes from.
    """
    length = min(length, len(first))
    parts = [
        _sample(source, first, np.arange(start, min(start + AT_ONCE, n), dtype=np.int64), length, key)
        for start in range(0, n, AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.zeros((0, length), np.int64)


def _sample(source: Source, first: NDArray[np.float64], numbers: Ints, length: int, key: Key) -> Ints:
    found = np.zeros((len(numbers), length), np.int64)
    had = np.zeros((len(numbers), len(first)), np.bool_)
    drawn = key.uniforms(numbers, length)
    for place in range(length):
        shares = np.broadcast_to(first, had.shape)
        if place and source.model is not None:
            shares = _shares(source, found[:, :place])
        found[:, place] = draw_one(np.where(had, 0.0, shares), had, drawn[:, place])
        had[np.arange(len(numbers)), found[:, place]] = True
    return found


def _shares(source: Source, so_far: Ints) -> NDArray[np.float64]:
    assert source.model is not None
    model = source.model
    places = torch.full((len(so_far), 1), so_far.shape[1])
    scores = model.score(model.states(torch.from_numpy(so_far), places)[:, 0]).double() / source.temperature
    shares: NDArray[np.float64] = scores.softmax(-1).numpy()
    return shares if source.known is None else shares * source.known


def draw_one(shares: NDArray[np.float64], had: NDArray[np.bool_], uniform: NDArray[np.float64]) -> Ints:
    """Return one item for each row, in proportion to its shares; where all are 0, the first that is not yet had.

    Args:
        shares: [b, n] not negative, 0 for what is had.
        had: [b, n] what must not be drawn.
        uniform: [b] in [0, 1).

    >>> draw_one(np.array([[0.5, 0.0, 0.5]]), np.array([[False, True, False]]), np.array([0.6])).tolist()
    [2]
    """
    total = np.cumsum(shares, axis=1)
    found = (total <= (uniform * total[:, -1])[:, None]).sum(axis=1)
    empty = total[:, -1] <= 0
    found[empty] = np.argmin(had[empty], axis=1)
    drawn: Ints = np.minimum(found, shares.shape[1] - 1).astype(np.int64)
    return drawn
