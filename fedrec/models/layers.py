"""Small parts that several models share: initial values from a key, and dropout that is a function of a seed."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedrec.random import Key

_STRIDES = (40503, -1640531535, 1013904243)


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
