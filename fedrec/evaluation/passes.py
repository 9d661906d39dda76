"""Passes over the scores of many people, in blocks of rows that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_BLOCK_VALUES = 1 << 18
"""Scores looked at in one go: small enough to stay in the cache."""
_SORT_FROM = 5
"""Targets per person from which sorting the scores once beats comparing them with each target."""
_MIN_GROUPS, _GROUPS_PER_PLACE = 96, 8
"""Groups that items are cut into for a first guess at the best ones: so many, or so many for each place of the list."""
_MAX_FOLDS = 8
"""Parts of a row whose maximum is taken in one go."""
WORST = np.finfo(np.float32).min
"""What a NaN counts as."""


def row_blocks(n_rows: int, n_columns: int) -> Iterator[slice]:
    """Yield the rows of a matrix in blocks of about `_BLOCK_VALUES` numbers."""
    step = max(1, _BLOCK_VALUES // max(n_columns, 1))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


class Flags:
    """Which scores of a block of rows are high enough: one byte each, in memory that block after block uses again.

    The bytes of a row are added eight at a time, as numbers of 64 bits: no more than 255 of these, so that no byte
    overflows into the next.
    """

    def __init__(self, n_columns: int) -> None:
        """Take memory for rows of so many scores."""
        n_words = max(1, -(-n_columns // 8))
        n_chunks = -(-n_words // 255)
        n_rows = max(1, _BLOCK_VALUES // max(n_columns, 1))
        self._words = np.zeros((n_rows, n_chunks, -(-n_words // n_chunks)), np.uint64)
        self._bytes = self._words.view(np.bool_).reshape(len(self._words), -1)
        self._n_columns, self._n_rows = n_columns, 0

    def at_least(self, scores: NDArray[np.float32], thresholds: NDArray[np.float32] | np.float32) -> Flags:
        """Flag the scores of a block, [r, n], that are at least as high as thresholds [r, 1]."""
        self._n_rows = len(scores)
        np.greater_equal(scores, thresholds, out=self._bytes[: self._n_rows, : self._n_columns])
        return self

    def sum(self) -> NDArray[np.int64]:
        """Return how many scores of each row are flagged, [r]."""
        sums = self._words[: self._n_rows].sum(axis=2)
        return np.asarray(sums.view(np.uint8).sum(axis=1, dtype=np.int64))

    def where(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return rows and columns of the flagged scores, row by row; quick where they are few."""
        words = self._words[: self._n_rows].reshape(-1)
        some = np.flatnonzero(words != 0)
        nth, byte = np.divmod(np.flatnonzero(words[some].view(np.bool_)), 8)
        return np.divmod(some[nth] * 8 + byte, self._bytes.shape[1])


def bound_of_kth(scores: NDArray[np.float32], k: int) -> NDArray[np.float32] | np.float32:
    """Return finite numbers, [r, 1], at most as high as the k-th best of each row and hardly lower.

    The k best among the maxima of groups of scores are k different scores: the k-th best of all is no lower.
    """
    n = scores.shape[1]
    if k >= n:
        return WORST
    n_groups = max(_MIN_GROUPS, _GROUPS_PER_PLACE * k)
    while n >= 2 * n_groups:
        folds = min(_MAX_FOLDS, n // n_groups)
        width = n // folds
        maxima = scores[:, : folds * width].reshape(len(scores), folds, width).max(axis=1)
        rest = maxima[:, : n - folds * width]
        np.maximum(rest, scores[:, folds * width :], out=rest)
        scores, n = maxima, width
    # So few numbers are sorted sooner than partitioned.
    return np.maximum(np.sort(scores, axis=1)[:, n - k, None], WORST)


def n_at_least(
    scores: NDArray[np.float32], rows: NDArray[np.int64], thresholds: NDArray[np.float32], flags: Flags | None = None
) -> NDArray[np.int64]:
    """Return for each of T thresholds how many scores of its row, in ascending rows, are at least as high: [T]."""
    if len(rows) >= _SORT_FROM * len(scores):
        return _n_at_least_sorting(scores, rows, thresholds)
    flags = flags or Flags(scores.shape[1])
    counts = np.empty(len(rows), np.int64)
    for block in row_blocks(len(rows), scores.shape[1]):
        mine = rows[block]
        # One target each is the common case, and then the rows need no copy.
        own = scores[mine[0] : mine[-1] + 1] if (np.diff(mine) == 1).all() else scores[mine]
        counts[block] = flags.at_least(own, thresholds[block, None]).sum()
    return counts


def _n_at_least_sorting(
    scores: NDArray[np.float32], rows: NDArray[np.int64], thresholds: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Return what `n_at_least` returns, by sorting each row once and a binary search for each threshold."""
    n = scores.shape[1]
    counts = np.empty(len(rows), np.int64)
    for block in row_blocks(*scores.shape):
        mine = slice(*np.searchsorted(rows, (block.start, block.stop)))
        ordered = np.sort(scores[block], axis=1)
        low, high = np.zeros(mine.stop - mine.start, np.int64), np.full(mine.stop - mine.start, n)
        for _ in range(n.bit_length()):
            middle = (low + high) // 2
            below = (middle < n) & (ordered[rows[mine] - block.start, np.minimum(middle, n - 1)] < thresholds[mine])
            low, high = np.where(below, middle + 1, low), np.where(below, high, middle)
        counts[mine] = n - low
    return counts
