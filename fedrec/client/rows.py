"""The item rows that clients touch: naming each of them by a small number of the client's own."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrec.data.batches import START, Batch

DENSE = 16
"""Up to so many items for each number of a client, marking a table is faster than sorting."""
MARKED = 64
"""Clients whose marks are made together: their tables should be in the cache."""


def renumber(batches: list[Batch], inputs: bool = True) -> tuple[NDArray[np.int64], list[Batch]]:
    """Return the item rows that each client touches in all steps, and the batches in terms of those rows.

    Args:
        batches: one for each step.
        inputs: whether training reads the rows of the inputs; if not, they are left as they are.

    Returns:
        rows: [c, r] sorted item numbers of each client, padded with 0.
        batches: as given, with item number ``rows[client, j]`` written as j; `START` stays.
    """
    names = ("inputs", "targets", "negatives") if inputs else ("targets", "negatives")
    parts = [getattr(batch, name) for batch in batches for name in names]
    numbers = np.maximum(np.concatenate(parts, axis=1), 0)
    largest = int(numbers.max(initial=0))
    ranks = _ranks_by_marking if largest < DENSE * numbers.shape[1] else _ranks_by_sorting
    local = ranks(numbers, largest)
    rows = np.zeros((len(numbers), int(local.max(initial=0)) + 1), np.int64)
    np.put_along_axis(rows, local, numbers, axis=1)
    pieces = iter(np.split(local, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1))
    renamed = [batch._replace(**{name: next(pieces) for name in names}) for batch in batches]
    kept = [np.where(old.inputs == START, START, new.inputs) for old, new in zip(batches, renamed, strict=True)]
    return rows, [batch._replace(inputs=numbers) for batch, numbers in zip(renamed, kept, strict=True)]


def _ranks_by_marking(numbers: NDArray[np.int64], largest: int) -> NDArray[np.int64]:
    """Return each number's rank among the different numbers of its row, through a table of [c, largest + 1] marks."""
    marks = np.zeros((len(numbers), largest + 1), np.int32)
    np.put_along_axis(marks, numbers, 1, axis=1)
    order = np.cumsum(marks, axis=1, dtype=np.int32)
    return np.take_along_axis(order, numbers, axis=1).astype(np.int64) - 1


def _ranks_by_sorting(numbers: NDArray[np.int64], largest: int) -> NDArray[np.int64]:
    """Return the same without a table; `largest` does not matter."""
    order = np.argsort(numbers, axis=1, kind="stable")
    ordered = np.take_along_axis(numbers, order, axis=1)
    changes = np.zeros(ordered.shape, np.int64)
    changes[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    ranks = np.empty(ordered.shape, np.int64)
    np.put_along_axis(ranks, order, np.cumsum(changes, axis=1), axis=1)
    return ranks


def same_places(rows: Tensor) -> Tensor:
    """Return for each of the rows that a client looks up, [s, c, k], a number that all its look-ups of it share.

    Numbers of client c are in ``[c * s * k, (c + 1) * s * k)``.
    """
    s, c, k = rows.shape

    def apart(own: Tensor) -> Tensor:
        return own.add_(torch.arange(0, c * s * k, s * k)[:, None]).view(c, s, k).transpose(0, 1)

    largest = int(rows.max()) if rows.numel() else 0
    if largest >= DENSE * s * k:
        return apart(torch.from_numpy(_ranks_by_sorting(rows.transpose(0, 1).reshape(c, -1).numpy(), largest)))
    # One of a client's look-ups of a row, whichever is written last, stands for all of them.
    found, number = torch.empty(c, s * k, dtype=torch.int64), torch.arange(s * k).expand(MARKED, -1)
    looked = rows.transpose(0, 1).reshape(c, -1)
    last = torch.empty(MARKED, largest + 1, dtype=torch.int64)  # only what is written is read
    for start in range(0, c, MARKED):
        some = looked[start : start + MARKED]
        last.scatter_(1, some, number[: len(some)])
        torch.gather(last[: len(some)], 1, some, out=found[start : start + MARKED])
    return apart(found)
