"""What a life of learning is worth: from the matrix of releases by the tests of all slices.

``A[i, j]`` is the quality of the release after slice i on what slice j held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedrec.evaluation.words import Record


@dataclass(frozen=True)
class Life:
    """Measures of a life of T slices; nan where there is nothing to measure.

    Attributes:
        learning: ``mean_i A[i, i]``, how well each slice was learnt.
        retained: ``mean_j A[T-1, j]``, how well the last release serves all slices.
        harmonic: harmonic mean of the two.
        forgetting: ``mean_{j<T-1} (max_i A[i, j] - A[T-1, j])`` over releases from slice j on.
        backward: ``mean_{j<T-1} (A[T-1, j] - A[j, j])``; negative: later learning did harm.
        forward: ``mean_{j>0} A[j-1, j]``, how well a slice is served before it is learnt.

    Source: LA, RA and their harmonic mean as in Lim et al., CIKM 2025; forgetting as in Chaudhry et al., ECCV 2018;
    transfer as in Lopez-Paz and Ranzato, NeurIPS 2017, but the forward one is not compared with a random start.
    """

    learning: float
    retained: float
    harmonic: float
    forgetting: float
    backward: float
    forward: float


def matrix(releases: Sequence[Record], metric: str, group: str = "all") -> NDArray[np.float64]:
    """Return A [T, T] of a report's releases; nan where nobody was tested.

    Args:
        releases: records with ``life``, for each slice the groups of people and their metrics.
        metric: for example ``ndcg@20``.
        group: of people: all, those who were there before the slice that is tested ("returning"), those who came with
            it ("new"), or all, but of the items only those that came with it ("new_items").
    """
    life = [release.get("life") or [] for release in releases]
    n = max((len(row) for row in life), default=0)
    found = np.full((len(life), n), np.nan)
    for i, row in enumerate(life):
        for j, groups in enumerate(row):
            value = ((groups.get(group) or {}).get("metrics", {}).get(metric) or {}).get("value")
            found[i, j] = np.nan if value is None else value
    return found


def measure(a: NDArray[np.float64]) -> Life:
    """Return the measures of a matrix [T, T].

    >>> life = measure(np.array([[0.4, 0.1], [0.2, 0.4]]))
    >>> round(life.learning, 3), round(life.retained, 3), round(life.harmonic, 3)
    (0.4, 0.3, 0.343)
    >>> round(life.forgetting, 3), round(life.backward, 3), round(life.forward, 3)
    (0.2, -0.2, 0.1)
    """
    n = len(a)
    learning, retained = _mean(np.diag(a)), _mean(a[-1])
    total = learning + retained
    older = range(n - 1)
    return Life(
        learning,
        retained,
        2 * learning * retained / total if total > 0 else total,
        _mean([a[j:, j].max() - a[-1, j] for j in older]),
        _mean([a[-1, j] - a[j, j] for j in older]),
        _mean([a[j, j + 1] for j in older]),
    )


def _mean(values: Sequence[float] | NDArray[np.float64]) -> float:
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else float("nan")
