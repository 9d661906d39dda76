"""Small parts that several models share: initial values from a key, seeded dropout, and layers with own parameters.

The layers take a parameter as it stands in the model, or with a leading axis of b people: person i then uses its own.
That is how a cohort trains at once. Where the leading axis is an expanded view (stride 0), all people use the same
numbers and only the gradients are kept apart: the forward pass costs what it costs without the axis.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedrec.random import Key

_STRIDES = (40503, -1640531535, 1013904243)


class Moving(nn.Parameter):
    """A parameter of each person's own, [b, ...], that a backward pass may move by its gradient where that is made.

    A product that adds to the weights costs less than one that is written, read again and added. `linear` does that,
    and no gradient comes back, unless another place reads the same weights; of other layers it does. For a loss scaled
    by minus the learning rate the gradient is the move.

    Attributes:
        uses: how many linear layers have read it; a fresh one is made for each step.
    """

    uses = 0


def normal_rows(key: Key, first: int, last: int, dim: int, std: float) -> Float[Tensor, "n dim"]:
    """Return rows `first`..`last` - 1 of an endless table of N(0, std^2) numbers.

    A row depends on its own number only, so a table grown in steps equals one made at once.

    Source: Box and Muller, Annals of Mathematical Statistics 1958.
    """
    u = key.uniforms(np.arange(first, last, dtype=np.int64), 2 * dim)
    radius = np.sqrt(-2.0 * np.log1p(-u[:, :dim]))
    return torch.from_numpy((std * radius * np.cos(2.0 * math.pi * u[:, dim:])).astype(np.float32))


def normal(key: Key, shape: tuple[int, ...], std: float) -> Tensor:
    """Return a tensor of N(0, std^2) numbers of this key."""
    return torch.empty(shape).normal_(0.0, std, generator=torch.Generator().manual_seed(key.integer()))


def seeded_dropout(
    x: Float[Tensor, "b *shape"], rate: float, seeds: Int[Tensor, " b"] | None, site: int
) -> Float[Tensor, "b *shape"]:
    """Drop activations as a function of (seed, site, place), scaled so that the mean stays.

    Unlike torch's dropout it needs no generator, so a client draws the same mask alone, in a batch, under vmap and on
    another machine. A place is dropped where ``a * r + c``, modulo 2**32, is small: `a` (odd) and `c` come from the
    seed and the site, `r` is a fixed scramble of the place.

    Args:
        x: activations; each of the b people has one seed.
        rate: share to drop.
        seeds: one integer below 2**31 per person; None: do not drop.
        site: number of the place in the model, so that places drop independently.

    Source: multiply-shift hashing, Dietzfelbinger et al., J. Algorithms 1997; scramble: C. Wellons, "lowbias32".
    """
    if seeds is None or rate == 0.0:
        return x
    own = seeds.to(torch.int32)
    a, c = _scramble(own * 747796405 + site) | 1, _scramble(own + site * 277803737)
    place = torch.ones((), dtype=torch.int32)
    for size, stride in zip(x.shape[1:], _STRIDES, strict=False):  # not the flat index: padding must not move a place
        place = place[..., None] + torch.arange(size, dtype=torch.int32) * stride
    each = (-1, *[1] * (x.dim() - 1))
    keep = _scramble(place) * a.view(each) + c.view(each) >= int((rate - 0.5) * 0xFFFFFFFF)
    return x * (keep * (1.0 / (1.0 - rate)))


def _scramble(h: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    h = (h ^ (h >> 16)) * 2146121005
    h = (h ^ (h >> 15)) * -2073254261
    return h ^ (h >> 16)


def linear(
    x: Float[Tensor, "*b l i"], weight: Float[Tensor, "*own o i"], bias: Float[Tensor, "*each o"]
) -> Float[Tensor, "*c l o"]:
    """Return ``x W^T + b``, with W, b and x of all people together, or with one for each of them."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias) if bias.dim() == 1 else F.linear(x, weight) + bias[:, None]
    x = x if x.dim() == 3 else x.expand(len(weight), *x.shape)
    if weight.stride(0) == 0:
        shared: Tensor = _SharedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return shared
    if isinstance(weight, Moving) and isinstance(bias, Moving):
        weight.uses += 1
        own: Tensor = _MovingLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return own
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def product(x: Float[Tensor, "*b l i"], weight: Float[Tensor, "*own o i"]) -> Float[Tensor, "*c l o"]:
    """Return ``x W^T``, with W and x of all people together, or with one for each of them."""
    if weight.dim() == 2:
        return F.linear(x, weight)
    return (x if x.dim() == 3 else x.expand(len(weight), *x.shape)) @ weight.transpose(1, 2)


