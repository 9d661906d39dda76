"""Masks that cancel in a sum: key agreement, key streams, sealed letters, and secrets cut into shares.

Numbers are added in the ring of 32- or 64-bit unsigned integers, where a uniform mask hides any number completely.

Source: Bonawitz et al., CCS 2017 (the protocol, in `fedrec.client.secure` and `fedrec.server.secure`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import MaskingError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

KEY_BYTES = 32
PRIME = 2**256 + 297
"""The smallest prime above 2^256: a 32-byte secret is one number of its field."""
SHARE_BYTES = 33
NONCE_BYTES, TAG_BYTES = 12, 16
_SPARE = 16
"""More random bytes than a coefficient has, so that the remainder is uniform to 2^-128."""

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


def split(secret: bytes, points: Sequence[int], threshold: int) -> list[bytes]:
    """Cut a secret into shares, one for each point, any `threshold` of which give it back and fewer tell nothing.

    Args:
        secret: 32 bytes.
        points: distinct numbers above 0 that name the holders.
        threshold: how many shares it takes.

    Returns:
        33 bytes for each point: the value there of a random polynomial of degree ``threshold - 1`` over the field.

    Raises:
        MaskingError: points are repeated or not above 0, or there are fewer than the threshold.

    Source: Shamir, Communications of the ACM 22(11), 1979.
    """
    if len(set(points)) != len(points) or min(points, default=0) < 1:
        raise MaskingError("Shares need distinct holders, numbered from 1.")
    if not 1 <= threshold <= len(points):
        raise MaskingError(f"{len(points)} shares cannot need {threshold} to be put together.")
    width = SHARE_BYTES + _SPARE
    random = os.urandom(width * (threshold - 1))
    falling = [int.from_bytes(random[at : at + width], "little") % PRIME for at in range(0, len(random), width)]
    falling.append(int.from_bytes(secret, "little"))
    shares = []
    for point in points:
        value = 0
        for coefficient in falling:  # points are small, so one reduction at the end is quicker than one at each step
            value = value * point + coefficient
        shares.append((value % PRIME).to_bytes(SHARE_BYTES, "little"))
    return shares


def join(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of exactly as many shares as its threshold, by point.

    Whether they belonged together shows only in what the secret must match: a public key, a commitment.

    Raises:
        MaskingError: a share is no number of the field, or together they give none of 32 bytes.
    """
    points = list(shares)
    if not points or len({point % PRIME for point in points}) != len(points):
        raise MaskingError("There are no shares, or two of one holder.")
    total = 0
    for point, share in shares.items():
        value = int.from_bytes(share, "little")
        if len(share) != SHARE_BYTES or value >= PRIME:
            raise MaskingError(f"The share of holder {point - 1} is not one.")
        above, below = 1, 1
        for other in points:
            if other != point:
                above *= other
                below *= other - point
        total += value * (above % PRIME) * pow(below % PRIME, -1, PRIME)
    total %= PRIME
    if total >> (8 * KEY_BYTES):
        raise MaskingError("Shares do not belong together; a holder gave a wrong one.")
    return total.to_bytes(KEY_BYTES, "little")


def _context(purpose: str, session: str, *parties: int) -> bytes:
    return "|".join(("fedrec secure sum 1", purpose, session, *map(str, parties))).encode()
