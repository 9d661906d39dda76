"""A causal transformer over items that are known by their text."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedrec.models.configs import TextTransformerConfig
from fedrec.models.layers import make_linear, normal, product, rows
from fedrec.models.sequence import INITIAL
from fedrec.models.transformer import Transformer
from fedrec.random import Key


class TextTransformer(Transformer):
    """`Transformer` with item vectors made of text and little else: ``v_i = W t_i + b + M r_i``.

    The text vectors t are public and stay as they are; the projection W is shared by all items, and each has a few
    numbers r of its own, 0 at first, mixed by M. So a new item has a place at once, from its text alone. With adapters
    every W of the model is a frozen one and a low-rank term, and an update carries only the latter.

    Source: text in place of ids as in Hou et al., KDD 2022 (UniSRec); adapters: Hu et al., ICLR 2022 (LoRA).
    """

    row_names: ClassVar[frozenset[str]] = frozenset({"popularity", "text", "residual"})

    def make_items(self, key: Key) -> None:
        """Draw the projection and the mixing; the text vectors are zeros until the server places them."""
        c = self.settings
        assert isinstance(c, TextTransformerConfig)
        dim, rank, own = c.dim, c.features.rank, c.residual
        self.text = nn.Parameter(torch.zeros(self.n_items, rank))
        self.residual = nn.Parameter(torch.zeros(self.n_items, own))
        self.mix = nn.Parameter(normal(key.child("mix"), (dim, own), own**-0.5))
        self.projection = make_linear(rank, dim, key.child("projection"), c.lora, c.reach, outward=True)
        with torch.no_grad():  # texts have length 1, so the first vectors are as long as fresh ones of any item
            self.projection.weight.copy_(normal(key.child("projection"), (dim, rank), INITIAL))

    def vectors(self, numbers: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        """Return the vectors of items by number."""
        return self._made(rows(self.text, numbers), rows(self.residual, numbers))

    def table(self) -> Float[Tensor, "*own n d"]:
        """Return the vectors of all items."""
        return self._made(self.text, self.residual)

    def _made(self, text: Float[Tensor, "*b k t"], own: Float[Tensor, "*c k r"]) -> Float[Tensor, "*d k d"]:
        made: Tensor = self.projection(text) + product(own, self.mix)
        return made
