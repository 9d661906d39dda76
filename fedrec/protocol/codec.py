"""How the sums of a fit are written on the wire: as they are, in halves, in 8 bits, by rows, or in few directions.

Only float32 tensors are coded. The reader knows names and shapes from what it asked for, so a document carries neither,
and nothing is allocated that was not asked for. With a lossy codec the decoded sum may be longer than what was encoded;
decoding therefore also says how short the original can have been, which is what the norm bound is held against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fedrec import params as named
from fedrec.errors import ProtocolError, TallyRefused
from fedrec.params import Array, Params
from fedrec.random import Key

Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Name to (shape, dtype) of tensors."""
Float = Literal["float32", "float16", "bfloat16"]
"""How a float32 number travels."""

F32 = np.dtype(np.float32)
TOP = 127
"""The largest level of the 8-bit codec."""
_HALVES, _LEVELS, _SCALES, _ROWS = "codec:halves", "codec:levels", "codec:scales", "codec:rows:"
_TINY = float(np.finfo(np.float32).tiny)
_UNIT: dict[str, tuple[float, float]] = {"float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}
"""Largest relative error of rounding to nearest, and largest absolute error near zero."""


class _Settings(BaseModel):
    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    reveals: ClassVar[str] = ""
    """What a reader of the messages learns besides the numbers; goes into the privacy statement."""


class Plain(_Settings):
    """Every number as it is."""

    kind: Literal["plain"] = "plain"


class Half(_Settings):
    """Every number in 16 bits, rounded to nearest, ties to even."""

    kind: Literal["half"] = "half"
    dtype: Literal["float16", "bfloat16"] = "bfloat16"
    """"float16": 11 bits of precision up to 65,504; "bfloat16": 8 bits, with the range of float32."""


class Quantised(_Settings):
    """Every number in 8 bits, rounded at random so that it is right on average; zero stays zero."""

    kind: Literal["quantised"] = "quantised"
    chunk: int = Field(default=512, ge=16, le=65536)
    """How many neighbouring numbers of a tensor share a scale of 4 bytes; fewer: closer, and longer messages."""


Values = Annotated[Plain | Half | Quantised, Field(discriminator="kind")]
AnyValues = Plain | Half | Quantised


class Sparse(_Settings):
    """Of item tables only the rows that are not zero, with their numbers; other tensors whole."""

    reveals: ClassVar[str] = (
        "The sparse codec names the item rows that it sends, so whoever reads a node's message learns which items its "
        "clients touched (what they took, among the negatives that they drew), and no masking of sums can hide it."
    )
    kind: Literal["sparse"] = "sparse"
    values: Values = Plain()
    """How the numbers themselves are written."""


class LowRank(_Settings):
    """Item tables in a few random directions, the same at all nodes and new in each round; other tensors whole."""

    kind: Literal["low_rank"] = "low_rank"
    rank: int = Field(default=16, ge=1)
    """How many directions; tables that are not wider travel whole."""
    values: Values = Plain()
    """How the numbers themselves are written."""


Codec = Annotated[Plain | Half | Quantised | Sparse | LowRank, Field(discriminator="kind")]
AnyCodec = Plain | Half | Quantised | Sparse | LowRank


@dataclass(frozen=True)
class _Read:
    """Tensors, and for each the smallest L2 norm that it can have had before it was encoded."""

    tensors: dict[str, Array]
    least: dict[str, float]


@dataclass(frozen=True)
class Coding:
    """A codec with what a round adds to it; node and server derive the same from the plan.

    Attributes:
        codec: the settings.
        n_items: a tensor of two axes or more whose first is this long is an item table.
        key: of the round.
    """

    codec: AnyCodec
    n_items: int
    key: Key

    def encode(self, sums: Params, node: str) -> Params:
        """Return what travels. Rounding draws from the round's key and the node's name, so equal runs send equal bytes.

        Raises:
            ProtocolError: a number is not finite.
        """
        codec = self.codec
        if isinstance(codec, Plain):
            return sums
        broken = named.non_finite(sums)
        if broken:
            raise ProtocolError(f"'{broken[0]}' holds a NaN or an infinity, which the codec cannot write.")
        coded = {name: value for name, value in sums.items() if value.dtype == F32}
        sent = {name: value for name, value in sums.items() if value.dtype != F32}
        if isinstance(codec, Sparse):
            numbers = {n: np.flatnonzero(_by_row(coded[n]).any(axis=1)) for n in self._tables(coded)}
            sent |= {_ROWS + name: rows.astype(np.int32) for name, rows in numbers.items()}
            coded |= {name: coded[name][rows] for name, rows in numbers.items()}
        elif isinstance(codec, LowRank):
            coded |= {name: coded[name] @ self._directions(coded[name].shape[1]) for name in self._narrowed(coded)}
        return sent | _write(_values(codec), coded, self.key.child("codec", "rounding", node))

    def decode(self, found: Params, shapes: Shapes) -> tuple[Params, float]:
        """Return the sums and by how much the codec may have lengthened them together, at most.

        Args:
            found: what travelled.
            shapes: what was asked for.

        Raises:
            TallyRefused: it does not decode to that.
        """
        codec = self.codec
        if isinstance(codec, Plain):
            return found, 0.0
        coded = {name: shape for name, (shape, dtype) in shapes.items() if dtype == F32}
        left = dict(found)
        rest = {name: left.pop(name) for name in shapes.keys() - coded.keys() if name in left}
        inner, numbers = dict(coded), {}
        if isinstance(codec, Sparse):
            numbers = {name: _rows(left.pop(_ROWS + name, None), name, coded[name][0]) for name in self._tables(coded)}
            inner |= {name: (len(rows), *coded[name][1:]) for name, rows in numbers.items()}
        elif isinstance(codec, LowRank):
            inner |= {name: (coded[name][0], codec.rank) for name in self._narrowed(coded)}
        read = _read(_values(codec), left, inner)
        for name, rows in numbers.items():
            whole = np.zeros(coded[name], F32)
            whole[rows] = read.tensors[name]
            read.tensors[name] = whole
        if isinstance(codec, LowRank):
            for name in self._narrowed(coded):
                with np.errstate(over="ignore", invalid="ignore"):
                    read.tensors[name] = read.tensors[name] @ self._directions(coded[name][1]).T
                read.least[name] *= math.sqrt(codec.rank / coded[name][1])
        norm, least = named.norm(read.tensors), math.sqrt(sum(value**2 for value in read.least.values()))
        return {**rest, **read.tensors}, max(0.0, norm - least)

    def _tables(self, tensors: Mapping[str, Array] | Mapping[str, tuple[int, ...]]) -> list[str]:
        shapes = {name: getattr(value, "shape", value) for name, value in tensors.items()}
        return sorted(name for name, shape in shapes.items() if len(shape) >= 2 and shape[0] == self.n_items)

    def _narrowed(self, tensors: Mapping[str, Array] | Mapping[str, tuple[int, ...]]) -> list[str]:
        """Return the names of the tables that are wider than the rank."""
        assert isinstance(self.codec, LowRank)
        shapes = {name: getattr(tensors[name], "shape", tensors[name]) for name in self._tables(tensors)}
        return [name for name, shape in shapes.items() if len(shape) == 2 and shape[1] > self.codec.rank]

    def _directions(self, width: int) -> NDArray[np.float32]:
        r"""Return P: [d, r], the same wherever it is computed in this round.

        .. math:: U = D P, \quad \hat D = U P^T, \quad P = \sqrt{d / r} \, Q

        with Q the first r columns of a random rotation. E[P P^T] = I, so E[D^] = D, and what nodes send adds up to what
        decodes to the sum. The squared error is d / r - 1 times the squared norm of D on average; the nodes share Q, so
        it averages out over rounds, not over clients.

        Source: sketched updates, Konecny et al., Federated learning: strategies for improving communication
        efficiency, 2016, section 3, with a random rotation in place of a random mask.
        """
        assert isinstance(self.codec, LowRank)
        rank = self.codec.rank
        normal = self.key.child("codec", "directions", width).numpy().standard_normal((width, rank))
        q, triangle = np.linalg.qr(normal)
        q *= np.sign(np.diag(triangle))  # without this the rotation would not be uniform
        return (q * math.sqrt(width / rank)).astype(np.float32)


def to_half(values: Array, dtype: Literal["float16", "bfloat16"]) -> Array:
    """Return float32 `values` in 16 bits, to nearest, ties to even; bfloat16 as the upper half of float32 in uint16.

    >>> to_half(np.array([1.0, -2.0], np.float32), "bfloat16").tolist()
    [16256, 49152]
    """
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    upper = ((bits + (np.uint32(0x7FFF) + even)) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), upper).reshape(values.shape)


