"""Named tensors: what a model is, what a client sends, what a server adds up.

`Params` maps a name to a NumPy array. NumPy, not torch, because the wire, the registry and a device without torch all
handle them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Params = Mapping[str, Array]


def add(a: Params, b: Params, scale: float = 1.0) -> dict[str, Array]:
    """Return ``a + scale * b``, name by name, in the dtype of `a`."""
    return {name: (a[name] + scale * b[name]).astype(a[name].dtype, copy=False) for name in a}


def scale(a: Params, factor: float) -> dict[str, Array]:
    """Return ``factor * a``, name by name, in the dtype of `a`."""
    return {name: (value * factor).astype(value.dtype, copy=False) for name, value in a.items()}


def norm(a: Params) -> float:
    """Return the L2 norm of all tensors taken as one vector, computed in float64."""
    return float(np.sqrt(sum(float(np.sum(np.square(value, dtype=np.float64))) for value in a.values())))


def non_finite(a: Params) -> list[str]:
    """Return the names of tensors that hold a NaN or an infinity."""
    return [name for name, value in a.items() if value.dtype.kind == "f" and not bool(np.isfinite(value).all())]


def n_bytes(a: Params) -> int:
    """Return the size of all tensors in bytes."""
    return sum(value.nbytes for value in a.values())


def n_values(a: Params) -> int:
    """Return how many numbers the tensors hold."""
    return sum(value.size for value in a.values())


def digest(a: Params) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes, in hexadecimal; equal tensors have equal digests."""
    state = hashlib.sha256()
    for name in sorted(a):
        value = np.asarray(a[name], order="C")
        state.update(f"{name}|{value.dtype.str}|{value.shape}|".encode())
        state.update(value.tobytes())
    return state.hexdigest()


def same_shapes(a: Params, b: Params) -> bool:
    """Return whether `a` and `b` have the same names, shapes and dtypes."""
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and a[n].dtype == b[n].dtype for n in a)


class Accumulator:
    """A running sum of named tensors in float64, so that the order of adding does not show in float32.

    >>> total = Accumulator(); total.fold({"w": np.ones(2, np.float32)}); total.fold({"w": np.ones(2, np.float32)})
    >>> total.value()["w"].tolist()
    [2.0, 2.0]
    """

    def __init__(self) -> None:
        """Start an empty sum."""
        self._sums: dict[str, Array] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}

    def fold(self, a: Params, names: Iterable[str] | None = None) -> None:
        """Add `a` (only `names`, if given) to the sum."""
        for name in a if names is None else names:
            value = a[name]
            if name in self._sums:
                self._sums[name] += value
            else:
                wide = np.float64 if value.dtype.kind == "f" else np.int64
                self._sums[name] = value.astype(wide)
                self._dtypes[name] = value.dtype

    def value(self) -> dict[str, Array]:
        """Return the sum in the dtypes that came in; empty if nothing was folded."""
        return {name: total.astype(self._dtypes[name]) for name, total in self._sums.items()}
