"""Bounding what one client contributes: finite first, then the norm of all its tensors together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def clip_factors(norms: NDArray[np.floating], bound: float | None) -> NDArray[np.float32]:
    """Return what to multiply each client's contribution by.

    ``f = min(1, C / |x|)``, and 0 where the norm is not finite: such a client is left out, for NaN passes ``|x| > C``.

    Args:
        norms: [c] L2 norms of whole contributions.
        bound: C; None: only the finite check.

    Source: McMahan et al., ICLR 2018, section 2 (flat clipping).

    >>> clip_factors(np.array([0.5, 4.0, np.nan]), 2.0).tolist()
    [1.0, 0.5, 0.0]
    """
    finite: NDArray[np.bool_] = np.isfinite(norms)
    if bound is None:
        return finite.astype(np.float32)
    longer = np.maximum(np.where(finite, norms, bound), bound)
    factors: NDArray[np.float32] = np.where(finite, bound / longer, 0.0).astype(np.float32)
    return factors
