"""The documents of a secure sum: four questions to each node and their answers.

A node answers for all of its clients at once, each a party of its own; `m` parties, each with `k` neighbours. Arrays of
unsigned bytes hold keys and sealed letters, a row each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from fedrec.errors import MaskingError
from fedrec.params import Array, Params
from fedrec.privacy.masking import KEY_BYTES, NONCE_BYTES, TAG_BYTES, Ring
from fedrec.privacy.shares import SHARE_BYTES
from fedrec.privacy.terms import Terms
from fedrec.protocol import wire
from fedrec.protocol.identities import IDENTITY_BYTES, SIGNATURE_BYTES

ADVERT = 3 * KEY_BYTES
"""Bytes of an advertisement: a key for letters, a key for masks, the commitment to the party's seed."""
LETTER = 3 * SHARE_BYTES
"""Bytes of a letter: shares of the sender's root, seed and mask key, of `OF_ROOT`, `OF_SEED` and `OF_KEY`."""
SEALED = NONCE_BYTES + LETTER + TAG_BYTES
NOTHING, OF_ROOT, OF_SEED, OF_KEY = range(4)
"""What a party gives of each neighbour's secrets, never more than one: of the key if the contribution did not arrive;
of the root, from which the seed follows, if the extra part of the noise comes off; else of the seed."""

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Shaped = dict[str, tuple[str, tuple[str | int, ...]]]


@dataclass(frozen=True)
class _Document:
    """Fields that are arrays travel as tensors, the others in the header."""

    KIND: ClassVar[str]
    SHAPES: ClassVar[Shaped]
    """Dtype and shape of each array; one letter stands for one length."""

    session: str

    def to_bytes(self) -> bytes:
        """Return the document in the wire format."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        header = {name: value for name, value in values.items() if name not in self.SHAPES}
        if isinstance(header.get("terms"), Terms):
            header["terms"] = header["terms"].model_dump(mode="json")
        return wire.pack(self.KIND, header, {name: values[name] for name in self.SHAPES})

    @classmethod
    def from_bytes(cls, document: bytes) -> Self:
        """Return the document that `to_bytes` wrote.

        Raises:
            ProtocolError: not such a document.
            MaskingError: its fields or the shapes of its arrays are wrong, or its terms are not acceptable.
        """
        header, tensors = wire.unpack(cls.KIND, document)
        names = {each.name: each.type for each in fields(cls)}
        if header.keys() | tensors.keys() != names.keys() or tensors.keys() != cls.SHAPES.keys():
            raise MaskingError(f"A '{cls.KIND}' document has other fields than it should.")
        for name, value in header.items():
            if name == "terms":
                try:
                    header[name] = Terms.model_validate(value)
                except ValidationError as error:
                    raise MaskingError(f"The terms of the secure sum are not acceptable: {error}") from error
            elif type(value) is not (int if names[name] == "int" else str):
                raise MaskingError(f"'{name}' of a '{cls.KIND}' document is not {names[name]}.")
        _check_shapes(cls.KIND, cls.SHAPES, tensors)
        return cls(**{**header, **tensors})


def _check_shapes(kind: str, shapes: Shaped, tensors: Params) -> None:
    lengths: dict[str, int] = {}
    for name, (dtype, shape) in shapes.items():
        value = tensors[name]
        wanted = [lengths.setdefault(n, have) if isinstance(n, str) else n
                  for n, have in zip(shape, value.shape, strict=False)]  # fmt: skip
        right = value.dtype == dtype if dtype else value.dtype.kind == "u"
        if not right or value.ndim != len(shape) or list(value.shape) != wanted:
            raise MaskingError(f"'{name}' of a '{kind}' document is {value.dtype}{value.shape}.")


@dataclass(frozen=True)
class AdvertiseRequest(_Document):
    """Asks a node's clients for public keys, and tells them the terms."""

    KIND = "secure-advertise-request"
    SHAPES: ClassVar[Shaped] = {"parties": ("int64", ("m",)), "slots": ("int64", ("m",))}
    terms: Terms
    parties: Ints
    slots: Ints


@dataclass(frozen=True)
class AdvertiseReply(_Document):
    """The keys of those who take part, signed by their node if it has an identity."""

    KIND = "secure-advertise"
    SHAPES: ClassVar[Shaped] = {
        "parties": ("int64", ("m",)),
        "adverts": ("uint8", ("m", ADVERT)),
        "speaker": ("uint8", ("i",)),
        "signature": ("uint8", ("s",)),
    }
    parties: Ints
    adverts: Bytes
    speaker: Bytes
    signature: Bytes


