"""Where noise comes from: the operating system, or a seed where a simulation must be repeatable."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedrec.random import Key

Shape = Sequence[int]
_BLOCK = 16_384
Uniforms = Callable[[int], NDArray[np.float64]]
"""Gives so many independent numbers in (0, 1], with 53 random bits each."""


class NoiseSource(Protocol):
    """A source of noise; `label` is what a report says of it."""

    label: str

    def normal(self, shape: Shape) -> NDArray[np.float64]:
        """Return independent standard normal numbers."""
        ...

    def discrete_gaussian(self, sigma: float, shape: Shape) -> NDArray[np.int64]:
        """Return whole numbers with probability proportional to ``exp(-x^2 / (2 sigma^2))``."""
        ...


class SecureNoise:
    """Noise that nobody can repeat: a ChaCha20 stream keyed anew for every call by the operating system's generator.

    Each normal number is the sum of two that come from different draws, scaled: the set of floating-point numbers that
    one Box-Muller draw can hit betrays what it was added to. That answers the known attack, it is no proof; noise over
    whole numbers, as mode "distributed" uses it, needs none.

    Source: Mironov, CCS 2012 (the attack); Holohan and Braghin, ESORICS 2021 (sums of normals).
    """

    label = "operating system"

    def normal(self, shape: Shape) -> NDArray[np.float64]:
        """Return independent standard normal numbers."""
        return box_muller(system_uniforms, shape)

    def discrete_gaussian(self, sigma: float, shape: Shape) -> NDArray[np.int64]:
        """Return discrete Gaussian numbers."""
        return discrete_gaussian(KeyStream(os.urandom(32)), sigma, shape)


class SeededNoise:
    """Noise from a key: the same for whoever holds the key, so it protects nobody from them. For simulations only."""

    label = "seed (simulation: protects nobody)"

    def __init__(self, key: Key) -> None:
        """Start the stream that `key` names; each call goes on in it."""
        self._generator = key.numpy()

    def normal(self, shape: Shape) -> NDArray[np.float64]:
        """Return independent standard normal numbers."""
        return self._generator.standard_normal(tuple(shape))

    def discrete_gaussian(self, sigma: float, shape: Shape) -> NDArray[np.int64]:
        """Return discrete Gaussian numbers."""
        return discrete_gaussian(lambda n: 1.0 - self._generator.random(n), sigma, shape)


class KeyStream:
    """Uniform numbers in (0, 1] from the ChaCha20 stream of a key of 32 bytes that is used for nothing else."""

    def __init__(self, key: bytes) -> None:
        """Start the stream; each call goes on in it."""
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def __call__(self, n: int) -> NDArray[np.float64]:
        """Return the next n numbers."""
        bits = np.frombuffer(self._stream.update(bytes(8 * n)), np.uint64)
        return ((bits >> np.uint64(11)).astype(np.float64) + 1.0) * (1.0 / (1 << 53))


class KeyedNoise:
    """The noise of `SecureNoise` from a secret key instead, so that whoever has the key can make it again."""

    label = "secret key"

    def __init__(self, key: Key) -> None:
        """Start the stream that `key` names; each call goes on in it."""
        self._key = key
        self._calls = 0

    def normal(self, shape: Shape) -> NDArray[np.float64]:
        """Return independent standard normal numbers."""
        return box_muller(self._uniforms, shape)

    def discrete_gaussian(self, sigma: float, shape: Shape) -> NDArray[np.int64]:
        """Return discrete Gaussian numbers."""
        return discrete_gaussian(self._uniforms, sigma, shape)

    def _uniforms(self, n: int) -> NDArray[np.float64]:
        self._calls += 1
        return keyed_uniforms(self._key.child("call", self._calls).data, n)


def system_uniforms(n: int) -> NDArray[np.float64]:
    """Return n numbers in (0, 1] from a ChaCha20 stream that is keyed by the operating system and used once."""
    return keyed_uniforms(os.urandom(32), n)


def keyed_uniforms(key: bytes, n: int) -> NDArray[np.float64]:
    """Return the first n numbers of a `KeyStream`."""
    return KeyStream(key)(n)


def box_muller(uniforms: Uniforms, shape: Shape) -> NDArray[np.float64]:
    """Return independent standard normal numbers, each the scaled sum of two from different draws."""
    size = math.prod(shape)
    if size == 1:
        u = uniforms(4)
        pair = np.sqrt(-2.0 * np.log(u[:2])) * np.cos((2.0 * math.pi) * u[2:])
        return np.asarray(pair.sum() * math.sqrt(0.5)).reshape(tuple(shape))
    u = uniforms(2 * size)
    radius = np.sqrt(-2.0 * np.log(u[:size]))
    angle = (2.0 * math.pi) * u[size:]
    # Sines are handed on by one place: each number has its sine and its cosine from two draws, and uses each once.
    total = radius * np.cos(angle) + np.roll(radius * np.sin(angle), 1)
    scaled: NDArray[np.float64] = (total * math.sqrt(0.5)).reshape(tuple(shape))
    return scaled


def discrete_gaussian(uniforms: Uniforms, sigma: float, shape: Shape) -> NDArray[np.int64]:
    """Return discrete Gaussian numbers by rejection from a discrete Laplace distribution.

    Probabilities are right to some 2^-53, the resolution of the uniform numbers; the paper's exact rational sampler
    would be a thousand times slower.

    Args:
        uniforms: where randomness comes from.
        sigma: the parameter; the standard deviation is at most this, and as good as this from 1 on.
        shape: of the result.

    Source: Canonne, Kamath and Steinke, NeurIPS 2020, algorithm 3.
    """
    size = math.prod(shape)
    t = math.floor(sigma) + 1
    found = np.empty(size, np.int64)
    done = 0
    while done < size:
        n = min(_BLOCK, int((size - done) * 1.34) + 64)  # of four candidates three are kept
        u = uniforms(2 * n).reshape(2, n)
        # A geometric number with a random sign is discrete Laplace of scale t, if one of the two zeros is left out.
        size_of = np.floor(np.log(u[0]) * -t)
        negative = u[1] > 0.5
        chance = 2.0 * u[1] - negative
        bias = (size_of - sigma**2 / t) ** 2 / (2.0 * sigma**2)
        wanted = (chance <= np.exp(-bias)) & ~(negative & (size_of == 0))
        kept = np.where(negative, -size_of, size_of)[wanted][: size - done]
        found[done : done + len(kept)] = kept.astype(np.int64)
        done += len(kept)
    return found.reshape(tuple(shape))
