"""A causal transformer over the sequence of items."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedrec.errors import ConfigError
from fedrec.models.configs import TextTransformerConfig, TransformerConfig
from fedrec.models.layers import LayerNorm, by_distance, make_linear, normal, seeded_dropout
from fedrec.models.sequence import INITIAL, NextItem
from fedrec.random import Key


class Block(nn.Module):
    """Pre-norm attention and feed-forward: ``x += attend(norm(x)); x += W2 gelu(W1 norm(x))``.

    Attention adds a learned number per head and distance, so that recency counts at every place.
    """

    def __init__(self, config: TransformerConfig | TextTransformerConfig, index: int, key: Key) -> None:
        """Draw the weights from `key` (Xavier)."""
        super().__init__()
        lora, reach = (config.lora, config.reach) if isinstance(config, TextTransformerConfig) else (0, 1.0)
        d = config.dim
        self.heads, self.dropout, self.site = config.heads, config.dropout, 4 * index + 1
        self.norm1, self.norm2 = LayerNorm(d), LayerNorm(d)
        self.recency = nn.Parameter(torch.zeros(config.heads, config.length))
        self.query_key_value = make_linear(d, 3 * d, key.child("qkv"), lora, reach)
        self.project = make_linear(d, d, key.child("project"), lora, reach)
        self.widen = make_linear(d, config.expand * d, key.child("widen"), lora, reach)
        self.narrow = make_linear(config.expand * d, d, key.child("narrow"), lora, reach)

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


class Transformer(NextItem):
    """Attention over what came before, with a position and a recency.

    Source: Kang and McAuley, ICDM 2018 (SASRec); softmax losses as in Petrov and Macdonald, RecSys 2023 (gSASRec);
    relative positions as in Raffel et al., JMLR 2020, section 2.1, without buckets.
    """

    def __init__(self, config: TransformerConfig | TextTransformerConfig, n_items: int, key: Key) -> None:
        """Draw the weights from `key`.

        Raises:
            ConfigError: `heads` does not divide `dim`.
        """
        super().__init__(config, n_items, key)
        if config.dim % config.heads:
            raise ConfigError(
                f"model.heads = {config.heads} does not divide model.dim = {config.dim}; choose one that does."
            )
        self.position = nn.Parameter(normal(key.child("position"), (config.length, config.dim), INITIAL))
        self.blocks = nn.ModuleList(Block(config, i, key.child("block", i)) for i in range(config.blocks))
        self.norm = LayerNorm(config.dim)

    def trunk(
        self, x: Float[Tensor, "b l d"], items: Int[Tensor, "b l"], seeds: Int[Tensor, " b"] | None
    ) -> Float[Tensor, "b l e"]:
        """Return the state after each input."""
        x = x * self.settings.dim**0.5 + self.position[..., : x.shape[1], :]
        x = seeded_dropout(x, self.settings.dropout, seeds, 0)
        for block in self.blocks:
            x = block(x, seeds)
        out: Tensor = self.norm(x)
        return out
