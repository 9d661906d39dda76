"""What a client does against forgetting, on its own data: it rehearses older interactions of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedrec.data.batches import Cohort, histories
from fedrec.protocol.task import LocalTraining
from fedrec.random import Key

if TYPE_CHECKING:
    from fedrec.models.recommender import Recommender


def rehearsing(cohort: Cohort, local: LocalTraining, key: Key, shares: NDArray[np.float64] | None = None) -> Cohort:
    """Return the cohort for one local step: some clients look at what they did before the window instead.

    A client with older interactions does so with the probability that `replay_shares` gives, and then learns from the
    newest ``local.replay_budget`` of them: they are its window in this step. Nobody else's data is touched and nothing
    more is sent, so a clipped update bounds the client's influence as before.

    Args:
        cohort: the clients and their windows.
        local: the budget.
        key: of this step; what a client draws depends on its own number only.
        shares: [c] probabilities; None: ``local.replay`` for everybody.
    """
    if not local.replay:
        return cohort
    likely = local.replay if shares is None else shares
    chosen = (key.child("replay").uniforms(cohort.ids, 1)[:, 0] < likely) & (cohort.low > 0)
    low = np.where(chosen, np.maximum(cohort.low - local.replay_budget, 0), cohort.low)
    return replace(cohort, low=low, high=np.where(chosen, cohort.low, cohort.high))


def replay_shares(cohort: Cohort, model: Recommender, local: LocalTraining) -> NDArray[np.float64] | None:
    """Return [c] with what probability each client rehearses: less where its taste has moved; None: alike for all.

    With u the vector that the received model makes of what lies before the window, and v of all up to the window's end,
    the probability is ``replay * max(0, cos(u, v))``.

    Source: the adaptive replay memory of Lim et al., CIKM 2025 (F3CRec), re-implemented from the idea; there the old
    preferences are the old model's lists, here they are the person's own older interactions.
    """
    if not (local.replay and local.replay_by_shift):
        return None
    import torch

    parts = []
    for end in (cohort.low, cohort.high):
        known = histories(cohort, end, model.spec)
        with torch.no_grad():
            users = model.encode(torch.from_numpy(known.items), torch.from_numpy(np.ascontiguousarray(known.mask)))
        parts.append(users.double().numpy())
    u, v = parts
    lengths = np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1)
    cosine = (u * v).sum(axis=1) / np.where(lengths > 0, lengths, np.inf)
    return np.asarray(local.replay * np.maximum(0.0, cosine))
