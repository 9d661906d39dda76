"""A causal transformer over the sequence of items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedrec.data.batches import START, Batch, BatchSpec
from fedrec.errors import ConfigError
from fedrec.models.configs import SampledSoftmax, TextTransformerConfig, TransformerConfig
from fedrec.models.layers import LayerNorm, by_distance, make_linear, normal, normal_rows, rows, seeded_dropout
from fedrec.models.losses import imitation, lookahead, sampled_softmax
from fedrec.models.recommender import Recommender, Taught, copy_grown
from fedrec.random import Key

INITIAL = 0.02
"""Standard deviation of fresh item vectors; small, so that the first scores are near zero and alike."""


class Block(nn.Module):
    """Pre-norm attention and feed-forward: ``x += attend(norm(x)); x += W2 gelu(W1 norm(x))``.

    Attention adds a learned number per head and distance, so that recency counts at every place.
    """

    def __init__(self, config: TransformerConfig | TextTransformerConfig, index: int, key: Key, lora: int = 0) -> None:
        """Draw the weights from `key` (Xavier)."""
        super().__init__()
        d = config.dim
        self.heads, self.dropout, self.site = config.heads, config.dropout, 4 * index + 1
        self.norm1, self.norm2 = LayerNorm(d), LayerNorm(d)
        self.recency = nn.Parameter(torch.zeros(config.heads, config.length))
        self.query_key_value = make_linear(d, 3 * d, key.child("qkv"), lora)
        self.project = make_linear(d, d, key.child("project"), lora)
        self.widen = make_linear(d, config.expand * d, key.child("widen"), lora)
        self.narrow = make_linear(config.expand * d, d, key.child("narrow"), lora)

    def forward(self, x: Float[Tensor, "b l d"], seeds: Int[Tensor, " b"] | None) -> Float[Tensor, "b l d"]:
        """Apply the block; a position sees itself and those before it."""
        b, n, d = x.shape
        qkv = self.query_key_value(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [b heads l d/heads]
        logits = (q * (d // self.heads) ** -0.5) @ k.transpose(-1, -2) + by_distance(self.recency[..., :n])
        weights = seeded_dropout(logits.softmax(-1), self.dropout, seeds, self.site)
        attended = (weights @ v).transpose(1, 2).reshape(b, n, d)
        x = x + seeded_dropout(self.project(attended), self.dropout, seeds, self.site + 1)
        inner = F.gelu(self.widen(self.norm2(x)))
        return x + seeded_dropout(self.narrow(inner), self.dropout, seeds, self.site + 2)


class Transformer(Recommender):
    """Next-item prediction: ``s_ui = h_u . v_i``, h_u the hidden state after the newest interaction.

    A learned vector stands before the first interaction, so somebody without a history has a state too: their scores
    are the model's idea of what most people take first. What a person already has is no negative.

    Source: Kang and McAuley, ICDM 2018 (SASRec); softmax losses as in Petrov and Macdonald, RecSys 2023 (gSASRec);
    relative positions as in Raffel et al., JMLR 2020, section 2.1, without buckets.
    """

    row_names: ClassVar[frozenset[str]] = frozenset({"item"})

    def __init__(self, config: TransformerConfig | TextTransformerConfig, n_items: int, key: Key) -> None:
        """Draw the weights from `key`.

        Raises:
            ConfigError: `heads` does not divide `dim`.
        """
        super().__init__()
        if config.dim % config.heads:
            raise ConfigError(
                f"model.heads = {config.heads} does not divide model.dim = {config.dim}; choose one that does."
            )
        self.config = self.settings = config
        self.n_items = n_items
        self.gathers = isinstance(config.softmax, SampledSoftmax)
        negatives = config.softmax.negatives if isinstance(config.softmax, SampledSoftmax) else None
        self.spec = BatchSpec("causal", config.length, config.windows, negatives=negatives)
        self.make_items(key)
        lora = config.lora if isinstance(config, TextTransformerConfig) else 0
        self.start = nn.Parameter(normal(key.child("start"), (config.dim,), INITIAL))
        self.position = nn.Parameter(normal(key.child("position"), (config.length, config.dim), INITIAL))
        self.blocks = nn.ModuleList(Block(config, i, key.child("block", i), lora) for i in range(config.blocks))
        self.norm = LayerNorm(config.dim)

    def make_items(self, key: Key) -> None:
        """Draw what item vectors are made of."""
        self.item = nn.Parameter(normal_rows(key.child("item"), 0, self.n_items, self.settings.dim, INITIAL))

    def vectors(self, numbers: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        """Return the vectors of items by number."""
        return rows(self.item, numbers)

    def table(self) -> Float[Tensor, "*own n d"]:
        """Return the vectors of all items."""
        return self.item

    def hidden(
        self,
        items: Int[Tensor, "b l"],
        seeds: Int[Tensor, " b"] | None = None,
        vectors: Float[Tensor, "b l d"] | None = None,
    ) -> Float[Tensor, "b l d"]:
        """Return the state after each input; `seeds` turns dropout on, `vectors` are the inputs' rows if at hand."""
        n = items.shape[1]
        vectors = self.vectors(items.clamp(min=0)) if vectors is None else vectors
        x = torch.where((items == START)[..., None], self.start[..., None, :], vectors) * self.settings.dim**0.5
        x = seeded_dropout(x + self.position[..., :n, :], self.settings.dropout, seeds, 0)
        for block in self.blocks:
            x = block(x, seeds)
        out: Tensor = self.norm(x)
        return out

    def encode(self, items: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Return the state after the newest interaction."""
        newest = mask.sum(-1).clamp(min=1) - 1
        return self.hidden(items)[torch.arange(len(items)), newest]

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
        if items is None:
            return users @ self.table().T
        return torch.einsum("bd,bkd->bk", users, self.vectors(items))

    def score_into(self, users: Float[Tensor, "b d"], out: Float[Tensor, "b n"]) -> None:
        """Write the scores of the whole catalogue into `out`."""
        torch.mm(users, self.table().T, out=out)

    def loss(self, batch: Batch, local: Mapping[str, Tensor] | None = None) -> Float[Tensor, " b"]:
        """Return the mean softmax loss over each person's targets, with dropout seeded by the batch."""
        return self._loss(*self._logits(batch, batch.seeds), batch)

    def taught_loss(self, batch: Batch, local: Mapping[str, Tensor] | None, taught: Taught) -> Float[Tensor, " b"]:
        """Return the loss plus the divergence from the teacher's choice among the same candidates at each position."""
        logits, there, negative = self._logits(batch, batch.seeds)
        own = torch.cat([logits[..., :1], negative], -1)
        had = self._excluded(batch, negative.shape[1])
        excluded = F.pad(had, (1, 0), value=False)
        unlike = imitation(own, taught.scores, excluded, batch.target_mask)
        return self._loss(logits, there, negative, batch) + taught.weight * unlike

    def candidate_scores(self, batch: Batch) -> Float[Tensor, "b t n"]:
        """Return the logits of each position's target and negatives."""
        logits, _, negative = self._logits(batch, None)
        return torch.cat([logits[..., :1], negative], -1)

    def _logits(
        self, batch: Batch, seeds: Int[Tensor, " b"] | None
    ) -> tuple[Float[Tensor, "b t h"], Bool[Tensor, "b t h"], Float[Tensor, "b t n"]]:
        """Return the logits of the next targets at each position, which of them are there, and those of negatives."""
        n, c = batch.inputs.shape[1], self.settings
        # One look-up of all rows, so that one gradient of the table comes back.
        numbers = [batch.inputs.clamp(min=0), batch.targets, *([batch.negatives] if self.gathers else [])]
        sizes = [part.shape[1] for part in numbers]
        inputs, targets, *rest = self.vectors(torch.cat(numbers, 1)).split_with_sizes(sizes, 1)
        states = self.hidden(batch.inputs, seeds, inputs)  # [b t d]
        # The target after next, and so on: shifted products, zero past the end.
        shifts = range(min(c.horizon, n))
        logits = torch.stack([F.pad((states[:, : n - j] * targets[:, j:]).sum(-1), (0, j)) for j in shifts], -1)
        there = torch.stack([F.pad(batch.input_mask[:, j:], (0, j)) for j in shifts], -1)  # [b t h]
        rivals = rest[0] if self.gathers else self.table()
        return logits, there, states @ rivals.transpose(-1, -2)

    def _excluded(self, batch: Batch, n: int) -> Bool[Tensor, "b t n"]:
        """Return which negatives are none at each of n positions."""
        had = batch.negative_since[:, None] <= torch.arange(n)[:, None]
        excluded: Tensor = had | (batch.targets[..., None] == batch.negatives[:, None])
        return excluded

    def _loss(
        self,
        logits: Float[Tensor, "b t h"],
        there: Bool[Tensor, "b t h"],
        negative: Float[Tensor, "b t n"],
        batch: Batch,
    ) -> Float[Tensor, " b"]:
        stands_for = max(self.n_items - 1, 1) / batch.negatives.shape[-1] if self.gathers else 1.0
        wanted = lookahead(logits, there, self.settings.horizon_decay)
        excluded = self._excluded(batch, negative.shape[1])
        return sampled_softmax(logits[..., 0], wanted, negative, excluded, batch.target_mask, stands_for)

    def grow(self, n_items: int, key: Key) -> Recommender:
        """Return a copy with freshly drawn vectors for the new items."""
        grown = type(self)(self.settings, n_items, key)
        copy_grown(self, grown)
        return grown
