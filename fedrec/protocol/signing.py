"""Signed documents: a device acts only on what somebody signed whose public key it was given.

An Ed25519 signature covers the purpose, the terms and the document, so that a signed plan never passes for a signed
release and its terms cannot be exchanged.

Source: Josefsson and Liusvaara, RFC 8032.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedrec.data.catalog import ItemCatalog
from fedrec.errors import FedrecError, PlanRefused, ProtocolError
from fedrec.models.configs import AnyModelConfig, ModelConfig
from fedrec.models.portable import check_params
from fedrec.params import Array
from fedrec.protocol import wire

Purpose = Literal["plan", "release"]
_ENVELOPE, _DOCUMENT, _RELEASE = "signed", "document", "device-release"


class Terms(BaseModel):
    """What the signer promises about a plan."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    ledger: str = Field(min_length=1, max_length=200)
    """Names the privacy ledger that the plan is charged to."""
    cohort_minimum: int = Field(ge=1)
    """With fewer contributions the sum is thrown away unread."""
    epsilon: float | None = Field(ge=0)
    """What a person will have spent on this ledger, this plan included, over its whole life; None: no guarantee."""
    delta: float = Field(default=0.0, ge=0, lt=1)
    """Probability that the guarantee may fail with."""
    expires_at: int = Field(ge=0)
    """Seconds since 1970 UTC from which on nobody should act on the plan."""


def public_key(key: Ed25519PrivateKey) -> bytes:
    """Return the 32 bytes that verify what `key` signs."""
    return key.public_key().public_bytes_raw()


def sign(purpose: Purpose, document: bytes, key: Ed25519PrivateKey, terms: Terms | None = None) -> bytes:
    """Return the document in a signed envelope."""
    said = None if terms is None else terms.model_dump(mode="json")
    signature = key.sign(_message(purpose, said, document))
    header = {"purpose": purpose, "terms": said, "key": public_key(key).hex(), "signature": signature.hex()}
    return wire.pack(_ENVELOPE, header, {_DOCUMENT: np.frombuffer(document, np.uint8)})


def verify(purpose: Purpose, envelope: bytes, trusted: Collection[bytes]) -> tuple[bytes, Terms | None]:
    """Return the document and its terms.

    Args:
        purpose: what the document should be.
        envelope: from `sign`.
        trusted: public keys of 32 bytes.

    Raises:
        PlanRefused: it is not signed by a trusted key for this purpose, or was changed.
    """
    try:
        header, tensors = wire.unpack(_ENVELOPE, envelope)
        signer, signature = bytes.fromhex(header["key"]), bytes.fromhex(header["signature"])
        said, content = header["terms"], tensors[_DOCUMENT]
        if content.dtype != np.uint8 or content.ndim != 1:
            raise ValueError("document")
    except (ProtocolError, KeyError, ValueError, TypeError) as error:
        raise PlanRefused(f"The {purpose} is not signed; the device acts only on signed ones.") from error
    if signer not in trusted:
        raise PlanRefused(f"The {purpose} is signed by {signer.hex()[:12]}, whom this device does not trust.")
    document = content.tobytes()
    try:
        Ed25519PublicKey.from_public_bytes(signer).verify(signature, _message(purpose, said, document))
        return document, None if said is None else Terms.model_validate(said)
    except (InvalidSignature, ValueError) as error:
        raise PlanRefused(f"The signature does not fit the {purpose}; it was changed on its way.") from error


def _message(purpose: str, terms: Any, document: bytes) -> bytes:
    return f"fedrec|{wire.VERSION}|{purpose}|{json.dumps(terms, sort_keys=True)}|".encode() + document


@dataclass(frozen=True, eq=False)
class DeviceRelease:
    """What a device needs to recommend: the model and its items.

    Attributes:
        version: number of the release in its registry.
        model: settings of the model.
        params: its parameters.
        catalog: the items that it knows.
    """

    version: int
    model: AnyModelConfig
    params: dict[str, Array]
    catalog: ItemCatalog

    def to_bytes(self) -> bytes:
        """Return the release in the wire format."""
        header = {
            "version": self.version,
            "model": self.model.model_dump(mode="json"),
            "catalog": self.catalog.to_json(),
        }
        return wire.pack(_RELEASE, header, self.params)

    @classmethod
    def from_bytes(cls, document: bytes) -> DeviceRelease:
        """Return the release that `to_bytes` wrote.

        Raises:
            ProtocolError: it is malformed, or its parameters do not fit its model.
        """
        header, params = wire.unpack(_RELEASE, document)
        try:
            found = _ReleaseHeader.model_validate(header)
            catalog = ItemCatalog.from_json(found.catalog)
        except (ValidationError, ValueError, KeyError, TypeError, AttributeError, FedrecError) as error:
            raise ProtocolError(f"The release is malformed: {error}") from error
        check_params(found.model, len(catalog), params)
        return cls(found.version, found.model, params, catalog)


class _ReleaseHeader(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    version: int = Field(ge=0)
    model: ModelConfig
    catalog: str