def layer_norm(
    x: Float[Tensor, "b l d"], weight: Float[Tensor, "*own d"], bias: Float[Tensor, "*own d"]
) -> Float[Tensor, "b l d"]:
    """Return x, normalised over its last axis, times weight plus bias."""
    if weight.dim() == 1:
        return F.layer_norm(x, x.shape[-1:], weight, bias)
    if weight.stride(0) == 0:
        shared: Tensor = _SharedNorm.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return shared
    ones = torch.ones(x.shape[-1])  # with a weight, torch takes a path of twice the speed
    return torch.addcmul(bias[:, None], F.layer_norm(x, x.shape[-1:], ones), weight[:, None])


def rows(table: Float[Tensor, "*own n d"], numbers: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """Return rows of a table, or of each person's own table; the latter's gradient is sparse over (person, row)."""
    if table.dim() == 2:
        return F.embedding(numbers, table)
    own: Tensor = _OwnRows.apply(table, numbers)  # type: ignore[no-untyped-call]
    return own


def inner(vectors: Float[Tensor, "b k d"], along: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
    """Return each person's k inner products with one vector; in this order several times as fast as the other way."""
    return torch.bmm(along[:, None], vectors.transpose(1, 2))[:, 0]


def by_age(mask: Bool[Tensor, "b l"], decay: float) -> Float[Tensor, "b l"]:
    """Return ``decay^age`` of each entry of padded histories, 1 for the newest, and 0 for padding."""
    age = mask.flip(1).cumsum(1).flip(1) - 1
    return torch.where(mask, decay ** age.float(), 0.0)


def by_distance(values: Float[Tensor, "*h n"]) -> Float[Tensor, "*h n n"]:
    """Return M with ``M_ij = values_(i - j)``, and minus infinity where j is later than i."""
    if values.dim() == 2:
        return _spread(values)
    own: Tensor = _OwnDistance.apply(values)  # type: ignore[no-untyped-call]
    return own


def _spread(values: Float[Tensor, "*h n"]) -> Float[Tensor, "*h n n"]:
    # A row of 2n numbers, repeated and cut into rows of 2n - 1, moves by one place from row to row.
    n = values.shape[-1]
    later = torch.full_like(values, float("-inf"))
    row = torch.cat([values[..., :1], later, values[..., 1:].flip(-1)], -1)
    lead = row.shape[:-1]
    tiled = row[..., None, :].expand(*lead, n, 2 * n).reshape(*lead, 2 * n * n)
    return tiled[..., : n * (2 * n - 1)].reshape(*lead, n, 2 * n - 1)[..., :n]


class Linear(nn.Module):
    """`linear` as a module, with Xavier weights of a key."""

    def __init__(self, n_in: int, n_out: int, key: Key) -> None:
        """Draw the weight from `key`; the bias is 0."""
        super().__init__()
        self.weight = nn.Parameter(normal(key, (n_out, n_in), (2.0 / (n_in + n_out)) ** 0.5))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Float[Tensor, "*b l i"]) -> Float[Tensor, "*c l o"]:
        """Apply it."""
        return linear(x, self.weight, self.bias)


class Adapted(Linear):
    """A linear layer with a low-rank term beside it: ``x W^T + b + (x D^T) U^T``, one half of which is 0 at first.

    For training under noise the other half can stay as it is (train = "ffa"): U and D would multiply two noises, and
    the directions that it spans can be those in which public data learns, see `fedrec.models.adapters`.

    Source: Hu et al., ICLR 2022 (LoRA), equation 3, with alpha = r; one half fixed: Sun et al., ICLR 2024 (FFA-LoRA).
    """

    def __init__(self, n_in: int, n_out: int, key: Key, rank: int, reach: float = 1.0, outward: bool = False) -> None:
        """Draw weight and D from `key`, its rows about `reach` long; or if `outward` U, its columns so long."""
        super().__init__(n_in, n_out, key)
        drawn = (n_out, rank) if outward else (rank, n_in)
        half = nn.Parameter(normal(key.child("down"), drawn, reach * (n_out if outward else n_in) ** -0.5))
        self.down = nn.Parameter(torch.zeros(rank, n_in)) if outward else half
        self.up = half if outward else nn.Parameter(torch.zeros(n_out, rank))

    def forward(self, x: Float[Tensor, "*b l i"]) -> Float[Tensor, "*c l o"]:
        """Apply both terms."""
        return linear(x, self.weight, self.bias) + product(product(x, self.down), self.up)


def make_linear(n_in: int, n_out: int, key: Key, rank: int, reach: float = 1.0, outward: bool = False) -> Linear:
    """Return a linear layer, with adapters of this rank unless it is 0, see `Adapted`."""
    return Adapted(n_in, n_out, key, rank, reach, outward) if rank else Linear(n_in, n_out, key)


class LayerNorm(nn.Module):
    """`layer_norm` as a module, at first without effect on the normalised values."""

    def __init__(self, dim: int) -> None:
        """Start with weight 1 and bias 0."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        """Apply it."""
        return layer_norm(x, self.weight, self.bias)


class _OwnRows(torch.autograd.Function):
    """Rows of each person's own table; the gradient names only the rows looked up, a row perhaps more than once."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, numbers: Tensor) -> Tensor:
        ctx.save_for_backward(numbers)
        ctx.table_shape = table.shape
        if table.stride(0) == 0:
            return F.embedding(numbers, table[0])
        b, n, d = table.shape
        return F.embedding(numbers + torch.arange(0, b * n, n)[:, None], table.view(b * n, d))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (numbers,) = ctx.saved_tensors
        person = torch.arange(len(numbers)).repeat_interleave(numbers.shape[1])
        values = gradients[0].reshape(-1, ctx.table_shape[-1])
        place = torch.stack([person, numbers.flatten()])
        return torch.sparse_coo_tensor(place, values, ctx.table_shape, check_invariants=False), None


class _SharedLinear(torch.autograd.Function):
    """A linear layer whose weights are the same for all people and whose gradients are not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight[0], bias[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (out,) = gradients
        x, weight = ctx.saved_tensors
        return out @ weight[0], out.transpose(1, 2) @ x, out.sum(1)


class _MovingLinear(torch.autograd.Function):
    """A linear layer that moves each person's own weights by their gradient while it goes backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.own = weight, bias
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        (out,) = gradients
        (x,) = ctx.saved_tensors
        weight, bias = ctx.own
        dx = torch.bmm(out, weight)
        if weight.uses > 1:  # the other places still need the numbers that all of them went forward by
            return dx, torch.bmm(out.transpose(1, 2), x), out.sum(1)
        weight.baddbmm_(out.transpose(1, 2), x)
        bias.add_(out.sum(1))
        return dx, None, None


class _SharedNorm(torch.autograd.Function):
    """A layer norm whose weights are the same for all people and whose gradients are not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out, mean, scale = torch.native_layer_norm(x, x.shape[-1:], weight[0], bias[0], 1e-5)
        ctx.save_for_backward(x, weight, mean, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (out,) = gradients
        x, weight, mean, scale = ctx.saved_tensors
        dx = torch.ops.aten.native_layer_norm_backward(
            out, x, x.shape[-1:], mean, scale, weight[0], None, [True, False, False]
        )[0]
        return dx, (x - mean).mul_(scale).mul_(out).sum(1), out.sum(1)


class _OwnDistance(torch.autograd.Function):
    """`by_distance` for values with a leading axis of people; its gradient is one pass over that of the weights."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        if values.stride(0):
            return _spread(values)
        spread = _spread(values[0])
        return spread.expand(len(values), *spread.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # The gradient of what lies later is zero, so the diagonals of [n, n] are columns of a view of row length n + 1.
        out = gradients[0].contiguous()
        n, lead = out.shape[-1], out.shape[:-2]
        flat = out.view(-1, n * n)
        sums = torch.zeros(len(flat), n, dtype=out.dtype)
        if n > 1:
            diagonals = flat.as_strided((len(flat), n - 1, n), (n * n, n + 1, 1), 2)
            sums = diagonals.sum(1).flip(-1)
        sums[:, 0] += flat[:, 0]
        return sums.view(*lead, n)
