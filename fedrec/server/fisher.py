"""How much each parameter matters to people: the diagonal of the Fisher information, gathered as a task of its own.

The pull that it weighs is the server's (`fedrec.server.anchor.pulled`): it is the same for every client, so on a client
it would only be downloaded, clipped and noised. What has to come from clients is the importance alone, once a slice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedrec import params as named
from fedrec.models.build import trained
from fedrec.models.freeze import trainable
from fedrec.params import Array, Params
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import FisherTask
from fedrec.server.gather import Ask, gather
from fedrec.server.private import private_gather
from fedrec.server.round import take_census
from fedrec.server.state import ServerState
from fedrec.server.work import Work


def weigh(work: Work) -> Work:
    """Ask everybody in the last slice what matters of the last release, and add it to what mattered before.

    Only where `training.ewc` wants it, and before a slice begins.

    Raises:
        BudgetExhausted: a private run cannot pay for it; nothing was sent.
        RunError: every node that was asked failed.
    """
    state, before, recipe = work.state, work.before, work.recipe
    settings = recipe.experiment.training.ewc
    if settings is None or before is None or not state.released or state.counted != work.time_slice.index:
        return work
    model = trained(recipe.experiment.model)
    params = {name: state.released[name] for name in trainable(model, state.released)}
    task = FisherTask(window=before.fit or before.train, clip_norm=settings.clip_norm)
    key = ServerState.root_key(recipe.experiment).child("slice", before.index, "fisher")

    def plan_for(slots: NDArray[np.int64]) -> RoundPlan:
        return RoundPlan(
            before.index, 0, task, model, before.n_items, state.released, key, recipe.catalog_digest, slots
        )

    roster = take_census(work.link, task.window, recipe)
    shapes = {name: (value.shape, value.dtype) for name, value in params.items()}
    ask = Ask(work.link, roster, plan_for, shapes, recipe.experiment.training.timeout_seconds)
    guard = recipe.guard
    if guard is None:
        got = gather(ask, ask.everybody, settings.clip_norm)
        mean = named.scale(got.sums, 1.0 / got.n_clients) if got.n_clients else {}
    else:
        mechanism = guard.mechanism(guard.settings.fisher, settings.clip_norm)
        got = private_gather(guard, fisher_name(before.index), mechanism, 1.0, guard.people(before.index), ask)
        mean = dict(got.sums)
    return work.advanced(fisher=accumulated(state.fisher, mean, params, settings.decay))


def fisher_name(index: int) -> str:
    """Return what the ledger calls the question after a slice."""
    return f"slice {index}: what matters (Fisher)"


def accumulated(before: Params, new: Params, params: Params, decay: float) -> dict[str, Array]:
    """Return ``decay before + max(new, 0)`` in the shapes of `params`; items that joined since begin at 0.

    Noise makes some squares negative; they are set to 0, which is post-processing.
    """
    found: dict[str, Array] = {}
    for name, value in params.items():
        total = np.zeros(value.shape, np.float32)
        if name in before:
            old = before[name]
            total[tuple(slice(n) for n in old.shape)] += np.float32(decay) * old
        if name in new:
            total += np.maximum(new[name], 0.0).astype(np.float32)
        found[name] = total
    return found
