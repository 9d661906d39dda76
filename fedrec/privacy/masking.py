"""Masks that cancel in a sum: key agreement, key streams, sealed letters; secrets cut into shares are in `shares`.

Numbers are added in the ring of 32- or 64-bit unsigned integers, where a uniform mask hides any number completely.

Source: Bonawitz et al., CCS 2017 (the protocol, in `fedrec.client.secure` and `fedrec.server.secure`).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import MaskingError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

KEY_BYTES = 32
NONCE_BYTES, TAG_BYTES = 12, 16

Ring = NDArray[np.uint32] | NDArray[np.uint64]


@dataclass(frozen=True)
class KeyPair:
    """An X25519 key pair, used in one session only; its secret half is never printed."""

    private: bytes
    public: bytes

    @classmethod
    def generate(cls) -> KeyPair:
        """Return a new pair from the operating system's generator."""
        return cls.from_private(os.urandom(KEY_BYTES))

    @classmethod
    def from_private(cls, private: bytes) -> KeyPair:
        """Return the pair of a private key."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        return cls(private, X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw())

    @cached_property
    def _parsed(self) -> X25519PrivateKey:
        """The private key as the library wants it, which costs as much as an agreement."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        return X25519PrivateKey.from_private_bytes(self.private)

    def __repr__(self) -> str:
        """Return the public half only."""
        return f"KeyPair(public={self.public.hex()})"

    def agree(self, public: bytes) -> bytes:
        """Return the 32 bytes that only this pair and the other one can compute.

        Raises:
            MaskingError: the other key is one of the few that force a known result.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        try:
            return self._parsed.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise MaskingError(f"A client advertised a key that nobody can agree with: {error}.") from error


def derive(secret: bytes, purpose: str, session: str, *parties: int) -> bytes:
    """Return a 32-byte key for one purpose of one session, by HKDF-SHA256; `parties` in the order that matters."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), KEY_BYTES, None, _context(purpose, session, *parties)).derive(secret)


def seed_of(root: bytes, session: str, party: int) -> bytes:
    """Return the seed of a party's own mask, which follows from its root; the root does not follow from it."""
    return derive(root, "own seed", session, party)


def noise_key(root: bytes, session: str, party: int) -> bytes:
    """Return the key of the part of a party's noise that may be taken off, which follows from its root."""
    return derive(root, "extra noise", session, party)


def commitment(session: str, party: int, seed: bytes) -> bytes:
    """Return 32 bytes that bind a party to its random seed and tell nothing of it."""
    return hashlib.sha256(_context("seed", session, party) + seed).digest()


def seal(key: bytes, letter: bytes, session: str, sender: int, receiver: int) -> bytes:
    """Return a letter that only the holder of the key can read or change, by AES-256-GCM with a random nonce."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, letter, _context("letter", session, sender, receiver))


def unseal(key: bytes, sealed: bytes, session: str, sender: int, receiver: int) -> bytes:
    """Return the letter that `seal` closed.

    Raises:
        MaskingError: it was changed, or is for another session, sender or receiver.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    context = _context("letter", session, sender, receiver)
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context)
    except InvalidTag as error:
        raise MaskingError(f"The shares from client {sender} to {receiver} were changed on their way.") from error


def keystream(key: bytes, n: int, dtype: np.dtype[np.uint32] | np.dtype[np.uint64]) -> Ring:
    """Return n uniform numbers of the ring: the ChaCha20 stream of a key that is used for nothing else."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    data = stream.update(bytes(n * dtype.itemsize))
    if dtype == np.uint32:
        return np.frombuffer(data, "<u4").astype(np.uint32, copy=False)
    return np.frombuffer(data, "<u8").astype(np.uint64, copy=False)


def add_mask(total: Ring, key: bytes, sign: int) -> None:
    """Add the key's stream to `total` in place, or subtract it if `sign` is negative; the ring wraps around."""
    operation = np.add if sign > 0 else np.subtract
    operation(total, keystream(key, len(total), total.dtype), out=total)


def _context(purpose: str, session: str, *parties: int) -> bytes:
    return "|".join(("fedrec secure sum 1", purpose, session, *map(str, parties))).encode()
