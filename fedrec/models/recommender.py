"""The contract of every recommender.

A recommender turns a history into a user vector and scores items against it. Its parameters are either *rows*, one per
item, or dense. Training reads item rows only through the numbers in a batch, so a client that touches forty items may
be handed a table of forty rows with the batch renumbered: that is what makes a cohort fit in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from fedrec.data.batches import START, Batch, BatchSpec, Histories
from fedrec.errors import FedrecError
from fedrec.models.configs import AnyModelConfig
from fedrec.params import Array, Params
from fedrec.random import Key

SCORED = 64
"""Histories scored in one computation; more would only take more memory."""


class Taught(NamedTuple):
    """What a teacher says of one batch.

    Attributes:
        scores: its `Recommender.candidate_scores` of the batch.
        weight: of being like it, against the batch's own loss.
    """

    scores: Tensor
    weight: float


class Recommender(nn.Module, ABC):
    """One model of taste.

    Attributes:
        config: the settings it was built from.
        n_items: how many items it can score.
        spec: the batches it trains on.
        row_names: names of parameters whose first axis is the item number.
        local_names: names of tensors that live on the client only (a user vector); never uploaded.
        gathers: whether training touches only the item rows named in the batch.
        personal: whether two histories may get different recommendations.
        together: whether clients may train in one computation; if not, one after the other.
    """

    row_names: ClassVar[frozenset[str]] = frozenset()
    local_names: ClassVar[frozenset[str]] = frozenset()
    gathers: bool = True
    personal: ClassVar[bool] = True
    together: ClassVar[bool] = True
    config: AnyModelConfig
    n_items: int
    spec: BatchSpec

    @abstractmethod
    def encode(self, items: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Return the user vectors of b histories, padded as `spec` says; a history may be empty."""

    @abstractmethod
    def score(
        self, users: Float[Tensor, "b d"], items: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b n"] | Float[Tensor, "b k"]:
        """Return each person's score of the given items, or of the whole catalogue."""

    def at(self, users: Float[Tensor, "b d"], moments: Float[Tensor, "b m"]) -> Float[Tensor, "b d"]:
        """Return the user vectors as they are in these moments; most models know no moments."""
        return users

    def states(self, items: Int[Tensor, "b l"], places: Int[Tensor, "b p"]) -> Float[Tensor, "b p d"]:
        """Return the user vectors of histories without gaps as they were before some of their places.

        Args:
            items: b histories of l items each, oldest first.
            places: how many of the oldest items each vector knows, 0 to l.
        """
        b, p = places.shape
        lead = 1 if self.spec.kind == "causal" else 0
        led = torch.cat([items.new_full((b, 1), START), items], 1) if lead else items
        end = places.reshape(-1, 1) + lead
        start = (end - self.spec.length).clamp(min=0)
        place = start + torch.arange(max(1, int((end - start).max())))
        known = place < end
        if led.shape[1] == 0:
            led = items.new_zeros(b, 1)
        taken = led.repeat_interleave(p, 0).gather(1, torch.where(known, place, 0))
        return self.encode(torch.where(known, taken, 0), known).view(b, p, -1)

    def score_into(self, users: Float[Tensor, "b d"], out: Float[Tensor, "b n"]) -> None:
        """Write each person's scores of the whole catalogue into `out`; a single product can save the copy."""
        out.copy_(self.score(users))

    @abstractmethod
    def loss(self, batch: Batch, local: Mapping[str, Tensor] | None = None) -> Float[Tensor, " b"]:
        """Return one loss per person, never reduced over people.

        Args:
            batch: what `spec` asked for.
            local: the client's own tensors [b, ...]; None: `local_start` makes them. With them, a model that trains on
                pairs reads no rows of the inputs.
        """

    def forward(
        self, batch: Batch, local: Mapping[str, Tensor] | None = None, taught: Taught | None = None
    ) -> Float[Tensor, " b"]:
        """Return `loss`, or `taught_loss`, so that ``torch.func.functional_call`` can train the model."""
        return self.loss(batch, local) if taught is None else self.taught_loss(batch, local, taught)

    def candidate_scores(self, batch: Batch) -> Tensor:
        """Return the scores of a batch's targets and negatives, without dropout: what a teacher says of them.

        Raises:
            FedrecError: this model cannot teach.
        """
        raise FedrecError(
            f'A model of kind "{self.config.kind}" cannot be distilled; leave training.local.imitate at 0.'
        )

    def taught_loss(self, batch: Batch, local: Mapping[str, Tensor] | None, taught: Taught) -> Float[Tensor, " b"]:
        """Return `loss` plus how unlike the teacher's `candidate_scores` the own ones are.

        Raises:
            FedrecError: this model cannot be taught.
        """
        raise FedrecError(
            f'A model of kind "{self.config.kind}" cannot be distilled; leave training.local.imitate at 0.'
        )

    def local_start(self, batch: Batch) -> dict[str, Tensor]:
        """Return the local tensors [b, ...] that local training starts from; needs the whole item table."""
        return {}

    @abstractmethod
    def grow(self, n_items: int, key: Key) -> Recommender:
        """Return a model for a larger catalogue that scores the old items exactly as before."""


def learnt(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained and travel in updates; the others are frozen and known by all."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def get_params(model: nn.Module) -> dict[str, Array]:
    """Return a copy of the model's parameters as NumPy arrays."""
    return {name: value.detach().cpu().numpy().copy() for name, value in model.named_parameters()}


def set_params(model: nn.Module, params: Params) -> None:
    """Copy `params` into the model.

    Raises:
        FedrecError: names or shapes do not fit the model.
    """
    own = dict(model.named_parameters())
    if own.keys() != params.keys():
        missing, extra = sorted(own.keys() - params.keys()), sorted(params.keys() - own.keys())
        raise FedrecError(f"These parameters belong to another model: missing {missing}, unknown {extra}.")
    for name, value in params.items():
        if own[name].shape != value.shape:
            raise FedrecError(f"Parameter '{name}' has shape {value.shape}, the model needs {tuple(own[name].shape)}.")
        with torch.no_grad():
            own[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))


def copy_grown(old: Recommender, new: Recommender) -> None:
    """Copy every parameter of `old` into `new`; item rows fill the first rows, the rest keeps its initial values.

    What is frozen in `old` is frozen in `new`.
    """
    target = dict(new.named_parameters())
    with torch.no_grad():
        for name, value in old.named_parameters():
            place = target[name][: len(value)] if name in old.row_names else target[name]
            place.copy_(value)
            target[name].requires_grad_(value.requires_grad)


def to_torch(batch: Batch) -> Batch:
    """Return the batch as torch tensors that share memory with the arrays."""
    return Batch(*(torch.from_numpy(np.ascontiguousarray(part)) for part in batch))


@torch.no_grad()
def score_all(
    model: Recommender,
    histories: Histories,
    out: NDArray[np.float32] | None = None,
    moments: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Return [b, n_items] scores of the whole catalogue for b histories.

    Args:
        model: the recommender.
        histories: b of them.
        out: [b, n_items] to write into, for callers that score often: fresh memory costs more than the scores.
        moments: [b, m] what is known of the moment of each request, as the model's context says; None: nothing.
    """
    items, mask = (torch.from_numpy(np.ascontiguousarray(part)) for part in histories)
    scores = np.empty((len(items), model.n_items), np.float32) if out is None else out
    for start in range(0, len(items), SCORED):
        part = slice(start, start + SCORED)
        users = model.encode(items[part], mask[part])
        if moments is not None:
            users = model.at(users, torch.from_numpy(moments[part]))
        model.score_into(users, torch.from_numpy(scores[part]))
    return scores
