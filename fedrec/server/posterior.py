"""What a noised co-occurrence most likely was: the noise is known and pairs are never negative. Post-processing."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedrec.params import Array

AT_ONCE = 512
"""Rows computed together, in float64."""
LEAST = 2e-3
"""Least prior mean of a second look, in deviations of the noise."""


def expected_pairs(
    pairs: NDArray[np.float32],
    counts: Array,
    deviation: float,
    features: NDArray[np.float32] | None = None,
    sketch: NDArray[np.float32] | None = None,
    caution: float = 1.0,
) -> NDArray[np.float32]:
    r"""Return the posterior mean of every entry of a noised statistic of items.

    .. math:: y_{ij} = x_{ij} + \sigma \epsilon_{ij}, \qquad x_{ij} \sim \mathrm{Exponential}(m_{ij}), \qquad
              m_{ij} = (Q C Q^T)^+_{ij} + t \, c_i c_j

    The prior mean m is empirical: what the public features let one expect of the pair, with C the statistic in feature
    space, and what the two items' popularity does, with t such that it adds up to all pairs seen. Most pairs of a large
    catalogue are rare, so the prior removes most of the noise, while pairs far above it stay as they are.

    Args:
        pairs: [n, n] symmetric, noised.
        counts: [n] noised counts.
        deviation: standard deviation of the noise in each entry of pairs and sketch; 0 returns the pairs as they are.
        features: B [n, r], columns about orthogonal and of one length, or 0.
        sketch: ``B^T W B`` [r, r] noised, W another weighing of the same pairs.
        caution: what part of the deviation the posterior assumes; below 1 more of the pairs and of the noise is kept,
            0 returns the pairs as they are.

    Source: the mean of a truncated normal distribution, Johnson, Kotz & Balakrishnan, vol. 1, section 13.10.1.
    """
    if deviation * caution <= 0:
        return pairs
    n = len(pairs)
    taken = np.maximum(counts.astype(np.float64), 0.0)
    taken = taken + 0.2 * taken.mean() if taken.any() else np.ones(n)
    # Below this a sum of so many entries cannot be told from noise alone.
    total = max(float(pairs.sum(dtype=np.float64)), math.sqrt(2.0) * deviation * n)
    share = taken / taken.sum()
    carried = None if features is None or sketch is None else _carried(pairs, deviation, features, sketch)
    found = np.empty_like(pairs)
    for start in range(0, n, AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        prior = total * share[rows, None] * share[None, :]
        if carried is not None:
            prior = prior + np.maximum(carried[0][rows] @ carried[1], 0.0)
        found[rows] = posterior_mean(pairs[rows], deviation * caution, prior)
    return found


def second_look(
    pairs: NDArray[np.float32], first: NDArray[np.float32], deviation: float, rank: int
) -> NDArray[np.float32]:
    """Return the posterior mean of every entry whose prior mean is what the leading part of a first estimate says.

    The first estimate saw the same noise, so its small eigenvalues are left out of the prior.

    Args:
        pairs: [n, n] symmetric, noised.
        first: [n, n] their first estimate.
        deviation: standard deviation of the noise that is assumed in each entry.
        rank: how many eigenvectors, of the largest eigenvalues, make the prior.
    """
    import torch

    values, vectors = torch.linalg.eigh(torch.from_numpy(first))
    lead = vectors[:, -rank:] * values[-rank:].clamp(min=0.0).sqrt()
    found = np.empty_like(pairs)
    for start in range(0, len(pairs), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        prior = (lead[rows] @ lead.T).clamp(min=LEAST * deviation).numpy()
        found[rows] = posterior_mean(pairs[rows], deviation, prior)
    return found


def posterior_mean(
    observed: NDArray[np.floating], deviation: float, prior: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Return the mean of a number of exponential prior with mean `prior`, seen with normal noise.

    It is the mean of a normal distribution about ``observed - deviation^2 / prior``, cut off below 0.
    """
    import torch

    centre = torch.as_tensor(observed.astype(np.float64) - deviation**2 / prior.astype(np.float64))
    # The ratio of density to distribution, in the form that does not underflow far below 0.
    ratio = math.sqrt(2.0 / math.pi) / torch.special.erfcx(centre / (-deviation * math.sqrt(2.0)))
    mean: NDArray[np.float64] = (centre + deviation * ratio).clamp(min=0.0).numpy()
    return mean


def _carried(
    pairs: NDArray[np.float32],
    deviation: float,
    features: NDArray[np.float32],
    sketch: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Return two factors of what the features say of the pairs, on the pairs' scale; None if it drowns in noise.

    The sketch and the pairs' own projection tell of the same block; they are weighed by their variances.
    """
    used = int(features.any(axis=0).sum())
    length = float(np.square(features, dtype=np.float64).sum()) / max(1, used)
    if not length:
        return None
    basis = (features / math.sqrt(length)).astype(np.float32)
    told, own = sketch / np.float32(length), basis.T @ (pairs @ basis)
    variance = (deviation / length) ** 2
    strength = float(np.square(told, dtype=np.float64).sum()) - used**2 * variance
    if strength <= 4.0 * used * variance:
        return None
    scale = float((own * told).sum(dtype=np.float64)) / strength
    if scale <= 0:
        return None
    weight = deviation**2 / (deviation**2 + 2.0 * scale**2 * variance)
    block = np.asarray(weight * scale * told + (1.0 - weight) * own, np.float32)
    left: NDArray[np.float32] = (basis @ block).astype(np.float32)
    return left, np.ascontiguousarray(basis.T)
