"""The one local loop: a client fine-tunes its copy of the model by plain SGD. `vectorised` is its batched twin."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrec.client.memory import rehearsing
from fedrec.data.batches import Batch, Cohort, draw
from fedrec.models.recommender import Recommender, learnt, to_torch
from fedrec.protocol.task import LocalTraining
from fedrec.random import Key

Tensors = dict[str, Tensor]
CACHE_BYTES, LARGEST_BYTES = 10 << 20, 48 << 20
"""What the clients of a block hold of the model together: so much suits the cache, and more than that is too much."""
POSITIONS = 4096
"""So many positions of histories a block should have, or starting its operations costs more than the cache saves."""

PIECE_BYTES = 1 << 20
"""Of what is only passed on: memory that is written and read again at once should be in the cache still."""


@dataclass(frozen=True)
class Trained:
    """What c clients learnt: new minus old parameters, before clipping.

    Attributes:
        dense: name to [c, *shape] differences of whole parameters.
        rows: [c, r] numbers of the item rows that each client touched; padding is row 0 with a zero difference.
        sparse: name to [c, r, *shape] differences of those rows.
        loss: [c] loss of the first step, before anything was learnt.
        scale: what `dense` and `sparse` still have to be multiplied by.
    """

    dense: Tensors
    rows: Tensor
    sparse: Tensors
    loss: Tensor
    scale: float = 1.0

    def norms(self) -> NDArray[np.float64]:
        """Return [c] L2 norms over all tensors."""
        parts = [*self.dense.values(), *self.sparse.values()]
        norms = torch.stack([torch.linalg.vector_norm(part.flatten(1), dim=1) for part in parts]).double()
        result: NDArray[np.float64] = (torch.linalg.vector_norm(norms, dim=0) * abs(self.scale)).numpy()
        return result

    def add_to(self, totals: Tensors, factors: NDArray[np.float32]) -> None:
        """Add ``factors @ differences`` to the whole-table `totals`; a client with factor 0 is left out, NaN or not."""
        weight = torch.from_numpy(factors * np.float32(self.scale))
        out = torch.from_numpy(factors == 0)
        for name, part in self.dense.items():
            flat = part.flatten(1)
            if out.any():
                flat = flat.masked_fill(out[:, None], 0.0)
            totals[name] += (weight @ flat).view(part.shape[1:])
        for name, part in self.sparse.items():
            for values, rows, w, gone in zip(*in_cache(part, self.rows, weight, out), strict=True):
                each = (-1, *[1] * (part.dim() - 1))
                weighted = values * w.view(each)
                if gone.any():
                    weighted.masked_fill_(gone.view(each), 0.0)
                totals[name].index_add_(0, rows.flatten(), weighted.flatten(0, 1))

    def client_params(self, shared: Tensors, place: int) -> Tensors:
        """Return the whole parameters that one client ended with."""
        own = {name: value.clone() for name, value in shared.items()}
        for name, part in self.dense.items():
            own[name] += part[place] * self.scale
        for name, part in self.sparse.items():
            own[name].index_add_(0, self.rows[place], part[place] * self.scale)
        return own


def in_cache(*parts: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors [c, ...] along their first axis, so that a piece of the first one is about `PIECE_BYTES`."""
    n = max(1, PIECE_BYTES * len(parts[0]) // max(1, parts[0].nbytes))
    return [torch.split(part, n) for part in parts]


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


def step_batches(cohort: Cohort, model: Recommender, local: LocalTraining, key: Key) -> list[Batch]:
    """Return the batches of every local step; both twins train on exactly these."""
    keys = [key.child("step", step) for step in range(local.steps)]
    spare = local.history_negatives
    return [draw(rehearsing(cohort, local, own), model.spec, model.n_items, own, spare) for own in keys]


def train_each(model: Recommender, cohort: Cohort, local: LocalTraining, key: Key) -> Trained:
    """Train each client on its own, one after the other: the slow twin, readable as what a device does.

    Args:
        model: holds the shared parameters; not changed.
        cohort: the c clients and their windows.
        local: steps and learning rate.
        key: of this round.
    """
    shared = {name: value.detach().clone() for name, value in learnt(model).items()}
    deltas: list[Tensors] = []
    losses: list[Tensor] = []
    for place in range(len(cohort)):
        batches = [to_torch(b) for b in step_batches(cohort.take(slice(place, place + 1)), model, local, key)]
        own = {name: value.clone().requires_grad_() for name, value in shared.items()}
        kept = {name: value.requires_grad_() for name, value in model.local_start(batches[0]).items()}
        for step, batch in enumerate(batches):
            loss = torch.func.functional_call(model, own, (batch, kept)).sum()
            tensors = [*own.values(), *kept.values()]
            gradients = torch.autograd.grad(loss, tensors, materialize_grads=True)
            with torch.no_grad():
                for tensor, gradient in zip(tensors, gradients, strict=True):
                    tensor -= local.learning_rate * gradient
            if step == 0:
                losses.append(loss.detach())
        deltas.append({name: own[name].detach() - shared[name] for name in shared})
    dense = {name: torch.stack([delta[name] for delta in deltas]) for name in shared}
    return Trained(dense, torch.zeros(len(cohort), 0, dtype=torch.int64), {}, torch.stack(losses))
