"""Robust aggregation: the mean update of nodes, some of which lie. It sees single updates, so never masks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedrec.learning import AnyAggregate, Bounded, Krum, Mean, Median, TrimmedMean
from fedrec.params import Array, Params, norm
from fedrec.protocol.tally import Tally

EPSILON = 1e-12


def combined(tallies: Sequence[Tally], settings: AnyAggregate, rows: Collection[str]) -> dict[str, Array]:
    """Return the sum over all clients that the nodes' tallies stand for, whatever a few of them hold.

    Args:
        tallies: one a node, in the order of the roster; those without clients do not count.
        settings: which rule.
        rows: names of the tensors whose rows are items.

    Returns:
        The rule's mean update times the number of clients, so that dividing by it gives the mean.
    """
    told = [tally for tally in tallies if tally.n_clients]
    if not told:
        return {}
    updates = [{n: v.astype(np.float64) / tally.n_clients for n, v in tally.sums.items()} for tally in told]
    weights = np.array([tally.n_clients for tally in told], np.float64)
    mean = robust_mean(updates, weights, settings, rows)
    total = float(weights.sum())
    return {name: (value * total).astype(told[0].sums[name].dtype) for name, value in mean.items()}


def robust_mean(
    updates: Sequence[Mapping[str, Array]], weights: NDArray[np.float64], settings: AnyAggregate, rows: Collection[str]
) -> dict[str, Array]:
    """Return the mean update of the nodes by a rule.

    Args:
        updates: [n] of each node, per client.
        weights: [n] how many clients each stands for; rules that count nodes leave them out.
        settings: the rule.
        rows: names of the tensors whose rows are items.
    """
    if isinstance(settings, Median):
        return {name: np.median(_stacked(updates, name), axis=0) for name in updates[0]}
    if isinstance(settings, TrimmedMean):
        cut = min(math.floor(settings.share * len(updates)), (len(updates) - 1) // 2)
        return {name: np.sort(_stacked(updates, name), axis=0)[cut : len(updates) - cut].mean(0) for name in updates[0]}
    if isinstance(settings, Krum):
        kept = krum(updates, settings)
        return {name: _stacked([updates[place] for place in kept], name).mean(0) for name in updates[0]}
    if isinstance(settings, Bounded):
        kept = many_sided(updates, settings.one_item, rows)
        updates, weights = shortened([updates[place] for place in kept], settings.norm_factor), weights[kept]
        kept = in_line(updates, settings.left_out, settings.outstanding)
        updates, weights = shortened_rows([updates[place] for place in kept], settings.item_factor, rows), weights[kept]
    assert isinstance(settings, Mean | Bounded)
    return {name: np.tensordot(weights / weights.sum(), _stacked(updates, name), 1) for name in updates[0]}


def krum(updates: Sequence[Mapping[str, Array]], settings: Krum) -> list[int]:
    """Return the places of the updates that lie closest to their nearest neighbours, as many as are kept.

    The score of an update is the sum of squared distances to its n - f - 2 nearest others, f being how many may lie.
    Source: Blanchard et al., NeurIPS 2017, sections 4 and 5 (Multi-Krum).
    """
    n = len(updates)
    flat = _flat(updates)
    squares = np.einsum("ij,ij->i", flat, flat)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2.0 * flat @ flat.T, 0.0)
    np.fill_diagonal(distances, np.inf)
    liars = math.ceil(settings.share * n)
    near = max(1, n - liars - 2)
    scores = np.sort(distances, axis=1)[:, : min(near, n - 1)].sum(1)
    kept = max(1, n - liars) if settings.multi else 1
    return sorted(np.argsort(scores, kind="stable")[:kept].tolist())


def many_sided(updates: Sequence[Mapping[str, Array]], factor: float, rows: Collection[str]) -> list[int]:
    """Return the places of the updates that are about many items, as most are.

    The share that the longest row of an item has in the length of an update is compared with the median share: whoever
    promotes one item sends little else, and then it does not matter how short the rest makes it look.
    """
    names = sorted(set(rows) & updates[0].keys())
    if not names:
        return list(range(len(updates)))
    longest = np.array(
        [max(float(np.sqrt(np.square(_by_row(one[name])).sum(1).max())) for name in names) for one in updates]
    )
    norms = np.array([norm(update) for update in updates])
    shares = longest / np.maximum(norms, EPSILON)
    usual = float(np.median(shares[norms > 0])) if (norms > 0).any() else 0.0
    return np.flatnonzero(shares <= factor * usual).tolist()


def shortened(updates: Sequence[Mapping[str, Array]], factor: float) -> list[dict[str, Array]]:
    """Return the updates, those longer than so many times the usual length shortened to it.

    What is usual is the median over nodes: it stands however long a minority's updates are.
    Source: norm clipping, Sun et al. 2019, "Can you really backdoor federated learning?".
    """
    norms = np.array([norm(update) for update in updates])
    usual = float(np.median(norms[norms > 0])) if (norms > 0).any() else 0.0
    factors = np.minimum(1.0, factor * usual / np.maximum(norms, EPSILON))
    pairs = zip(updates, factors, strict=True)
    return [{name: value * factor for name, value in update.items()} for update, factor in pairs]


def shortened_rows(updates: Sequence[Params], factor: float, rows: Collection[str]) -> list[dict[str, Array]]:
    """Return the updates, each item's row shortened to so many times its usual length, so nobody lifts an item far.

    What is usual is the median over the nodes that moved the item (over all items, where fewer than three did).
    Most of them moved it as one that was *not* chosen, which moves it little: a small factor takes from honest updates.
    """
    found: list[dict[str, Array]] = [dict(update) for update in updates]
    for name in sorted(set(rows) & updates[0].keys()):
        stacked = _stacked(updates, name)
        flat = stacked.reshape(len(updates), stacked.shape[1], -1)
        lengths = np.sqrt(np.square(flat).sum(2))  # [n, items]
        factors = np.minimum(1.0, factor * _usual_lengths(lengths) / np.maximum(lengths, EPSILON))
        clipped = (flat * factors[:, :, None]).reshape(stacked.shape)
        for place, update in enumerate(found):
            update[name] = clipped[place]
    return found


def in_line(updates: Sequence[Params], share: float, outstanding: float) -> list[int]:
    """Return the places of the updates without those that lie furthest along the line in which all differ most.

    Nodes that push one way together make that way the one of greatest variance, however short each of them is; the
    score of an update is its squared projection on it, the mean taken off. Nobody is left out unless that line holds
    `outstanding` times the variance of the next: honest updates spread over many lines.
    Source: Shejwalkar and Houmansadr, NDSS 2021, section VI (divide and conquer), without its sampling of dimensions;
    the condition is ours.
    """
    flat = _flat(updates)
    apart = flat - flat.mean(0)
    held, axes = np.linalg.eigh(apart @ apart.T)
    if len(updates) < 3 or held[-1] < outstanding * held[-2]:
        return list(range(len(updates)))
    scores = np.square(axes[:, -1])  # of the Gram matrix: proportional to the squared projections on the same axis
    kept = len(updates) - math.floor(share * len(updates))
    return sorted(np.argsort(scores, kind="stable")[:kept].tolist())


def _usual_lengths(lengths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far a node usually moves each item: [n, items] -> [items]."""
    moved = lengths > 0
    if not moved.any():
        return np.zeros(lengths.shape[1])
    usual = np.full(lengths.shape[1], float(np.median(lengths[moved])))
    often = moved.sum(0) >= 3
    if often.any():
        usual[often] = np.nanmedian(np.where(moved, lengths, np.nan)[:, often], axis=0)
    return usual


def _by_row(value: Array) -> Array:
    return value.reshape(value.shape[0], -1)


def _flat(updates: Sequence[Params]) -> NDArray[np.float64]:
    return np.stack([np.concatenate([update[name].ravel() for name in sorted(update)]) for update in updates])


def _stacked(updates: Sequence[Params], name: str) -> NDArray[np.float64]:
    return np.stack([update[name] for update in updates])
