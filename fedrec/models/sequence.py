"""What all models that predict the next item share: item rows, the loss over every position, scoring and growth."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedrec.data.batches import START, Batch, BatchSpec
from fedrec.models.configs import AnySequenceConfig, SampledSoftmax
from fedrec.models.layers import normal, normal_rows, product, rows
from fedrec.models.losses import imitation, lookahead, sampled_softmax
from fedrec.models.recommender import Recommender, Taught, copy_grown
from fedrec.models.tasks import Heads
from fedrec.random import Key

INITIAL = 0.02
"""Standard deviation of fresh item vectors; small, so that the first scores are near zero and alike."""


class Seen(NamedTuple):
    """What a model makes of a batch.

    Attributes:
        logits: [b, t, h] logits of the next h targets at each position.
        there: [b, t, h] which of them are there.
        negative: [b, t, n] logits of the negatives.
        states: [b, t, d] before each target.
        targets: [b, t, d] vectors of the targets.
    """

    logits: Tensor
    there: Tensor
    negative: Tensor
    states: Tensor
    targets: Tensor

    def candidates(self) -> Tensor:
        """Return [b, t, 1 + n] logits of each position's target and negatives."""
        return torch.cat([self.logits[..., :1], self.negative], -1)


class NextItem(Recommender):
    """Next-item prediction: ``s_ui = h_u . v_i``, h_u the hidden state after the newest interaction.

    A learned vector stands before the first interaction, so somebody without a history has a state too: their scores
    are the model's idea of what most people take first. What a person already has is no negative.

    Attributes:
        reads_apart: whether inputs have rows of their own, beside those that are scored.
    """

    row_names: ClassVar[frozenset[str]] = frozenset({"popularity", "item"})
    reads_apart: ClassVar[bool] = False

    def __init__(self, config: AnySequenceConfig, n_items: int, key: Key) -> None:
        """Draw item rows and the vector before the first interaction from `key`."""
        super().__init__()
        self.config = self.settings = config
        self.n_items = n_items
        self.gathers = isinstance(config.softmax, SampledSoftmax)
        negatives = config.softmax.negatives if isinstance(config.softmax, SampledSoftmax) else None
        kinds = config.tasks.events if config.tasks else None
        self.spec = BatchSpec("causal", config.length, config.windows, 0, negatives, kinds, config.context)
        if config.context:  # multiplied by ones and zeros; nothing at first, so that no moment counts yet
            self.moment = nn.Parameter(torch.zeros(config.dim, config.context.width))
        if config.tasks:
            self.heads = Heads(config.tasks, config.dim, key.child("heads"))
        if config.popularity_weight:
            self.popularity = nn.Parameter(torch.zeros(n_items, 1))
        self.make_items(key)
        self.start = nn.Parameter(normal(key.child("start"), (config.dim,), INITIAL))

    def make_items(self, key: Key) -> None:
        """Draw what item vectors are made of."""
        self.item = nn.Parameter(normal_rows(key.child("item"), 0, self.n_items, self.settings.dim, INITIAL))

    def vectors(self, numbers: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        """Return what is scored of items by number."""
        return rows(self.item, numbers)

    def table(self) -> Float[Tensor, "*own n d"]:
        """Return what is scored of all items."""
        return self.item

    def read(self, numbers: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        """Return what the inputs are read as."""
        return self.vectors(numbers)

    @abstractmethod
    def trunk(
        self, x: Float[Tensor, "b l d"], items: Int[Tensor, "b l"], seeds: Int[Tensor, " b"] | None
    ) -> Float[Tensor, "b l e"]:
        """Return the state after each input, given what they were read as; `seeds` turns dropout on."""

    def match(self, states: Float[Tensor, "b l d"], vectors: Float[Tensor, "*own k d"]) -> Float[Tensor, "b l k"]:
        """Return the score of every vector at every state."""
        return states @ vectors.transpose(-1, -2)

    def match_each(self, states: Float[Tensor, "b l d"], vectors: Float[Tensor, "b l d"]) -> Float[Tensor, "b l"]:
        """Return the score of one vector at each state."""
        return (states * vectors).sum(-1)

    def prior(self, numbers: Int[Tensor, "b k"] | None = None) -> Float[Tensor, "*b k"]:
        """Return what popularity adds to the scores of items by number, or of all: ``w p_i``."""
        found = self.popularity if numbers is None else rows(self.popularity, numbers)
        return found[..., 0] * self.settings.popularity_weight

    def hidden(
        self,
        items: Int[Tensor, "b l"],
        seeds: Int[Tensor, " b"] | None = None,
        vectors: Float[Tensor, "b l d"] | None = None,
    ) -> Float[Tensor, "b l e"]:
        """Return the state after each input; `vectors` are what the inputs are read as, if at hand."""
        vectors = self.read(items.clamp(min=0)) if vectors is None else vectors
        x = torch.where((items == START)[..., None], self.start[..., None, :], vectors)
        return self.trunk(x, items, seeds)

    def encode(self, items: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Return the state after the newest interaction."""
        newest = mask.sum(-1).clamp(min=1) - 1
        return self.hidden(items)[torch.arange(len(items)), newest]

    def at(self, users: Float[Tensor, "b d"], moments: Float[Tensor, "b m"]) -> Float[Tensor, "b d"]:
        """Return the states moved by what is known of each request: ``h + C m``."""
        return self._moved(users[:, None], moments[:, None])[:, 0] if self.settings.context else users

    def _moved(self, states: Float[Tensor, "b t e"], moments: Float[Tensor, "b t m"]) -> Float[Tensor, "b t e"]:
        moved: Tensor = product(moments, self.moment)
        return states + F.pad(moved, (0, states.shape[-1] - moved.shape[-1]))

    def states(self, items: Int[Tensor, "b l"], places: Int[Tensor, "b p"]) -> Float[Tensor, "b p d"]:
        """Return the states after some places, all in one pass where the histories fit into the model."""
        if items.shape[1] >= self.settings.length:
            return super().states(items, places)
        out = self.hidden(F.pad(items, (1, 0), value=START))
        return out.gather(1, places[..., None].expand(-1, -1, out.shape[-1]))

    def score(
        self, users: Float[Tensor, "b d"], items: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b n"] | Float[Tensor, "b k"]:
        """Return ``h_u . v_i``."""
        found = self.match(users[:, None], self.table() if items is None else self.vectors(items))[:, 0]
        return found + self.prior(items) if self.settings.popularity_weight else found

    def score_into(self, users: Float[Tensor, "b d"], out: Float[Tensor, "b n"]) -> None:
        """Write the scores of the whole catalogue into `out`."""
        if type(self).match is NextItem.match:
            torch.mm(users, self.table().T, out=out)
            if self.settings.popularity_weight:
                out += self.prior()
        else:
            out.copy_(self.score(users))

    def loss(self, batch: Batch, local: Mapping[str, Tensor] | None = None) -> Float[Tensor, " b"]:
        """Return the mean softmax loss over each person's targets, with dropout seeded by the batch."""
        return self._loss(self._seen(batch, batch.seeds), batch)

    def taught_loss(self, batch: Batch, local: Mapping[str, Tensor] | None, taught: Taught) -> Float[Tensor, " b"]:
        """Return the loss plus the divergence from the teacher's choice among the same candidates at each position."""
        seen = self._seen(batch, batch.seeds)
        had = self._excluded(batch, seen.negative.shape[1])
        excluded = F.pad(had, (1, 0), value=False)
        unlike = imitation(seen.candidates(), taught.scores, excluded, batch.target_mask)
        return self._loss(seen, batch) + taught.weight * unlike

    def candidate_scores(self, batch: Batch) -> Float[Tensor, "b t n"]:
        """Return the logits of each position's target and negatives."""
        return self._seen(batch, None).candidates()

    def _seen(self, batch: Batch, seeds: Int[Tensor, " b"] | None) -> Seen:
        n, c = batch.inputs.shape[1], self.settings
        # One look-up of all rows, so that one gradient of the table comes back.
        numbers = [batch.targets, *([batch.negatives] if self.gathers else [])]
        if not self.reads_apart:
            numbers.append(batch.inputs.clamp(min=0))
        targets, *rest = self.vectors(torch.cat(numbers, 1)).split_with_sizes([part.shape[1] for part in numbers], 1)
        states = self.hidden(batch.inputs, seeds, None if self.reads_apart else rest[-1])  # [b t d]
        states = self._moved(states, batch.moments) if c.context else states
        # The target after next, and so on: shifted products, zero past the end.
        shifts = range(min(c.horizon, n))
        logits = torch.stack([F.pad(self.match_each(states[:, : n - j], targets[:, j:]), (0, j)) for j in shifts], -1)
        there = torch.stack([F.pad(batch.input_mask[:, j:], (0, j)) for j in shifts], -1)  # [b t h]
        others = self.match(states, rest[0] if self.gathers else self.table())
        if c.popularity_weight:
            told = self.prior(batch.targets)
            logits = logits + torch.stack([F.pad(told[:, j:], (0, j)) for j in shifts], -1)
            others = others + self.prior(batch.negatives if self.gathers else None)[..., None, :]
        return Seen(logits, there, others, states, targets)

    def _excluded(self, batch: Batch, n: int) -> Bool[Tensor, "b t n"]:
        """Return which negatives are none at each of n positions."""
        had = batch.negative_since[:, None] <= torch.arange(n)[:, None]
        excluded: Tensor = had | (batch.targets[..., None] == batch.negatives[:, None])
        return excluded

    def _loss(self, seen: Seen, batch: Batch) -> Float[Tensor, " b"]:
        c = self.settings
        stands_for = max(self.n_items - 1, 1) / batch.negatives.shape[-1] if self.gathers else 1.0
        wanted = lookahead(seen.logits, seen.there, c.horizon_decay)
        excluded = self._excluded(batch, seen.negative.shape[1])
        own = seen.logits[..., 0]
        item = sampled_softmax(own, wanted, seen.negative, excluded, batch.target_mask, stands_for)
        if c.tasks is None:
            return item
        return self.heads.loss(item, seen.states[..., : c.dim], seen.targets[..., : c.dim], batch)

    def grow(self, n_items: int, key: Key) -> Recommender:
        """Return a copy with freshly drawn vectors for the new items."""
        grown = type(self)(self.settings, n_items, key)
        copy_grown(self, grown)
        return grown


def running_mean(x: Float[Tensor, "b l d"], power: float) -> Float[Tensor, "b l d"]:
    """Return the sum of everything up to each place, divided by how much that is to the given power."""
    count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
    return x.cumsum(1) / count**power
