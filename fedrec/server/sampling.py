"""Who takes part in a round."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedrec.learning import FixedCohort, PoissonCohort, TurnCohort
from fedrec.random import Key


def sample(cohort: PoissonCohort | FixedCohort | TurnCohort, n_eligible: int, key: Key) -> NDArray[np.int64]:
    """Return the sorted places of the chosen clients among all eligible ones.

    Poisson: each takes part with probability ``min(1, expected / n_eligible)``, independently; the cohort may be empty.
    Turns: everybody, for only the clients know whose turn it is (`protocol.task.Turn`).
    Fixed: exactly ``min(size, n_eligible)``, every set equally likely.
    """
    if isinstance(cohort, TurnCohort):
        return np.arange(n_eligible, dtype=np.int64)
    u = key.uniforms(np.arange(n_eligible, dtype=np.int64), 1)[:, 0]
    if isinstance(cohort, PoissonCohort):
        return np.flatnonzero(u < cohort.expected / max(n_eligible, 1))
    if cohort.size >= n_eligible:
        return np.arange(n_eligible, dtype=np.int64)
    # The smallest numbers win; a partition finds them without sorting everybody.
    bound = np.partition(u, cohort.size - 1)[cohort.size - 1]
    below, level = np.flatnonzero(u < bound), np.flatnonzero(u == bound)
    return np.sort(np.concatenate((below, level[: cohort.size - len(below)])))
