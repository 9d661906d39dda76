"""From a noised statistic to a recommender: post-processing, which costs no privacy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import TallyRefused
from fedrec.models.configs import SpectralConfig
from fedrec.params import Array, Params
from fedrec.protocol.triangle import packed, unpacked
from fedrec.server.posterior import expected_pairs, second_look

Features = NDArray[np.float32]
_F32 = np.dtype(np.float32)


def projected(features: Features | None, sums: Params, n_clients: int) -> dict[str, Array]:
    """Return the sums with the weighted pairs carried into feature space: ``B^T W B``.

    Every client's share of the result has norm 1 at most, which is checked for the sum.

    Raises:
        TallyRefused: the statistic is longer than so many clients can have made it.
    """
    found = {name: value for name, value in sums.items() if name != "pairs"}
    if "pairs" in sums:
        found["items"] = sums["pairs"][:, 0]
        if features is not None:
            pairs = unpacked(sums["pairs"][:, 1], len(features))
            found["features"] = packed(features.T @ (pairs @ features)).astype(np.float32)
    length = math.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in found.values()))
    if length > n_clients * (1 + 1e-3) + 1e-6:
        raise TallyRefused(f"the statistic has norm {length:.4g}, more than {n_clients} clients can contribute")
    return found


def spectral_params(
    statistic: Params, counts: Array, config: SpectralConfig, features: Features | None, n_items: int
) -> dict[str, Array]:
    """Return the parameters of the spectral model.

    Args:
        statistic: noised ``items`` [n (n + 1) / 2], ``features`` [r (r + 1) / 2]; what is missing leaves its part at
            zero; ``variance`` [1] of the noise in each entry, 0 if missing; ``recent`` [n] counts for the popularity
            part, `counts` if missing.
        counts: [n] released popularity counts.
        config: ranks and powers.
        features: B [n, r].
        n_items: n.
    """
    small = None
    if "features" in statistic and features is not None:
        small = unpacked(statistic["features"], features.shape[1])
    rows = np.zeros((n_items, config.item_rank), np.float32)
    if "items" in statistic and config.item_rank and n_items > 1:
        pairs = unpacked(statistic["items"], n_items)
        deviation = math.sqrt(float(statistic["variance"][0])) if "variance" in statistic else 0.0
        found = expected_pairs(pairs, counts, deviation, features, small, config.caution)
        if config.second_rank and config.caution * deviation > 0:
            found = second_look(pairs, found, config.caution * deviation, config.second_rank)
        rows = _rows(found, config.item_rank, config.item_power, config.item_shrink * deviation)
    carried = np.zeros((n_items, config.feature_rank), np.float32)
    if small is not None and features is not None and config.feature_rank:
        carried = features @ _rows(small, config.feature_rank, config.feature_power)
    return {
        "items": rows,
        "features": carried,
        "popularity": popularity(statistic.get("recent", counts)),
        "item_spread": _covariance(rows),
        "feature_spread": _covariance(carried),
    }


def _covariance(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    centred = rows - rows.mean(axis=0)
    spread: NDArray[np.float32] = (centred.T @ centred / np.float32(max(1, len(rows)))).astype(np.float32)
    return spread


def grown_statistic(statistic: Params, n_before: int, n_items: int) -> dict[str, Array]:
    """Return the statistic of a larger catalogue: nothing was seen yet of the new items."""
    if n_before == n_items or not statistic:
        return dict(statistic)
    grown = dict(statistic)
    if "items" in statistic:
        square = np.zeros((n_items, n_items), np.float32)
        square[:n_before, :n_before] = unpacked(statistic["items"], n_before)
        grown["items"] = packed(square).astype(np.float32)
    return grown


def added(a: Params, b: Params) -> dict[str, Array]:
    """Return the sum of two statistics, either of which may be empty."""
    return {name: a[name] + b[name] if name in a and name in b else (a if name in a else b)[name] for name in {*a, *b}}


def popularity(counts: Array) -> NDArray[np.float32]:
    """Return standardised roots of the counts; a fifth of their mean is added: noise near 0 is not stretched."""
    taken = np.maximum(counts.astype(np.float64), 0.0)
    roots = np.sqrt(taken + 0.2 * taken.mean())
    spread = roots.std()
    standard: NDArray[np.float32] = ((roots - roots.mean()) / (spread if spread > 0 else 1.0)).astype(np.float32)
    return standard


def _rows(square: NDArray[np.float32], rank: int, power: float, lowered: float = 0.0) -> NDArray[np.float32]:
    """Return [n, rank] eigenvectors of the largest eigenvalues, times ``(w / w_max)^(power / 2)``.

    w are the eigenvalues less `lowered`, where that is positive (soft thresholding, the proximal map of the nuclear
    norm: Cai, Candes and Shen, 2010). The power is halved, because a score multiplies two rows.
    """
    from scipy.linalg import eigh

    n = len(square)
    rows = np.zeros((n, rank), np.float32)
    if rank == 0:
        return rows
    # Only those that are kept: that takes a third of the time of all.
    values, vectors = eigh(square, subset_by_index=(max(0, n - rank), n - 1))
    values, vectors = values[::-1], vectors[:, ::-1]
    positive = np.maximum(values - np.float32(lowered), 0.0)
    share = positive / np.maximum(positive.max(initial=0.0), 1e-30)
    rows[:, : len(values)] = vectors * np.where(positive > 0, share ** (power / 2), 0.0)
    return rows
