"""Signed documents: a device acts only on what somebody signed whose public key it was given.

An Ed25519 signature covers the purpose, the terms and the document, so that a signed plan never passes for a signed
release and its terms cannot be exchanged.

Source: Josefsson and Liusvaara, RFC 8032.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedrec.data.catalog import ItemCatalog
from fedrec.errors import ConfigError, FedrecError, PlanRefused, ProtocolError
from fedrec.models.configs import AnyModelConfig, ModelConfig
from fedrec.models.portable import check_params
from fedrec.params import Array
from fedrec.protocol import wire

if TYPE_CHECKING:
    from fedrec.privacy.terms import Terms as SecureTerms

Purpose = Literal["plan", "release", "phase"]
_ENVELOPE, _DOCUMENT, _RELEASE = "signed", "document", "device-release"


class Terms(BaseModel):
    """What the signer promises about a plan."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", allow_inf_nan=False)
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
    nonce: str = Field(pattern="^[0-9a-f]{32}$")
    """Random, another one each time that something is asked; a device answers each once."""
    secure: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """`digest_of` the terms of the masked sum that the plan belongs to; None: what the device sends is not masked."""


def public_key(key: Ed25519PrivateKey) -> bytes:
    """Return the 32 bytes that verify what `key` signs."""
    return key.public_key().public_bytes_raw()


def digest_of(terms: SecureTerms) -> str:
    """Return the SHA-256 of the terms of a masked sum, in hexadecimal."""
    return hashlib.sha256(json.dumps(terms.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def write_key(path: Path) -> Ed25519PrivateKey:
    """Draw a signing key and keep it in a new file of mode 0600.

    Raises:
        ConfigError: there is one already, or the file cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"'{path}' exists already; devices trust the key in it, so it is not replaced.") from error
    except OSError as error:
        raise ConfigError(f"Cannot write the signing key '{path}': {error.strerror}.") from error
    return key


def read_key(path: Path) -> Ed25519PrivateKey:
    """Return the Ed25519 key in a PEM file.

    Raises:
        ConfigError: it cannot be read, or is no Ed25519 key.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"Cannot read a key from '{path}'; `fedrec releases key` makes one.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"The key in '{path}' is not an Ed25519 key; `fedrec releases key` makes one.")
    return key


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


def opened(document: bytes) -> bytes:
    """Return what a signed envelope holds, its signature unchecked, or the document itself if it is in none.

    For nodes that trust the server whom they are connected to; a device uses `verify`.

    Raises:
        ProtocolError: the envelope is malformed.
    """
    if wire.kind_of(document) != _ENVELOPE:
        return document
    _, tensors = wire.unpack(_ENVELOPE, document)
    content = tensors.get(_DOCUMENT)
    if content is None or content.dtype != np.uint8 or content.ndim != 1:
        raise ProtocolError("A signed envelope holds no document.")
    return content.tobytes()


def _message(purpose: str, terms: Any, document: bytes) -> bytes:
    return f"fedrec|{wire.VERSION}|{purpose}|{json.dumps(terms, sort_keys=True)}|".encode() + document


@dataclass(frozen=True, eq=False)
class DeviceRelease:
    """What a device needs to recommend: the model and its items.

    Attributes:
        version: number of the release in its registry.
        model: settings of the model.
        params: its parameters.
        catalog: the items, in the numbering that plans use.
        n_items: the model knows so many of them, from the first; None: all.
    """

    version: int
    model: AnyModelConfig
    params: dict[str, Array]
    catalog: ItemCatalog
    n_items: int | None = None

    @property
    def n_known(self) -> int:
        """How many items the model scores."""
        return len(self.catalog) if self.n_items is None else self.n_items

    def to_bytes(self) -> bytes:
        """Return the release in the wire format."""
        header = {
            "version": self.version,
            "model": self.model.model_dump(mode="json"),
            "catalog": self.catalog.to_json(),
            "n_items": self.n_items,
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
        if found.n_items is not None and found.n_items > len(catalog):
            raise ProtocolError("The release is malformed: its model knows more items than its catalogue.")
        release = cls(found.version, found.model, params, catalog, found.n_items)
        check_params(found.model, release.n_known, params)
        return release


class _ReleaseHeader(BaseModel):
    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    version: int = Field(ge=0)
    model: ModelConfig
    catalog: str
    n_items: int | None = Field(default=None, ge=1)
