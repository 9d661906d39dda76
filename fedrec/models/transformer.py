"""A causal transformer over the sequence of items."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedrec.data.batches import START, Batch, BatchSpec
from fedrec.errors import ConfigError
from fedrec.models.configs import SampledSoftmax, TransformerConfig
from fedrec.models.layers import normal, normal_rows, seeded_dropout
from fedrec.models.losses import full_softmax, sampled_softmax
from fedrec.models.recommender import Recommender, copy_grown
from fedrec.random import Key


class Block(nn.Module):
    """Pre-norm attention and feed-forward: ``x += attend(norm(x)); x += W2 gelu(W1 norm(x))``."""

    def __init__(self, config: TransformerConfig, index: int, key: Key) -> None:
        """Draw the weights from `key`; output projections are scaled down by depth (GPT-2)."""
        super().__init__()
        d, std = config.dim, config.dim**-0.5
        self.heads, self.dropout, self.site = config.heads, config.dropout, 4 * index + 1
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        out = std / math.sqrt(2 * config.blocks)
        self.query_key_value = _linear(d, 3 * d, key.child("qkv"), std)
        self.project = _linear(d, d, key.child("project"), out)
        self.widen = _linear(d, config.expand * d, key.child("widen"), std)
        self.narrow = _linear(config.expand * d, d, key.child("narrow"), out * config.expand**-0.5)

    def forward(
        self, x: Float[Tensor, "b l d"], hidden: Bool[Tensor, "l l"], seeds: Int[Tensor, " b"] | None
    ) -> Float[Tensor, "b l d"]:
        """Apply the block; `hidden` marks the later positions that a position must not see."""
        b, n, d = x.shape
        qkv = self.query_key_value(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [b heads l d/heads]
        weights = (q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        attended = (weights @ v).transpose(1, 2).reshape(b, n, d)
        x = x + seeded_dropout(self.project(attended), self.dropout, seeds, self.site)
        inner = F.gelu(self.widen(self.norm2(x)), approximate="tanh")
        return x + seeded_dropout(self.narrow(inner), self.dropout, seeds, self.site + 1)


def _linear(n_in: int, n_out: int, key: Key, std: float) -> nn.Linear:
    layer = nn.Linear(n_in, n_out)
    with torch.no_grad():
        layer.weight.copy_(normal(key, (n_out, n_in), std))
        layer.bias.zero_()
    return layer


class Transformer(Recommender):
    """Next-item prediction: ``s_ui = h_u . v_i + b_i``, h_u the hidden state after the newest interaction.

    A learned vector stands before the first interaction, so somebody without a history has a state too: their scores
    are the model's idea of what most people take first.

    Source: Kang and McAuley, ICDM 2018 (SASRec); softmax losses as in Petrov and Macdonald, RecSys 2023 (gSASRec).
    """

    row_names: ClassVar[frozenset[str]] = frozenset({"item", "item_bias"})

    def __init__(self, config: TransformerConfig, n_items: int, key: Key) -> None:
        """Draw the weights from `key`.

        Raises:
            ConfigError: `heads` does not divide `dim`.
        """
        super().__init__()
        if config.dim % config.heads:
            raise ConfigError(f"model.heads = {config.heads} does not divide model.dim = {config.dim}; choose one that does.")
        self.config: TransformerConfig = config
        self.n_items = n_items
        sampled = config.softmax.negatives if isinstance(config.softmax, SampledSoftmax) else 0
        self.gathers = sampled > 0
        self.spec = BatchSpec("causal", config.length, config.windows, negatives=sampled)
        std = config.dim**-0.5
        self.item = nn.Parameter(normal_rows(key.child("item"), 0, n_items, config.dim, std))
        self.item_bias = nn.Parameter(torch.zeros(n_items))
        self.start = nn.Parameter(normal(key.child("start"), (config.dim,), std))
        self.position = nn.Parameter(normal(key.child("position"), (config.length, config.dim), std))
        self.blocks = nn.ModuleList(Block(config, i, key.child("block", i)) for i in range(config.blocks))
        self.norm = nn.LayerNorm(config.dim)

    def hidden(self, items: Int[Tensor, "b l"], seeds: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b l d"]:
        """Return the state after each input; `seeds` turns dropout on."""
        n = items.shape[1]
        x = F.embedding(items.clamp(min=0), self.item)
        x = torch.where((items == START)[..., None], self.start, x) + self.position[:n]
        x = seeded_dropout(x, self.config.dropout, seeds, 0)
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        for block in self.blocks:
            x = block(x, later, seeds)
        out: Tensor = self.norm(x)
        return out

    def encode(self, items: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
        """Return the state after the newest interaction."""
        newest = mask.sum(-1).clamp(min=1) - 1
        return self.hidden(items)[torch.arange(len(items)), newest]

    def score(
        self, users: Float[Tensor, "b d"], items: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b n"] | Float[Tensor, "b k"]:
        """Return ``h_u . v_i + b_i``."""
        if items is None:
            return users @ self.item.T + self.item_bias
        return torch.einsum("bd,bkd->bk", users, F.embedding(items, self.item)) + self._bias(items)

    def _bias(self, items: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return F.embedding(items, self.item_bias[:, None])[..., 0]

    def loss(self, batch: Batch[Tensor], local: Mapping[str, Tensor] | None = None) -> Float[Tensor, " b"]:
        """Return the mean next-item softmax loss over each person's targets, with dropout seeded by the batch."""
        states = self.hidden(batch.inputs, batch.seeds)  # [b t d]
        if not self.gathers:
            return full_softmax(states @ self.item.T + self.item_bias, batch.targets, batch.target_mask)
        positive = (states * F.embedding(batch.targets, self.item)).sum(-1) + self._bias(batch.targets)
        negative = states @ F.embedding(batch.negatives, self.item).transpose(-1, -2)
        negative = negative + self._bias(batch.negatives)[:, None]
        collides = batch.targets[..., None] == batch.negatives[:, None]
        return sampled_softmax(positive, negative, collides, batch.target_mask, self.n_items)

    def grow(self, n_items: int, key: Key) -> Self:
        """Return a copy with freshly drawn vectors for the new items."""
        grown = type(self)(self.config, n_items, key)
        copy_grown(self, grown)
        return grown
