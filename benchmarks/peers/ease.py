"""EASE, trained centrally on what clients train on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from benchmarks.asking import Questions, gains
from fedrec.data.cleaning import Dataset

PEOPLE = 1_024
"""People whose scores are in memory together."""


def item_weights(dataset: Dataset, regularisation: float) -> NDArray[np.float32]:
    """Return [n, n] weights ``I - P diag(1 / diag P)``; P is the inverse of the training items' Gram matrix.

    Source: Steck, WWW 2019, equation 8.
    """
    log, n_items = dataset.log, len(dataset.catalog)
    rows = [log.history(user)[:-2] for user in range(log.n_users) if log.counts[user] > 2]
    trained = _matrix(rows, n_items)
    if len(rows) < n_items:  # (X'X + lI)^-1 = (I - X' (XX' + lI)^-1 X) / l
        half = trained.T @ _inverse(trained @ trained.T, regularisation)
        inverse = torch.from_numpy(trained.T @ half.T).div_(-regularisation)
        inverse.diagonal().add_(1 / regularisation)
    else:
        inverse = torch.from_numpy(_inverse(trained.T @ trained, regularisation))
    weights = inverse.div_(-inverse.diagonal().clone())
    weights.fill_diagonal_(0.0)
    return weights.numpy()


def _inverse(gram: Any, regularisation: float) -> NDArray[np.float32]:
    dense = torch.from_numpy(gram.toarray())
    dense.diagonal().add_(regularisation)
    return torch.cholesky_inverse(torch.linalg.cholesky(dense)).numpy()


def ease(dataset: Dataset, weights: NDArray[np.float32], skip: int = 0) -> NDArray[np.float64]:
    """Return everybody's NDCG@10 on the last interaction after all before, or on the one before it with ``skip=1``.

    Whoever has nothing before it gets 0: all items are tied.
    """
    log, n_items = dataset.log, len(weights)
    rows = [log.history(user) for user in range(log.n_users)]
    rows = [row[: len(row) - skip] for row in rows if len(row) > skip]
    found = []
    for start in range(0, len(rows), PEOPLE):
        some = rows[start : start + PEOPLE]
        scores = _matrix([row[:-1] for row in some], n_items) @ weights
        asked = Questions([row[:-1].tolist() for row in some], [int(row[-1]) for row in some])
        found.append(gains(scores, asked))
    return np.concatenate(found)


def _matrix(rows: list[NDArray[np.int32]], n_items: int) -> Any:
    starts = np.concatenate(([0], np.cumsum([len(row) for row in rows])))
    items = np.concatenate(rows)
    return csr_array((np.ones(len(items), np.float32), items, starts), (len(rows), n_items))