def from_half(halves: Array) -> Array:
    """Return what `to_half` wrote, as float32.

    >>> from_half(to_half(np.array([1.0, -2.0], np.float32), "bfloat16")).tolist()
    [1.0, -2.0]
    """
    if halves.dtype == np.float16:
        return halves.astype(np.float32)
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _values(codec: AnyCodec) -> AnyValues:
    return codec.values if isinstance(codec, Sparse | LowRank) else codec


def _by_row(value: Array) -> Array:
    return value.reshape(len(value), -1)


def _flat(tensors: Params) -> Array:
    return np.concatenate([np.zeros(0, F32), *(tensors[name].ravel() for name in sorted(tensors))])


def _write(codec: AnyValues, tensors: Params, key: Key) -> dict[str, Array]:
    if isinstance(codec, Plain):
        return dict(tensors)
    if isinstance(codec, Half):
        return {_HALVES: to_half(_flat(tensors), codec.dtype)}
    draws = key.numpy()
    parts = [_quantise(tensors[name].ravel(), codec.chunk, draws) for name in sorted(tensors)]
    levels, scales = zip((np.zeros(0, np.int8), np.zeros(0, F32)), *parts, strict=True)
    return {_LEVELS: np.concatenate(levels), _SCALES: np.concatenate(scales)}


