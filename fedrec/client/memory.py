"""What a client does against forgetting, on its own data: it rehearses older interactions of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedrec.data.batches import Cohort
from fedrec.protocol.task import LocalTraining
from fedrec.random import Key


def rehearsing(cohort: Cohort, local: LocalTraining, key: Key) -> Cohort:
    """Return the cohort for one local step: some clients look at what they did before the window instead.

    A client with older interactions does so with probability ``local.replay``, and then learns from the newest
    ``local.replay_budget`` of them: they are its window in this step. Nobody else's data is touched and nothing more
    is sent, so a clipped update bounds the client's influence as before.

    Args:
        cohort: the clients and their windows.
        local: share and budget.
        key: of this step; what a client draws depends on its own number only.
    """
    if not local.replay:
        return cohort
    chosen = (key.child("replay").uniforms(cohort.ids, 1)[:, 0] < local.replay) & (cohort.low > 0)
    low = np.where(chosen, np.maximum(cohort.low - local.replay_budget, 0), cohort.low)
    return replace(cohort, low=low, high=np.where(chosen, cohort.low, cohort.high))
