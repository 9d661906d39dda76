"""The batched twin of `trainer`: many clients in one computation, each holding only the item rows it touches."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from fedrec.client.trainer import Tensors, Trained, step_batches
from fedrec.data.batches import START, Batch, Cohort
from fedrec.models.recommender import Recommender, to_torch
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
    rows, batches = renumber(batches) if model.gathers else (np.zeros((len(cohort), 0), np.int64), batches)
    touched = torch.from_numpy(rows)
    sparse = model.row_names if model.gathers else frozenset()
    # In the first step all clients hold the same numbers: views, of which only the gradients are apart.
    start = {
        name: value.detach()[touched] if name in sparse else value.detach().expand(len(cohort), *value.shape)
        for name, value in model.named_parameters()
    }
    own, loss, moved = start, torch.zeros(0), start
    for step, batch in enumerate(batches):
        held = {name: value.detach().requires_grad_() for name, value in own.items()}
        mine = {name: value.detach().requires_grad_() for name, value in kept.items()}
        losses = functional_call(model, held, (to_torch(batch), mine))
        moved = _gradients(losses, held, mine)
        loss = losses.detach() if step == 0 else loss
        if local.steps > 1:
            rate = local.learning_rate
            own = {name: torch.add(value, moved[name], alpha=-rate) for name, value in own.items()}
            kept = {name: torch.add(value, moved["local:" + name], alpha=-rate) for name, value in kept.items()}
    if local.steps == 1:
        deltas, scale = {name: moved[name] for name in start}, -local.learning_rate
    else:
        deltas, scale = {name: own[name].sub_(start[name]) for name in start}, 1.0
    return Trained(deltas, touched, {name: deltas.pop(name) for name in sparse}, loss, scale)


def _gradients(losses: Tensor, held: Tensors, mine: Tensors) -> Tensors:
    """Return every client's gradient of its own loss, by name; those of local tensors as ``local:name``."""
    tensors = {**held, **{"local:" + name: value for name, value in mine.items()}}
    gradients = torch.autograd.grad(losses.sum(), list(tensors.values()), materialize_grads=True)
    return dict(zip(tensors, gradients, strict=True))


def renumber(batches: list[Batch]) -> tuple[NDArray[np.int64], list[Batch]]:
    """Return the item rows that each client touches in all steps, and the batches in terms of those rows.

    Returns:
        rows: [c, r] sorted item numbers of each client, padded with 0.
        batches: as given, with item number ``rows[client, j]`` written as j; `START` stays.
    """
    parts = [part for batch in batches for part in (batch.inputs, batch.targets, batch.negatives)]
    numbers = np.maximum(np.concatenate(parts, axis=1), 0)
    order = np.argsort(numbers, axis=1, kind="stable")
    ordered = np.take_along_axis(numbers, order, axis=1)
    rank = np.zeros_like(ordered)
    rank[:, 1:] = np.cumsum(ordered[:, 1:] != ordered[:, :-1], axis=1)
    rows = np.zeros((len(numbers), int(rank[:, -1].max()) + 1), np.int64)
    np.put_along_axis(rows, rank, ordered, axis=1)
    local = np.empty_like(rank)
    np.put_along_axis(local, order, rank, axis=1)
    pieces = iter(np.split(local, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1))
    return rows, [
        batch._replace(
            inputs=np.where(batch.inputs == START, START, next(pieces)), targets=next(pieces), negatives=next(pieces)
        )
        for batch in batches
    ]
