"""The batched twin of `trainer`: many clients in one computation, each holding only the item rows it touches."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.func import functional_call

from fedrec.client.closed import ByClosedForm
from fedrec.client.lesson import ALONE, Lesson, taught_by
from fedrec.client.rows import renumber
from fedrec.client.trained import Tensors, Trained, in_cache
from fedrec.client.trainer import step_batches, train_each
from fedrec.data.batches import Batch, Cohort
from fedrec.models.layers import Moving
from fedrec.models.recommender import Recommender, Taught, learnt, to_torch
from fedrec.models.squares import LeastSquares
from fedrec.protocol.task import LocalTraining
from fedrec.random import Key


def train_batched(
    model: Recommender, cohort: Cohort, local: LocalTraining, key: Key, lesson: Lesson = ALONE
) -> Trained:
    """Train all clients of the cohort at once; equal to `train_each` up to the order of adding floats.

    Args:
        model: holds the shared parameters; not changed.
        cohort: the c clients and their windows.
        local: steps and learning rate.
        key: of this round.
        lesson: what the plan gives along.
    """
    if not model.together:
        return train_each(model, cohort, local, key, lesson)
    batches = step_batches(cohort, model, local, key, lesson)
    taught = [taught_by(lesson, to_torch(batch), local) for batch in batches]  # the teacher is one and the same for all
    kept = model.local_start(to_torch(batches[0]))
    closed = isinstance(model, LeastSquares) and lesson.teacher is None and not lesson.apart and local.item_clip is None
    clients: ByClosedForm | ByAutograd = (
        ByClosedForm(model, kept, batches, local)
        if closed and isinstance(model, LeastSquares)
        else ByAutograd(model, kept, batches, local, taught)
    )
    first = clients.step()
    for _ in range(1, local.steps):
        clients.step()
    return clients.trained(first).shortened(local.item_clip, model.n_items)


class ByAutograd:
    """Clients that hold parameters of their own, of an item table the rows that they touch, and step by autograd."""

    def __init__(
        self, model: Recommender, kept: Tensors, batches: list[Batch], local: LocalTraining, taught: list[Taught | None]
    ) -> None:
        """Start from the shared parameters.

        Args:
            model: holds them.
            kept: what lives on the clients only, [c, ...] each.
            batches: one for each step.
            local: steps and learning rate.
            taught: what a teacher says of each batch.
        """
        self._model, self._kept, self._local, self._done, self._taught = model, kept, local, 0, taught
        n = len(batches[0].seeds)
        rows = np.zeros((n, 0), np.int64)
        if model.gathers:
            rows, batches = renumber(batches, inputs=model.spec.kind == "causal")
        self._touched, self._batches = torch.from_numpy(rows), [to_torch(batch) for batch in batches]
        rows_of = model.row_names if model.gathers else frozenset[str]()
        trained = learnt(model)
        self._sparse = rows_of & trained.keys()
        # In the first step all clients hold the same numbers: views, of which only the gradients are apart.
        self._own = {
            name: F.embedding(self._touched, value.detach())
            if name in self._sparse
            else value.detach().expand(n, *value.shape)
            for name, value in trained.items()
        }
        # Tables that nobody trains are cut to each client's rows all the same, since the batch is renumbered.
        self._frozen = {
            name: F.embedding(self._touched, value)
            for name, value in model.named_parameters()
            if name in rows_of and name not in trained
        }

    def step(self) -> Tensor:
        """Take the next step and return the [c] losses before it."""
        shared = self._done == 0
        held = {
            name: value.detach().requires_grad_() if shared or name in self._sparse else Moving(value)
            for name, value in self._own.items()
        }
        mine = {name: value.detach().requires_grad_() for name, value in self._kept.items()}
        losses: Tensor = functional_call(
            self._model, {**held, **self._frozen}, (self._batches[self._done], mine, self._taught[self._done])
        )
        # Scaling the few losses makes every gradient the move itself: no pass over memory is spent on the rate.
        scale = torch.full_like(losses, -self._local.learning_rate)
        moves = torch.autograd.grad(losses, [*held.values(), *mine.values()], scale, allow_unused=True)
        apart = len({move.data_ptr() for move in moves if move is not None and not move.is_sparse})
        apart += sum(move is None or move.is_sparse for move in moves)
        moved = dict(zip(held, moves, strict=False))
        if self._local.steps == 1:  # the moves are the differences
            self._own = {name: _difference(value, moved[name]) for name, value in self._own.items()}
        else:
            writable = apart == len(moves)
            self._own = {name: _moved(value, moved[name], shared, writable) for name, value in self._own.items()}
        self._kept = {
            name: value if move is None else value + move
            for (name, value), move in zip(self._kept.items(), moves[len(held) :], strict=True)
        }
        self._done += 1
        return losses.detach()

    def trained(self, first: Tensor) -> Trained:
        """Return what the clients learnt; `first` are the losses before the first step."""
        deltas = self._own
        if self._local.steps > 1:
            deltas = {
                name: _less(self._own[name], value.detach(), self._touched if name in self._sparse else None)
                for name, value in learnt(self._model).items()
            }
        sparse = {name: deltas.pop(name) for name in self._sparse}
        return Trained(deltas, self._touched, sparse, first)


def _difference(value: Tensor, move: Tensor | None) -> Tensor:
    """Return how far the only step moved a parameter; of a table the memory of `value` is used."""
    if move is None:
        return torch.zeros_like(value)
    return _added(value.zero_(), move) if move.is_sparse else move


def _moved(value: Tensor, move: Tensor | None, shared: bool, writable: bool) -> Tensor:
    """Return ``value + move``, in place.

    Args:
        value: of each client; views of the same numbers for all if `shared`.
        move: None where a layer has moved the value already, or nothing uses it.
        shared: whether this is the first step.
        writable: whether no two moves share memory.
    """
    if move is None:
        return value.clone() if shared else value
    if move.is_sparse:
        return _added(value, move)
    if shared:
        return move.add_(value) if writable and move.is_contiguous() else value + move
    return value.add_(move)


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
