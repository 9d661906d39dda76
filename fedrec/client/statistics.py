"""What a client tells about the items that it took near each other, in one bounded vector. NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedrec.data.batches import Cohort
from fedrec.errors import ProtocolError
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import CooccurrenceTask
from fedrec.protocol.triangle import packed, packed_place, packed_size

AT_ONCE = 128
"""People computed together; their pairs and their rows of features must fit the memory, better the cache."""

Features = NDArray[np.float32]


def cooccurrence(task: CooccurrenceTask, cohort: Cohort, n_items: int, features: Features | None) -> Tally:
    """Return the sums of the clients' contributions.

    Args:
        task: what is asked.
        cohort: the clients; pairs count if their later place is in ``[low, high)``.
        n_items: how many items the server knows.
        features: B [n_items, r], which the plan brings; needed if the task has a `feature_share`.

    Returns:
        For the sketch of pairs ``pairs`` [n (n + 1) / 2, 1 or 2] float32: the items' block, and with a feature share
        the same pairs so weighted that their projection by B is the features' block; for the sketch of features
        ``features`` [r (r + 1) / 2].

    Raises:
        ProtocolError: features are missing or of another shape, or a client took an item that the server does not know.
    """
    if task.feature_share and (features is None or features.ndim != 2 or len(features) != n_items):
        raise ProtocolError("The plan asks for a statistic of features, but carries no features of its items.")
    sums = _empty(task, n_items, features)
    for start in range(0, len(cohort), AT_ONCE):
        _add(sums, task, cohort.take(slice(start, start + AT_ONCE)), n_items, features)
    return Tally({name: value.astype(np.float32) for name, value in sums.items()}, len(cohort), {})


def _empty(task: CooccurrenceTask, n_items: int, features: Features | None) -> dict[str, NDArray[np.float64]]:
    sums: dict[str, NDArray[np.float64]] = {}
    if task.sketch == "pairs":
        sums["pairs"] = np.zeros((packed_size(n_items), 2 if task.feature_share else 1))
    elif features is not None:
        sums["features"] = np.zeros(packed_size(features.shape[1]))
    return sums


def _add(
    sums: dict[str, NDArray[np.float64]],
    task: CooccurrenceTask,
    people: Cohort,
    n_items: int,
    features: Features | None,
) -> None:
    first = np.maximum(np.maximum(people.low - task.lag, people.high - task.last), 0)
    width = max(1, int((people.high - first).max(initial=1)))
    place = first[:, None] + np.arange(width)
    there = place < people.high[:, None]
    rows = people.log.offsets[people.users][:, None] + place
    items = np.where(there, people.log.item[np.where(there, rows, 0)], 0).astype(np.int64)
    if items.max(initial=0) >= n_items:
        raise ProtocolError(f"The window holds item {items.max()}, but the plan knows {n_items} items; ask for all.")
    new = there & (place >= people.low[:, None])
    person, low, high, weight = _pairs(items, new, there, task, n_items)
    if features is not None and task.feature_share:
        if task.sketch == "features":
            sums["features"] += packed(_projected(items, there, new, task, features))
        else:
            scale = _scales(items, there, new, task, features)
            sums["pairs"][:, 1] += _scattered(low, high, weight * scale[person], n_items)
    if task.sketch == "pairs":
        norms = np.sqrt(np.bincount(person, weight**2, minlength=len(items)))
        scale = math.sqrt(task.item_share) / np.where(norms > 0, norms, np.inf)
        sums["pairs"][:, 0] += _scattered(low, high, weight * scale[person], n_items)


def _pairs(
    items: NDArray[np.int64],
    new: NDArray[np.bool_],
    there: NDArray[np.bool_],
    task: CooccurrenceTask,
    n_items: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return (person, i, j, M_ij) with i <= j, each once."""
    parts: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
    base = n_items * n_items
    for lag in range(1, min(task.lag, items.shape[1] - 1) + 1):
        person, place = np.nonzero(new[:, lag:] & there[:, :-lag])
        a, b = items[person, place], items[person, place + lag]
        # An item near itself counts from both sides.
        weight = np.where(a == b, 2.0, 1.0) * task.decay**lag
        parts.append((person * base + np.minimum(a, b) * n_items + np.maximum(a, b), weight))
    if not parts:
        none = np.zeros(0, np.int64)
        return none, none, none, np.zeros(0)
    key, weight = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(key, kind="stable")
    key, weight = key[order], weight[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    merged = np.add.reduceat(weight, starts) if len(starts) else np.zeros(0)
    key = key[starts]
    return key // base, key % base // n_items, key % n_items, merged


def _scattered(
    low: NDArray[np.int64], high: NDArray[np.int64], weight: NDArray[np.float64], n: int
) -> NDArray[np.float64]:
    return np.asarray(np.bincount(packed_place(low, high, n), weight, minlength=packed_size(n)), np.float64)


def _projected(
    items: NDArray[np.int64],
    there: NDArray[np.bool_],
    new: NDArray[np.bool_],
    task: CooccurrenceTask,
    features: Features,
) -> NDArray[np.float64]:
    """Return the sum of ``B^T M_u B`` [r, r], each scaled so that its triangle has the norm of the share's root."""
    total = np.zeros((features.shape[1], features.shape[1]))
    for own, weights in _windows(items, there, new, task, features):
        square = own.T @ (weights @ own)
        norm = math.sqrt(_triangle_square(square))
        if norm > 0:
            total += math.sqrt(task.feature_share) / norm * square
    return total


def _scales(
    items: NDArray[np.int64],
    there: NDArray[np.bool_],
    new: NDArray[np.bool_],
    task: CooccurrenceTask,
    features: Features,
) -> NDArray[np.float64]:
    r"""Return the scales s_u of `_projected`, without its matrices.

    .. math:: 2 \, |B^T M B|_\triangle^2 = \mathrm{tr}(M K M K) + \sum_k (B^T M B)_{kk}^2, \qquad K = B B^T
    """
    scales = np.zeros(len(items))
    for u, (own, weights) in enumerate(_windows(items, there, new, task, features)):
        near = weights @ (own @ own.T)
        diagonal = np.einsum("ak,ak->k", weights @ own, own, dtype=np.float64)
        square = (np.einsum("ab,ba->", near, near, dtype=np.float64) + float(diagonal @ diagonal)) / 2.0
        if square > 0:
            scales[u] = math.sqrt(task.feature_share / square)
    return scales


def _windows(
    items: NDArray[np.int64],
    there: NDArray[np.bool_],
    new: NDArray[np.bool_],
    task: CooccurrenceTask,
    features: Features,
) -> Iterator[tuple[Features, Features]]:
    """Yield each person's rows of features [n, r], and how much each two places weigh [n, n]."""
    near = _near(items.shape[1], task.lag, task.decay)
    for u, row in enumerate(items):
        n = int(there[u].sum())
        first = int(new[u].argmax())
        weights = near[:n, :n]
        if first:
            weights = weights.copy()
            weights[:first, :first] = 0.0
        yield features[row[:n]], weights


def _triangle_square(square: NDArray[np.floating]) -> float:
    """Return the squared norm of the upper triangle of a symmetric matrix."""
    whole = float(np.square(square, dtype=np.float64).sum())
    return (whole + float(np.square(square.diagonal(), dtype=np.float64).sum())) / 2.0


def _near(n: int, lag: int, decay: float) -> NDArray[np.float32]:
    apart = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    return np.where((apart >= 1) & (apart <= lag), decay ** apart.astype(np.float64), 0.0).astype(np.float32)
