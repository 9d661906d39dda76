"""Tensors that a plan names by what they are, so that whoever holds them already is not sent them again.

A `Parcel` is one tensor as it travels, named by the SHA-256 of its document. The names are in the header of a plan, so
its signature binds them; the parcels themselves travel beside it, once.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedrec.errors import ProtocolError, TensorsMissing
from fedrec.params import Array
from fedrec.protocol import wire
from fedrec.protocol.codec import F32, Float, to_half

LEAST_BYTES = 4096
"""Smaller tensors travel in the plan itself: naming them would save nothing."""
MOST_PARCEL = 1 << 40
MOST_NAMED = 10_000
"""More tensors than a model has; a longer list is a fault or an attack."""
MOST_ANSWER = 1 << 20
"""Bytes of the longest list of missing tensors."""
_PARCEL, _TENSOR, _MISSING = "parcel", "tensor", "missing"
SHA256 = "^[0-9a-f]{64}$"
Held = Callable[[str], bytes | None]
"""Gives the parcel of a digest, its digest checked, or None."""


class Named(BaseModel):
    """What a plan says of a tensor that it does not carry."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    sha256: str = Field(pattern=SHA256)
    """Of the parcel."""
    size: int = Field(ge=1, le=MOST_PARCEL)
    """Bytes of the parcel."""


@dataclass(frozen=True, eq=False)
class Parcel:
    """A tensor, and how it travels.

    Attributes:
        value: the tensor; it is never written to once a plan holds it.
        form: how float32 numbers of it are rounded on their way.
    """

    value: Array
    form: Float

    def to_bytes(self) -> bytes:
        """Return the parcel in the wire format; equal tensors give equal bytes."""
        return wire.pack(_PARCEL, {}, {_TENSOR: rounded(self.value, self.form)})


def rounded(value: Array, form: Float) -> Array:
    """Return a tensor as it travels: float32 in 16 bits where that is wanted, anything else as it is."""
    return value if form == "float32" or value.dtype != F32 else to_half(value, form)


def tensor_of(parcel: bytes) -> Array:
    """Return the tensor in a parcel, as it travelled.

    Raises:
        ProtocolError: it is no parcel.
    """
    _, tensors = wire.unpack(_PARCEL, parcel)
    if tensors.keys() != {_TENSOR}:
        raise ProtocolError("A parcel is malformed: it holds something else than one tensor.")
    return tensors[_TENSOR]


def check_parcel(sha256: str, parcel: bytes) -> None:
    """Refuse bytes that are not what their name says.

    Raises:
        ProtocolError: they have another digest.
    """
    found = hashlib.sha256(parcel).hexdigest()
    if found != sha256:
        raise ProtocolError(
            f"The tensor sent as {sha256[:12]} is {found[:12]}: it was changed, so it is neither used nor kept."
        )


class _Names:
    """Names of tensors by identity, for as long as the tensors live, so that a large one is hashed once in a run."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, Float], tuple[weakref.ref[Array], Named]] = {}

    def of(self, parcel: Parcel) -> Named:
        key = (id(parcel.value), parcel.form)
        known = self._known.get(key)
        if known is not None and known[0]() is parcel.value:
            return known[1]
        data = parcel.to_bytes()
        found = Named(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        self._known[key] = weakref.ref(parcel.value, lambda gone: self._forget(key, gone)), found
        return found

    def _forget(self, key: tuple[int, Float], gone: weakref.ref[Array]) -> None:
        if key in self._known and self._known[key][0] is gone:  # another tensor may have taken its place meanwhile
            del self._known[key]


_NAMES = _Names()


@dataclass
class Freight:
    """The parcels that the documents of one exchange name; a link gives them to the nodes that lack them.

    Attributes:
        parcels: by digest.
        n_bytes: how many bytes went to nodes beside the documents; the link counts.
    """

    parcels: dict[str, Parcel] = field(default_factory=dict)
    n_bytes: int = 0
    _packed: dict[str, bytes] = field(default_factory=dict)

    def load(self, value: Array, form: Float) -> Named:
        """Take a tensor along and return its name."""
        parcel = Parcel(value, form)
        named = _NAMES.of(parcel)
        self.parcels[named.sha256] = parcel
        return named

    def get(self, sha256: str) -> bytes | None:
        """Return a parcel that is taken along, or None."""
        if sha256 not in self._packed:
            if sha256 not in self.parcels:
                return None
            self._packed[sha256] = self.parcels[sha256].to_bytes()
        return self._packed[sha256]


def nothing(sha256: str) -> None:
    """Hold no parcel."""
    return


def found(named: Iterable[Named], held: Held) -> dict[str, Array]:
    """Return digest -> tensor, as it travelled, of all that are named.

    Raises:
        TensorsMissing: some are not held.
        ProtocolError: one is malformed.
    """
    parcels = {one.sha256: held(one.sha256) for one in named}
    missing = sorted(sha256 for sha256, parcel in parcels.items() if parcel is None)
    if missing:
        raise TensorsMissing(missing)
    return {sha256: tensor_of(parcel) for sha256, parcel in parcels.items() if parcel is not None}


class Missing(BaseModel):
    """A node's answer to a plan that names tensors which it does not hold: nothing was done."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    digests: tuple[str, ...] = Field(min_length=1, max_length=MOST_NAMED)

    def to_bytes(self) -> bytes:
        """Return the answer in the wire format."""
        return wire.pack(_MISSING, self.model_dump(mode="json"), {})

    @classmethod
    def from_bytes(cls, document: bytes) -> Missing | None:
        """Return the answer that `to_bytes` wrote, or None if the document is another one or too long for it.

        Raises:
            ProtocolError: it is malformed.
        """
        if len(document) > MOST_ANSWER or wire.kind_of(document) != _MISSING:
            return None
        header, _ = wire.unpack(_MISSING, document)
        try:
            return cls.model_validate(header)
        except ValidationError as error:
            raise ProtocolError(f"The list of missing tensors is malformed: {error}") from error
