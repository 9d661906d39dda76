"""The one local loop: a client fine-tunes its copy of the model by plain SGD. `vectorised` is its batched twin."""

from __future__ import annotations

import torch
from torch import Tensor

from fedrec.client.lesson import ALONE, Lesson, taught_by
from fedrec.client.memory import rehearsing, replay_shares
from fedrec.client.trained import Tensors, Trained
from fedrec.data.batches import Batch, Cohort, draw_steps
from fedrec.models.recommender import Recommender, learnt, to_torch
from fedrec.protocol.task import LocalTraining
from fedrec.random import Key

CACHE_BYTES, LARGEST_BYTES = 10 << 20, 48 << 20
"""What the clients of a block hold of the model together: so much suits the cache, and more than that is too much."""
POSITIONS = 4096
"""So many positions of histories a block should have, or starting its operations costs more than the cache saves."""


def cache_block(model: Recommender, steps: int) -> int:
    """Return how many clients to compute at once: enough work for each operation, but near the cache; measured."""
    named = dict(model.named_parameters())
    sparse = model.row_names if model.gathers else frozenset()
    spec = model.spec
    each = spec.targets if spec.kind == "pairs" else spec.length + 1
    touched = min(model.n_items, steps * (each + (spec.negatives or 0)))
    held = sum(p.numel() // (len(p) if n in sparse else 1) * (touched if n in sparse else 1) for n, p in named.items())
    fits, most = CACHE_BYTES // (4 * held), LARGEST_BYTES // (4 * held)
    return int(min(max(fits, min(POSITIONS // spec.length, most), 8), 512))


def step_batches(
    cohort: Cohort, model: Recommender, local: LocalTraining, key: Key, lesson: Lesson = ALONE
) -> list[Batch]:
    """Return the batches of every local step; both twins train on exactly these."""
    keys = [key.child("step", step) for step in range(local.steps)]
    shares = replay_shares(cohort, model, local)
    cohorts = [rehearsing(cohort, local, own, shares) for own in keys]
    found = draw_steps(cohorts, model.spec, model.n_items, keys, local.history_negatives)
    if lesson.frequent is None:
        return found
    return [b._replace(target_mask=b.target_mask & lesson.frequent[b.targets]) for b in found]


def train_each(model: Recommender, cohort: Cohort, local: LocalTraining, key: Key, lesson: Lesson = ALONE) -> Trained:
    """Train each client on its own, one after the other: the slow twin, readable as what a device does.

    Args:
        model: holds the shared parameters; not changed.
        cohort: the c clients and their windows.
        local: steps and learning rate.
        key: of this round.
        lesson: what the plan gives along.
    """
    shared = {name: value.detach().clone() for name, value in learnt(model).items()}
    deltas: list[Tensors] = []
    losses: list[Tensor] = []
    for place in range(len(cohort)):
        alone = cohort.take(slice(place, place + 1))
        batches = [to_torch(b) for b in step_batches(alone, model, local, key, lesson)]
        own = {name: value.clone().requires_grad_() for name, value in shared.items()}
        kept = {name: value.requires_grad_() for name, value in model.local_start(batches[0]).items()}
        for step, batch in enumerate(batches):
            taught = taught_by(lesson, batch, local)
            loss = torch.func.functional_call(model, own, (batch, kept, taught)).sum()
            tensors = [*own.values(), *kept.values()]
            gradients = torch.autograd.grad(loss, tensors, materialize_grads=True)
            with torch.no_grad():
                for tensor, gradient in zip(tensors, gradients, strict=True):
                    tensor -= local.learning_rate * gradient
            if step == 0:
                losses.append(loss.detach())
        deltas.append({name: own[name].detach() - shared[name] for name in shared})
    dense = {name: torch.stack([delta[name] for delta in deltas]) for name in shared}
    trained = Trained(dense, torch.zeros(len(cohort), 0, dtype=torch.int64), {}, torch.stack(losses))
    return trained.shortened(local.item_clip, model.n_items)