@dataclass(frozen=True)
class ShareRequest(_Document):
    """Tells each party its neighbours and their keys (of the `known` ones), and asks for shares of its secrets.

    Where nodes sign, everybody is known, with the signature of each of the z nodes and which of them spoke.
    """

    KIND = "secure-share-request"
    SHAPES: ClassVar[Shaped] = {
        "parties": ("int64", ("m",)),
        "neighbours": ("int64", ("m", "k")),
        "known": ("int64", ("q",)),
        "adverts": ("uint8", ("q", ADVERT)),
        "speaker_of": ("int64", ("q",)),
        "speakers": ("uint8", ("z", IDENTITY_BYTES)),
        "signatures": ("uint8", ("z", SIGNATURE_BYTES)),
    }
    n_parties: int
    parties: Ints
    neighbours: Ints
    known: Ints
    adverts: Bytes
    speaker_of: Ints
    speakers: Bytes
    signatures: Bytes


@dataclass(frozen=True)
class ShareReply(_Document):
    """A sealed letter from each party to each of its neighbours."""

    KIND = "secure-share"
    SHAPES: ClassVar[Shaped] = {"parties": ("int64", ("m",)), "letters": ("uint8", ("m", "k", SEALED))}
    parties: Ints
    letters: Bytes


@dataclass(frozen=True)
class MaskRequest(_Document):
    """Hands out the letters of those neighbours that are `present`, and asks for masked contributions to the plan.

    Rows between parties of one node are zeros: their letters never leave it.
    """

    KIND = "secure-mask-request"
    SHAPES: ClassVar[Shaped] = {
        "parties": ("int64", ("m",)),
        "present": ("bool", ("m", "k")),
        "letters": ("uint8", ("m", "k", SEALED)),
        "plan": ("uint8", ("p",)),
    }
    parties: Ints
    present: Flags
    letters: Bytes
    plan: Bytes


@dataclass(frozen=True)
class MaskReply(_Document):
    """The sum of the masked contributions of `parties`, which is as masked as each of them."""

    KIND = "secure-mask"
    SHAPES: ClassVar[Shaped] = {
        "parties": ("int64", ("m",)),
        "total": ("", ("d",)),
        "signature": ("uint8", ("s",)),
    }
    parties: Ints
    total: Ring
    signature: Bytes


@dataclass(frozen=True)
class UnmaskRequest(_Document):
    """Tells whose contributions arrived, by number, and asks for shares of their and the others' secrets.

    With what each node signed of those that it sent, in the order of `ShareRequest.speakers`; zeros if it sent none.
    """

    KIND = "secure-unmask-request"
    SHAPES: ClassVar[Shaped] = {
        "parties": ("int64", ("m",)),
        "arrived": ("bool", ("n",)),
        "signatures": ("uint8", ("z", SIGNATURE_BYTES)),
    }
    parties: Ints
    arrived: Flags
    signatures: Bytes


@dataclass(frozen=True)
class UnmaskReply(_Document):
    """Shares of each party's neighbours' secrets, and in the last place one of its own (h = k + 1)."""

    KIND = "secure-unmask"
    SHAPES: ClassVar[Shaped] = {
        "parties": ("int64", ("m",)),
        "kinds": ("uint8", ("m", "h")),
        "shares": ("uint8", ("m", "h", SHARE_BYTES)),
    }
    parties: Ints
    kinds: Bytes
    shares: Bytes


def kinds_of(terms: Terms, n_parties: int, arrived: Flags) -> Bytes:
    """Return [n] what is told of each client's secrets.

    Of those who arrived the first `Terms.keepers` in the order of their numbers keep the extra part of their noise. So
    whoever keeps it when all who arrived are told of, keeps it when fewer are: leaving some out takes no noise off.

    Args:
        terms: what was agreed on.
        n_parties: how many advertised keys.
        arrived: [n] whose contributions are in the sum.
    """
    kept = np.cumsum(arrived) - arrived < terms.keepers(n_parties, int(arrived.sum()))
    return np.where(arrived, np.where(kept, OF_SEED, OF_ROOT), OF_KEY).astype(np.uint8)


def layout_of(shapes: dict[str, tuple[int, ...]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the order in which tensors stand in one vector: by name."""
    return tuple((name, tuple(shape)) for name, shape in sorted(shapes.items()))


def flatten(terms: Terms, tensors: Params) -> NDArray[np.float64]:
    """Return a contribution's tensors as one vector.

    Raises:
        MaskingError: they are not those of the terms.
    """
    if layout_of({name: value.shape for name, value in tensors.items()}) != terms.layout:
        raise MaskingError("A contribution has other tensors than the terms of the secure sum say.")
    return np.concatenate([np.asarray(tensors[name], np.float64).ravel() for name, _ in terms.layout])


def unflatten(terms: Terms, vector: Array) -> dict[str, Array]:
    """Return one vector as the tensors of the terms."""
    found: dict[str, Any] = {}
    start = 0
    for name, shape in terms.layout:
        stop = start + int(np.prod(shape))
        found[name] = vector[start:stop].reshape(shape)
        start = stop
    return found
