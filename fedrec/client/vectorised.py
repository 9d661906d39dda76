"""The batched twin of `trainer`: many clients in one computation, each holding only the item rows it touches."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from fedrec.client.trainer import Trained, in_cache, step_batches
from fedrec.data.batches import START, Batch, Cohort
from fedrec.models.recommender import Recommender, learnt, to_torch
from fedrec.protocol.task import LocalTraining
from fedrec.random import Key


def train_batched(model: Recommender, cohort: Cohort, local: LocalTraining, key: Key) -> Trained:
    """Train all clients of the cohort at once; equal to `train_each` up to the order of adding floats.

    Args:
        model: holds the shared parameters; not changed.
        cohort: the c clients and their windows.
        local: steps and learning rate.
        key: of this round.
    """
    batches = step_batches(cohort, model, local, key)
    kept = model.local_start(to_torch(batches[0]))
    rows, batches = (
        renumber(batches, inputs=model.spec.kind == "causal")
        if model.gathers
        else (np.zeros((len(cohort), 0), np.int64), batches)
    )
    touched = torch.from_numpy(rows)
    sparse = model.row_names if model.gathers else frozenset()
    # In the first step all clients hold the same numbers: views, of which only the gradients are apart.
    start = {
        name: F.embedding(touched, value.detach())
        if name in sparse
        else value.detach().expand(len(cohort), *value.shape)
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    # Tables that nobody trains are cut to each client's rows all the same, since the batch is renumbered.
    frozen = {
        name: F.embedding(touched, value)
        for name, value in model.named_parameters()
        if name in sparse and not value.requires_grad
    }
    sparse = sparse & start.keys()
    own, first = start, torch.zeros(0)
    for step, batch in enumerate(batches):
        held = {name: value.detach().requires_grad_() for name, value in own.items()}
        mine = {name: value.detach().requires_grad_() for name, value in kept.items()}
        losses = functional_call(model, {**held, **frozen}, (to_torch(batch), mine))
        first = losses.detach() if step == 0 else first
        # Scaling the few losses makes every gradient the move itself: no pass over memory is spent on the rate.
        scale = torch.full_like(losses, -local.learning_rate)
        moves = torch.autograd.grad(losses, [*held.values(), *mine.values()], scale, materialize_grads=True)
        moved = dict(zip(held, moves, strict=False))
        if local.steps == 1:
            deltas = {
                name: _added(start[name].zero_(), move) if move.is_sparse else move for name, move in moved.items()
            }
            return Trained(deltas, touched, {name: deltas.pop(name) for name in sparse}, first)
        own = {name: _moved(value, moved[name], step == 0) for name, value in own.items()}
        kept = {name: value + move for (name, value), move in zip(kept.items(), moves[len(held) :], strict=True)}
    deltas = {
        name: _less(own[name], value.detach(), touched if name in sparse else None)
        for name, value in learnt(model).items()
    }
    return Trained(deltas, touched, {name: deltas.pop(name) for name in sparse}, first)


def _moved(value: Tensor, move: Tensor, first: bool) -> Tensor:
    """Return ``value + move``, in place unless `value` is a view that all share, as dense ones are at first."""
    if move.is_sparse:
        return _added(value, move)
    return value + move if first else value.add_(move)


def _less(own: Tensor, shared: Tensor, touched: Tensor | None) -> Tensor:
    """Subtract the shared values that each client started from, in place."""
    if touched is None:
        return own.sub_(shared)
    for mine, numbers in zip(*in_cache(own, touched), strict=True):
        mine.sub_(F.embedding(numbers, shared))
    return own


def _added(table: Tensor, move: Tensor) -> Tensor:
    """Add a sparse tensor over (client, row) to tables [c, r, d], in place."""
    client, row = move._indices()
    table.flatten(0, 1).index_add_(0, client * table.shape[1] + row, move._values())
    return table


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


DENSE = 16
"""Up to so many items for each number of a client, marking a table is faster than sorting."""


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
