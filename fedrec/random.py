"""Randomness that is a function of who asks and why, never of the order of asking.

A `Key` names a stream of random numbers. Children are derived by hashing names, so the numbers that client 17 sees in
round 3 are the same whether it runs alone, in a batch of a thousand, on Ray or on a phone, and a resumed run sees what
an uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Key:
    """A 32-byte name of a stream of random numbers.

    >>> Key.from_seed(1).child("round", 3) == Key.from_seed(1).child("round", 3)
    True
    >>> Key.from_seed(1).child("round", 3) == Key.from_seed(1).child("round", 4)
    False
    """

    data: bytes

    @classmethod
    def from_seed(cls, seed: int) -> Key:
        """Return the root key of an integer seed."""
        return cls(hashlib.blake2b(f"fedrec/{seed}".encode(), digest_size=32).digest())

    @classmethod
    def from_hex(cls, text: str) -> Key:
        """Return the key that `hex` printed.

        Raises:
            ValueError: not 64 hexadecimal digits.
        """
        data = bytes.fromhex(text)
        if len(data) != 32:
            raise ValueError(f"a key has 32 bytes, not {len(data)}")
        return cls(data)

    def hex(self) -> str:
        """Return the key as 64 hexadecimal digits."""
        return self.data.hex()

    def child(self, *names: str | int) -> Key:
        """Return the key of a sub-stream; `names` are its path (a purpose, a round, a client)."""
        data = self.data
        for name in names:
            tag = f"str:{name}" if isinstance(name, str) else f"int:{index(name)}"  # a NumPy integer counts as an int
            data = hashlib.blake2b(tag.encode(), key=data, digest_size=32).digest()
        return Key(data)

    def integer(self) -> int:
        """Return one non-negative integer below 2**63, for seeding another generator."""
        return int.from_bytes(self.data[:8], "little") >> 1

    def numpy(self) -> np.random.Generator:
        """Return a NumPy generator of this stream, at its start."""
        import numpy as np

        return np.random.Generator(np.random.Philox(key=int.from_bytes(self.data[:16], "little")))

    def uniforms(self, entities: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
        """Return `draws` uniform numbers in [0, 1) for each entity, at once and independently of the others.

        A counter-based generator: draw j of entity e is a hash of (key, e, j), so a batch of entities sees exactly what
        each of them alone would have seen.

        Args:
            entities: [n] whole numbers that name the entities (client numbers, item numbers).
            draws: how many numbers each gets.

        Returns:
            [n, draws] numbers with 53 random bits.

        Source: the finaliser of SplitMix64, Steele et al., OOPSLA 2014, figure 16, applied twice.
        """
        found: NDArray[np.float64] = uniforms_of([self], entities, draws)[0]
        return found

    def bits(self, entities: NDArray[np.int64], draws: int) -> NDArray[np.uint64]:
        """Return `draws` unsigned 64-bit random numbers for each of the [n] entities: [n, draws]. See `uniforms`."""
        numbers: NDArray[np.uint64] = bits_of([self], entities, draws)[0]
        return numbers


def bits_of(keys: Sequence[Key], entities: NDArray[np.int64], draws: int) -> NDArray[np.uint64]:
    """Return what ``key.bits(entities, draws)`` returns for each of k keys, in one computation: [k, n, draws]."""
    import numpy as np

    with np.errstate(over="ignore"):
        seeds = np.array([int.from_bytes(key.data[:8], "little") for key in keys], np.uint64)
        streams = _mix(seeds[:, None] + np.asarray(entities).astype(np.uint64) * np.uint64(_GOLDEN))
        counters = (np.arange(1, draws + 1, dtype=np.uint64)) * np.uint64(_GOLDEN)
        numbers: NDArray[np.uint64] = _mix(streams[..., None] + counters)
        return numbers


def uniforms_of(keys: Sequence[Key], entities: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """Return what ``key.uniforms(entities, draws)`` returns for each of k keys: [k, n, draws]."""
    numbers = bits_of(keys, entities, draws)
    numbers >>= 11
    found: NDArray[np.float64] = numbers.astype("float64")
    found *= 1.0 / (1 << 53)
    return found


def _mix(z: Any) -> Any:
    """Scramble `z` in place and return it."""
    import numpy as np

    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
