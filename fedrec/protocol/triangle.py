"""Symmetric matrices as their upper triangle, row by row: how a statistic of pairs travels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedrec.params import Array


def packed_size(n: int) -> int:
    """Return how many numbers the upper triangle of an n x n matrix has, the diagonal included."""
    return n * (n + 1) // 2


def packed_place(i: NDArray[np.int64], j: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Return the place of entry (i, j), i <= j, in the upper triangle of an n x n matrix, written row by row."""
    place: NDArray[np.int64] = i * n - i * (i - 1) // 2 + (j - i)
    return place


def unpacked(triangle: Array, n: int) -> NDArray[np.float32]:
    """Return the symmetric matrix [n, n] of an upper triangle that is written row by row."""
    square = np.zeros((n, n), np.float32)
    start = 0
    for row in range(n):
        square[row, row:] = triangle[start : start + n - row]
        start += n - row
    lower = np.tril_indices(n, -1)
    square[lower] = square.T[lower]
    return square


def packed(square: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the upper triangle of a symmetric matrix, row by row."""
    return square[np.triu_indices(len(square))].astype(np.float64)
