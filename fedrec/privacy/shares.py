"""Secrets of 32 bytes cut into shares, any threshold of which give them back and fewer tell nothing.

A secret is sixteen numbers of 16 bits, each shared by a random polynomial over the field of a prime of 20 bits; so
small a field makes both directions matrix products.

Source: Shamir, Communications of the ACM 22(11), 1979.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import MaskingError

SECRET_BYTES = 32
PRIME = 2**20 - 3
"""The largest prime below 2^20; holders are numbered below it."""
SHARE_BYTES = 40
"""Sixteen numbers of 20 bits: first all lower 16 bits, then the upper four in pairs."""
_LIMBS = 16
_EXACT = 4096
"""So many products of two numbers below 2^20 add up exactly in float64."""

Bytes = NDArray[np.uint8]
_Field = NDArray[np.uint64]


def split(secrets: Sequence[bytes], points: Sequence[int], threshold: int) -> Bytes:
    """Cut each secret into shares, one for each point.

    Args:
        secrets: of 32 bytes each.
        points: distinct numbers above 0 that name the holders.
        threshold: how many shares it takes.

    Returns:
        [s, n, SHARE_BYTES]: the values there of random polynomials of degree ``threshold - 1``.

    Raises:
        MaskingError: points are repeated or not from 1 to ``PRIME - 1``, or there are fewer than the threshold.
    """
    if len(set(points)) != len(points) or min(points, default=0) < 1 or max(points) >= PRIME:
        raise MaskingError(f"Shares need distinct holders, numbered from 1 to {PRIME - 1:,}.")
    if not 1 <= threshold <= len(points):
        raise MaskingError(f"{len(points)} shares cannot need {threshold} to be put together.")
    constant = np.frombuffer(b"".join(secrets), "<u2").astype(np.uint64)
    coefficients = np.concatenate([constant[None], _uniform(threshold - 1, len(constant))])
    powers = _powers(np.array(points, np.uint64), threshold)
    values = np.zeros((len(points), len(constant)), np.uint64)
    for at in range(0, threshold, _EXACT):
        part = powers[:, at : at + _EXACT].astype(np.float64) @ coefficients[at : at + _EXACT].astype(np.float64)
        values = (values + part.astype(np.uint64)) % PRIME
    return _packed(values.reshape(len(points), len(secrets), _LIMBS).transpose(1, 0, 2))


def join(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of exactly as many shares as its threshold, by point.

    Whether they belonged together shows only in what the secret must match: a public key, a commitment.

    Raises:
        MaskingError: a share is no numbers of the field, or together they give no secret.
    """
    points = list(shares)
    if not points or min(points) < 1 or max(points) >= PRIME:
        raise MaskingError(f"There are no shares, or holders are not numbered from 1 to {PRIME - 1:,}.")
    if any(len(share) != SHARE_BYTES for share in shares.values()):
        raise MaskingError(f"A share has not the {SHARE_BYTES} bytes of one.")
    values = _unpacked(np.frombuffer(b"".join(shares.values()), np.uint8).reshape(-1, SHARE_BYTES))
    if (values >= PRIME).any():
        raise MaskingError("A share is no numbers of the field.")
    found = (_at_zero(np.array(points, np.uint64))[:, None] * values % PRIME).sum(axis=0) % PRIME
    if (found >> np.uint64(16)).any():
        raise MaskingError("Shares do not belong together; a holder gave a wrong one.")
    secret: bytes = found.astype("<u2").tobytes()
    return secret


def _uniform(rows: int, columns: int) -> _Field:
    """Return [rows, columns] uniform numbers of the field: 20 random bits, drawn again where they are none."""
    size = rows * columns
    found = np.zeros(0, np.uint32)
    while len(found) < size:
        drawn = np.frombuffer(os.urandom(4 * (size - len(found) + 8)), np.uint32) & np.uint32(2**20 - 1)
        found = np.concatenate([found, drawn[drawn < PRIME]])
    return found[:size].astype(np.uint64).reshape(rows, columns)


def _powers(points: _Field, n: int) -> _Field:
    """Return [p, n] the powers 0 to n - 1 of each point."""
    found = np.ones((len(points), n), np.uint64)
    done, step = 1, points.copy()  # step is the power `done`
    while done < n:
        width = min(done, n - done)
        found[:, done : done + width] = found[:, :width] * step[:, None] % PRIME
        step = step * step % PRIME
        done *= 2
    return found


def _at_zero(points: _Field) -> _Field:
    """Return the weights with which values at the points give the value at 0: Lagrange's."""
    above = np.broadcast_to(points, (len(points), len(points))).copy()
    below = (points[None, :] + np.uint64(PRIME) - points[:, None]) % np.uint64(PRIME)
    np.fill_diagonal(above, 1)
    np.fill_diagonal(below, 1)
    return _product(above) * _inverse(_product(below)) % PRIME


def _product(rows: _Field) -> _Field:
    """Return the product of each row."""
    while rows.shape[1] > 1:
        odd, half = rows.shape[1] % 2, rows.shape[1] // 2
        paired = rows[:, :half] * rows[:, half : 2 * half] % PRIME
        rows = np.concatenate([paired, rows[:, -1:]], axis=1) if odd else paired
    return rows[:, 0]


def _inverse(values: _Field) -> _Field:
    """Return what each value has the product 1 with, by Fermat's little theorem."""
    found, power, left = np.ones_like(values), values, PRIME - 2
    while left:
        if left & 1:
            found = found * power % PRIME
        power, left = power * power % PRIME, left >> 1
    return found


def _packed(values: _Field) -> Bytes:
    low = (values & np.uint64(0xFFFF)).astype("<u2").view(np.uint8)
    high = (values >> np.uint64(16)).astype(np.uint8)
    return np.concatenate([low, high[..., 0::2] | high[..., 1::2] << np.uint8(4)], axis=-1)


def _unpacked(shares: Bytes) -> _Field:
    low = np.ascontiguousarray(shares[:, : 2 * _LIMBS]).view("<u2").astype(np.uint64)
    high = np.zeros((len(shares), _LIMBS), np.uint64)
    high[:, 0::2], high[:, 1::2] = shares[:, 2 * _LIMBS :] & 15, shares[:, 2 * _LIMBS :] >> 4
    return low | high << np.uint64(16)
