"""The limits: centralised training on the same samples, and the same model one client after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from fedrec.data.batches import Batch, Cohort, draw
from fedrec.models.recommender import Recommender, to_torch
from fedrec.protocol.task import LocalTraining
from fedrec.random import Key


def together(model: Recommender, cohort: Cohort, local: LocalTraining, key: Key, block: int) -> None:
    """Train one shared model on the samples that a round would use: one backward pass and SGD step per block and step.

    Args:
        model: changed in place.
        cohort: the people.
        local: how many steps, and the learning rate.
        key: of the round; the same samples are drawn as by clients.
        block: people in one batch.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=local.learning_rate)
    for start in range(0, len(cohort), block):
        part = cohort.take(slice(start, start + block))
        own: dict[str, Tensor] = {}
        for step in range(local.steps):
            batch = to_torch(draw(part, model.spec, model.n_items, key.child("step", step)))
            if step == 0:
                own = {name: value.requires_grad_() for name, value in model.local_start(batch).items()}
            optimizer.zero_grad()
            losses = model(batch, own)
            gradients = _backward(losses, own)
            optimizer.step()
            with torch.no_grad():
                for name, gradient in gradients.items():
                    own[name] -= local.learning_rate * gradient


def _backward(losses: Tensor, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the gradient of the mean loss on the model; return what each person's own tensors get from their own loss."""
    for value in own.values():
        value.grad = None
    losses.mean().backward()  # type: ignore[no-untyped-call]
    return {name: value.grad * len(losses) for name, value in own.items() if value.grad is not None}


def one_by_one(model: Recommender, cohort: Cohort, local: LocalTraining, key: Key) -> dict[str, Tensor]:
    """Train each client on a copy with ``torch.optim.SGD``, clip its update, and return the sum by name.

    The batches are drawn for all clients at once, which is cheaper than each alone. Models without local tensors only.
    """
    shared = {name: value.detach().clone() for name, value in model.named_parameters()}
    totals = {name: torch.zeros_like(value) for name, value in shared.items()}
    drawn = [to_torch(draw(cohort, model.spec, model.n_items, key.child("step", s))) for s in range(local.steps)]
    for place in range(len(cohort)):
        optimizer = torch.optim.SGD(model.parameters(), lr=local.learning_rate)
        for batch in drawn:
            optimizer.zero_grad()
            model(Batch(*(part[place : place + 1] for part in batch))).sum().backward()
            optimizer.step()
        with torch.no_grad():
            deltas = {name: value - shared[name] for name, value in model.named_parameters()}
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(d) for d in deltas.values()]))
            for name, value in model.named_parameters():
                totals[name] += deltas[name] * (local.clip_norm / norm.clamp(min=local.clip_norm))
                value.copy_(shared[name])
    return totals
