"""The batched twin of `trainer`: many clients in one computation, each holding only the item rows it touches."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

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
    shared = {name: value.detach() for name, value in model.named_parameters()}
    batches = step_batches(cohort, model, local, key)
    kept = model.local_start(to_torch(batches[0]))
    rows, batches = renumber(batches) if model.gathers else (np.zeros((len(cohort), 0), np.int64), batches)
    touched = torch.from_numpy(rows)
    start = {n: v[touched] if model.gathers and n in model.row_names else v for n, v in shared.items()}

    def one_client(own: Tensors, mine: Tensors, batch: Batch) -> Tensor:
        single = Batch(*(part[None] for part in batch))
        loss: Tensor = functional_call(model, own, (single, {name: value[None] for name, value in mine.items()}))
        return loss.sum()

    own, loss = start, torch.zeros(0)
    axes: dict[str, int | None] = {n: 0 if model.gathers and n in model.row_names else None for n in shared}
    for step, batch in enumerate(batches):
        in_dims = (axes, 0, 0)
        learn = vmap(grad_and_value(one_client, argnums=(0, 1)), in_dims=in_dims)
        (gradients, local_gradients), losses = learn(own, kept, to_torch(batch))
        own = {name: value - local.learning_rate * gradients[name] for name, value in own.items()}
        kept = {name: value - local.learning_rate * local_gradients[name] for name, value in kept.items()}
        axes = dict.fromkeys(shared, 0)
        loss = losses if step == 0 else loss
    deltas = {name: own[name] - start[name] for name in shared}
    sparse = {name: deltas.pop(name) for name in model.row_names if model.gathers}
    return Trained(deltas, touched, sparse, loss)


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