def _quantise(x: Array, chunk: int, draws: np.random.Generator) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    r"""Return [n] levels and [ceil(n / chunk)] scales of the [n] numbers.

    .. math:: s = \max_{i \in chunk} |x_i| / 127, \quad q_i = \lfloor x_i / s + u_i \rfloor, \quad \hat x_i = s q_i

    with u uniform in [0, 1), so E[x^] = x up to float32 rounding, and |x^ - x| < s.

    Source: Alistarh et al., QSGD, NeurIPS 2017, section 3.1, with the largest magnitude in place of the L2 norm.
    """
    blocks = _blocks(x, chunk)
    largest = np.abs(blocks).max(axis=1, initial=0.0)
    least = np.float32(np.finfo(np.float32).smallest_subnormal)
    scales = np.where(largest > 0, np.maximum(largest / np.float32(TOP), least), np.float32(0))
    levels = blocks / np.where(scales > 0, scales, np.float32(1))[:, None]
    low = np.floor(levels)
    levels = low + (draws.random(levels.shape, np.float32) < levels - low)
    return np.clip(levels, -TOP, TOP).astype(np.int8).ravel()[: len(x)], scales.astype(np.float32)


def _blocks(x: Array, chunk: int) -> Array:
    """Return [n] numbers as [ceil(n / chunk), chunk], filled up with zeros."""
    padded = np.zeros((-(-len(x) // chunk), chunk), x.dtype)
    padded.reshape(-1)[: len(x)] = x
    return padded


def _read(codec: AnyValues, found: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> _Read:
    """Return the tensors of these shapes.

    Raises:
        TallyRefused: what was found is not exactly these.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    if isinstance(codec, Plain):
        tensors = _asked(found, {name: (shape, F32) for name, shape in shapes.items()})
        return _Read(tensors, {name: named.norm({name: value}) for name, value in tensors.items()})
    if isinstance(codec, Half):
        dtype = np.dtype(np.float16 if codec.dtype == "float16" else np.uint16)
        halves = _asked(found, {_HALVES: ((total,), dtype)})[_HALVES]
        tensors = {name: from_half(part) for name, part in _cut(halves, sizes).items()}
        relative, absolute = _UNIT[codec.dtype]
        least = {
            n: max(0.0, named.norm({n: v}) / (1 + relative) - absolute * math.sqrt(v.size)) for n, v in tensors.items()
        }
    else:
        chunks = {name: -(-size // codec.chunk) for name, size in sizes.items()}
        asked: Shapes = {_LEVELS: ((total,), np.dtype(np.int8)), _SCALES: ((sum(chunks.values()),), F32)}
        levels, scales = (_asked(found, asked)[name] for name in (_LEVELS, _SCALES))
        if not (np.isfinite(scales).all() and (scales >= 0).all() and (levels >= -TOP).all()):
            raise TallyRefused("its levels or scales are not those of 8-bit numbers")
        own = _cut(scales, chunks)
        both = {name: _dequantise(part, own[name], codec.chunk) for name, part in _cut(levels, sizes).items()}
        tensors, least = {n: value for n, (value, _) in both.items()}, {n: norm for n, (_, norm) in both.items()}
    return _Read({name: tensors[name].reshape(shape) for name, shape in shapes.items()}, least)


def _dequantise(levels: NDArray[np.int8], scales: NDArray[np.float32], chunk: int) -> tuple[Array, float]:
    """Return the numbers, and the least norm of anything that rounds to them: a level was reached from one below.

    Raises:
        TallyRefused: a scale is larger than its numbers need, which would leave room for a longer update.
    """
    blocks = _blocks(levels, chunk).astype(np.float32)
    steps = np.abs(blocks)
    if (steps.max(axis=1, initial=0.0)[scales >= _TINY] < TOP - 1).any():
        raise TallyRefused("a scale of its 8-bit numbers is larger than they need")
    below = np.square(np.maximum(steps - 1, 0)).sum(axis=1, dtype=np.float64)
    with np.errstate(over="ignore"):
        values = blocks * scales[:, None]
    return values.ravel()[: len(levels)], math.sqrt(float(below @ np.square(scales, dtype=np.float64)))


def _asked(found: Mapping[str, Array], asked: Shapes) -> dict[str, Array]:
    """Return `found` if it is what was asked for."""
    if found.keys() != asked.keys():
        odd = sorted(found.keys() ^ asked.keys())
        raise TallyRefused(f"its tensors are missing or unknown: {', '.join(odd[:3])}")
    for name, (shape, dtype) in asked.items():
        value = found[name]
        if value.shape != shape or value.dtype != dtype:
            raise TallyRefused(f"'{name}' is {value.dtype}{value.shape} where {dtype}{shape} was asked")
    return dict(found)


def _cut(flat: Array, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Return the part of each name, as `_flat` put them together."""
    names = sorted(sizes)
    ends = np.cumsum([sizes[name] for name in names], dtype=np.int64)
    return {name: flat[end - sizes[name] : end] for name, end in zip(names, ends.tolist(), strict=True)}


def _rows(numbers: Array | None, name: str, n: int) -> Array:
    """Return row numbers if they are rising numbers of the table's rows."""
    if numbers is None or numbers.dtype != np.int32 or numbers.ndim != 1:
        raise TallyRefused(f"the row numbers of '{name}' are missing or no list")
    if len(numbers) and (numbers[0] < 0 or numbers[-1] >= n or (numbers[1:] <= numbers[:-1]).any()):
        raise TallyRefused(f"the row numbers of '{name}' do not rise from 0 to {n - 1}")
    return numbers
