"""Local steps in closed form, for models of least squares: one of the two ways in which `vectorised` takes a step."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fedrec.client.rows import same_places
from fedrec.client.trained import Products, Tensors, Trained
from fedrec.data.batches import Batch
from fedrec.models.layers import inner
from fedrec.models.recommender import to_torch
from fedrec.models.squares import LeastSquares
from fedrec.protocol.task import LocalTraining


class ByClosedForm:
    """Clients of a model of least squares, who step by its known gradient and hold no table of their own.

    A row of a client is ``v + sum_s m_s u_s``, with the shared row v and the client's own vectors u_s of the steps so
    far. So one number m for each row and step says where the row is, and the update stays in that form.
    """

    def __init__(self, model: LeastSquares, kept: Tensors, batches: list[Batch], local: LocalTraining) -> None:
        """Start from the shared table.

        Args:
            model: holds it.
            kept: the clients' own vectors, [c, d].
            batches: one for each step.
            local: steps and learning rate.
        """
        self._name, self._ridge, self._rate, self._done = model.table_name, model.ridge, local.learning_rate, 0
        found = [model.squares(to_torch(batch)) for batch in batches]
        self._rows, self._wanted, weights = (torch.stack(parts) for parts in zip(*found, strict=True))
        s, c, k = self._rows.shape
        # A step moves a row by ``(score - wanted) * pull`` along the vector, and the vector likewise along the rows.
        self._pull = weights.mul_(-2.0 * self._rate)
        self._offset = -self._wanted * self._pull
        self._table = model.get_parameter(model.table_name).detach()
        self._own = kept[model.vector_name]
        # Rows are gathered step by step into the same memory: all of them at once would not stay in the cache.
        self._shared = torch.empty(c * k, self._own.shape[1])
        self._vectors = torch.zeros(s, c, self._own.shape[1])
        self._weights = torch.empty(s, c, k)
        self._places = same_places(self._rows)  # one place stands for all where a client looks the row up
        self._moved = torch.zeros(c * s * k, s)

    def step(self) -> Tensor:
        """Take the next step and return the [c] losses before it."""
        s, own = self._done, self._own
        places, vectors = self._places[s], self._vectors[:s].transpose(0, 1)
        shared = torch.index_select(self._table, 0, self._rows[s].flatten(), out=self._shared)
        shared = shared.view(*places.shape, -1)
        scores = inner(shared, own)
        moved = F.embedding(places, self._moved)[..., :s] if s else None
        if moved is not None:
            scores += inner(moved, inner(vectors, own))
        weights = torch.addcmul(self._offset[s], scores, self._pull[s], out=self._weights[s])
        squares = torch.linalg.vecdot(weights, scores - self._wanted[s]) / (-2.0 * self._rate)
        change = torch.baddbmm(own[:, None], weights[:, None], shared, beta=1.0 - 2.0 * self._rate * self._ridge)
        if moved is not None:
            change.baddbmm_(torch.bmm(weights[:, None], moved), vectors)
        self._vectors[s] = own
        self._moved.view(-1).index_add_(0, (places * len(self._rows) + s).flatten(), weights.flatten())
        self._own = change[:, 0]
        self._done += 1
        losses: Tensor = squares + self._ridge * torch.linalg.vecdot(own, own)
        return losses

    def trained(self, first: Tensor) -> Trained:
        """Return what the clients learnt; `first` are the losses before the first step."""
        # |sum_s m_s u_s^T|^2 is the sum over pairs of steps of (m_s . m_t)(u_s . u_t), which may cancel: in 64 bits.
        moved = self._moved.view(len(first), -1, self._done).double()
        vectors = self._vectors.transpose(0, 1).double()
        pairs = torch.bmm(moved.transpose(1, 2), moved) * torch.bmm(vectors, vectors.transpose(1, 2))
        products = Products(self._rows, self._weights, self._vectors, pairs.sum((1, 2)).clamp(min=0.0))
        return Trained({}, torch.zeros(len(first), 0, dtype=torch.int64), {}, first, {self._name: products})
