"""Tasks in mode "local": each client pays from its own ledger and adds its own noise; a sum is made of noised parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from fedrec import params as named
from fedrec.client.budget import LocalBudget
from fedrec.client.pool import count
from fedrec.client.trained import Trained
from fedrec.client.trainer import cache_block
from fedrec.data.batches import Cohort
from fedrec.errors import PrivacyError, ProtocolError
from fedrec.models.build import restore
from fedrec.models.recommender import Recommender, learnt
from fedrec.params import Accumulator, Array, Params
from fedrec.privacy.clip import clip_factors
from fedrec.privacy.local import fit_deviation, replacing, upload_bound
from fedrec.privacy.settings import LocalNoise, WindowUnit
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import CountTask, FitTask

Train = Callable[..., Trained]


def fit_locally(
    plan: RoundPlan, task: FitTask, noise: LocalNoise, cohort: Cohort, budget: LocalBudget, train: Train
) -> Tally:
    """Return the sum of updates that were private before they were added.

    A client whose budget is spent gives nothing and is not counted; `stats` says how many those were, and nothing else:
    losses and clips are exact.
    """
    model = restore(plan.model, plan.n_items, plan.params)
    if isinstance(noise.unit, WindowUnit):
        return _added(_by_windows(plan, task, noise, noise.unit, cohort, budget, model), len(cohort))
    return _added(_by_users(plan, task, noise, cohort, budget, model, train), len(cohort))


def count_locally(plan: RoundPlan, task: CountTask, noise: LocalNoise, cohort: Cohort, budget: LocalBudget) -> Tally:
    """Return the sum of popularity counts, each client's with noise of its own at user level.

    Raises:
        ProtocolError: the counts are not bounded.
    """
    if task.clip_norm is None:
        raise ProtocolError("Counts that are not bounded cannot be hidden by noise.")
    mechanism = replacing(task.clip_norm, noise.noise_multiplier)
    name, bound = f"slice {plan.slice}: popularity counts", task.clip_norm

    def parts() -> Iterator[Params]:
        for place in range(len(cohort)):
            client = int(cohort.ids[place])
            charge = budget.charge(client, name, mechanism.event(), mechanism.clip_norm)
            if charge is None:
                continue
            exact = count(task, cohort.take(slice(place, place + 1)), plan.n_items).sums
            source = budget.source(budget.secret(client, charge, plan))
            deviation = mechanism.clip_norm * noise.noise_multiplier
            yield _bounded(mechanism.noised(exact, 1.0, charge, source), bound, deviation)

    return _added(parts(), len(cohort))


def _by_users(
    plan: RoundPlan,
    task: FitTask,
    noise: LocalNoise,
    cohort: Cohort,
    budget: LocalBudget,
    model: Recommender,
    train: Train,
) -> Iterator[Params]:
    """Yield each paying client's whole update, clipped and noised."""
    clip, name = task.local.clip_norm, _round_name(plan)
    mechanism = replacing(clip, noise.noise_multiplier)
    deviation = fit_deviation(noise, clip, task.local.learning_rate, task.local.steps)
    charges = {
        int(client): budget.charge(int(client), name, mechanism.event(), mechanism.clip_norm) for client in cohort.ids
    }
    able = cohort.take(np.flatnonzero([charges[int(client)] is not None for client in cohort.ids]))
    block = cache_block(model, task.local.steps)
    for start in range(0, len(able), block):
        part = able.take(slice(start, start + block))
        trained = train(model, part, task.local, plan.key)
        factors = clip_factors(trained.norms(), clip)
        for place, client in enumerate(part.ids.tolist()):
            charge = charges[client]
            if charge is None:
                continue
            totals = {key: torch.zeros_like(value) for key, value in learnt(model).items()}
            trained.alone(place).add_to(totals, factors[place : place + 1])
            exact = {key: value.detach().numpy() for key, value in totals.items()}
            source = budget.source(budget.secret(client, charge, plan))
            yield _bounded(mechanism.noised(exact, 1.0, charge, source), clip, deviation)


def _by_windows(
    plan: RoundPlan,
    task: FitTask,
    noise: LocalNoise,
    unit: WindowUnit,
    cohort: Cohort,
    budget: LocalBudget,
    model: Recommender,
) -> Iterator[Params]:
    """Yield each paying client's update by DP-SGD over windows of its history."""
    try:
        from fedrec.client.private import fit_windows, window_event  # imports Opacus: seconds
    except ImportError as error:
        raise PrivacyError(
            f"privacy.unit.kind = \"window\" needs Opacus, which is not here ({error}); install 'fedrec[private]'."
        ) from error
    local, z = task.local, noise.noise_multiplier
    event = window_event(unit, z, local.steps)
    deviation = fit_deviation(noise, local.clip_norm, local.learning_rate, local.steps)
    for place in range(len(cohort)):
        person = cohort.take(slice(place, place + 1))
        client = int(person.ids[0])
        charge = budget.charge(client, _round_name(plan), event, unit.clip_norm)
        if charge is None:
            continue
        secret = budget.secret(client, charge, plan)
        update = fit_windows(model, person, local, unit, z, charge, budget.source(secret), secret)
        yield _bounded(update, local.clip_norm, deviation)


def _round_name(plan: RoundPlan) -> str:
    return f"slice {plan.slice}: round {plan.round}"


def _bounded(update: Params, clip_norm: float, deviation: float) -> dict[str, Array]:
    """Scale a noised upload down to what the server checks; noise alone reaches it with a probability of 3e-11."""
    norm = named.norm(update)
    factor = clip_factors(np.array([norm]), upload_bound(clip_norm, deviation, named.n_values(update)))
    if factor[0] == 1:
        return dict(update)
    return {name: np.nan_to_num(value, posinf=0.0, neginf=0.0) * factor[0] for name, value in update.items()}


def _added(parts: Iterator[Params], n_asked: int) -> Tally:
    sums, n_clients = Accumulator(), 0
    for part in parts:
        sums.fold(part)
        n_clients += 1
    return Tally(sums.value(), n_clients, {"spent": float(n_asked - n_clients)})
