"""What recommendation lists are like beyond hits: how novel, how diverse, and how evenly spread over the catalogue."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import DataError

_BLOCK_VALUES = 1 << 20


def novelty(lists: NDArray[np.int64], popularity: NDArray[np.number[Any]], n_items: int) -> NDArray[np.float64]:
    r"""Return how surprising each list is, in bits per item.

    .. math:: \frac{1}{|L|} \sum_{i \in L} -\log_2 \frac{c_i + 1}{\sum_j (c_j + 1)}

    Args:
        lists: [p, k] item numbers, -1 for no item.
        popularity: [n] counts c, public or released; items beyond n <= n_items count as never chosen, and so does a
            count that noise has made negative.
        n_items: size of the catalogue.

    Returns:
        [p] float64; 0 for an empty list.

    Raises:
        DataError: there are more counts than items.

    Source: Castells, Hurley and Vargas, Recommender Systems Handbook 2015, chapter 26 (mean self-information).
    """
    if popularity.ndim != 1 or len(popularity) > n_items:
        raise DataError(
            f"Popularity has the shape {list(popularity.shape)} for a catalogue of {n_items:,} items; "
            "give one count for each item."
        )
    counts = np.ones(n_items)
    counts[: len(popularity)] += np.maximum(popularity, 0)
    bits = np.log2(counts.sum()) - np.log2(counts)
    listed = lists >= 0
    total = np.append(bits, 0.0)[lists].sum(axis=1)  # index -1, no item, finds the 0
    return np.asarray(total / np.maximum(listed.sum(axis=1), 1))


def diversity(lists: NDArray[np.int64], attributes: NDArray[np.floating[Any]], n_items: int) -> NDArray[np.float64]:
    r"""Return how unlike each other the items of each list are.

    .. math:: \frac{1}{m (m - 1)} \sum_{i \ne j \in L} (1 - \cos(a_i, a_j)), \qquad m = |L|

    An item without attributes is unlike every other: its cosine is 0.

    Args:
        lists: [p, k] item numbers, -1 for no item.
        attributes: [n_items, n_attributes] a vector a for each item.
        n_items: size of the catalogue.

    Returns:
        [p] float64; 0 for a list of fewer than two items.

    Raises:
        DataError: there are not as many attribute vectors as items.

    Source: intra-list diversity, Ziegler et al., WWW 2005.
    """
    if attributes.ndim != 2 or len(attributes) != n_items:
        raise DataError(
            f"The attributes have the shape {list(attributes.shape)} for a catalogue of {n_items:,} items; "
            "give one row for each item."
        )
    cosines = np.empty(len(lists))
    step = max(1, _BLOCK_VALUES // max(lists.shape[1] * attributes.shape[1], 1))
    for start in range(0, len(lists), step):
        block = lists[start : start + step]
        vectors = attributes[block].astype(np.float64)
        squares = np.einsum("pka,pka->pk", vectors, vectors)
        has = (squares > 0) & (block >= 0)
        scale = has / np.sqrt(np.where(has, squares, 1.0))
        total = (scale[:, None] @ vectors)[:, 0]
        # The squared length of the sum is the sum over all ordered pairs, each item with itself included.
        cosines[start : start + step] = np.einsum("pa,pa->p", total, total) - has.sum(axis=1)
    n_listed = (lists >= 0).sum(axis=1)
    n_pairs = n_listed * (n_listed - 1)
    return np.where(n_pairs > 0, 1.0 - cosines / np.maximum(n_pairs, 1), 0.0)


def coverage(recommended: NDArray[np.number[Any]]) -> float:
    """Return the share of the catalogue that was recommended at least once.

    Args:
        recommended: [n_items] how often each item was recommended.

    Source: Ge, Delgado-Battenfeld and Jannach, RecSys 2010 (catalogue coverage).
    """
    return float(np.mean(recommended > 0)) if len(recommended) else 0.0


def gini(recommended: NDArray[np.number[Any]]) -> float:
    r"""Return how unevenly recommendations fall on items: 0 all alike, towards 1 all on one item.

    .. math:: \frac{1}{n \sum_i x_i} \sum_{i=1}^{n} (2 i - n - 1) \, x_{(i)}, \qquad x_{(1)} \le x_{(2)} \le ...

    Args:
        recommended: [n_items] how often each item was recommended, x; never negative.

    Returns:
        The coefficient; 0 if nothing was recommended.

    Source: Shani and Gunawardana, Recommender Systems Handbook 2011, section 8.3.3 (with n in place of n - 1).
    """
    n, total = len(recommended), float(np.sum(recommended))
    if total <= 0:
        return 0.0
    weights = 2.0 * np.arange(1, n + 1) - n - 1
    return float(weights @ np.sort(recommended).astype(np.float64)) / (n * total)
