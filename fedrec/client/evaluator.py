"""A client judges a model on its own held-out interactions, and contributes sums of metrics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedrec.client.vectorised import train_batched
from fedrec.data.batches import Cohort, histories, moments_at
from fedrec.data.catalog import ItemCatalog
from fedrec.data.slices import TimeWindow, resolve
from fedrec.errors import ProtocolError
from fedrec.evaluation.intervals import contributions, poisson_weights
from fedrec.evaluation.metrics import ALL, PeopleMetrics, average_people, evaluate_people, private_names
from fedrec.evaluation.ranking import ItemLists
from fedrec.models.build import restore
from fedrec.models.recommender import Recommender, score_all, set_params
from fedrec.params import Accumulator
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import EvaluateTask, FitTask
from fedrec.random import Key

SCORES = 1 << 21
"""How many scores are ranked in one computation: enough to spread the cost of calls, few enough for the memory."""
PERSONAL_BLOCK = 32
"""People whose own models are held at the same time."""


def evaluate(plan: RoundPlan, task: EvaluateTask, cohort: Cohort, catalog: ItemCatalog) -> Tally:
    """Rank each client's held-out items among all that it did not know, and return sums of the metrics.

    Args:
        plan: holds the model, and ``popularity`` [n_items], released counts that novelty is measured against.
        task: what to measure.
        cohort: the clients; ``[low, high)`` are the held-out places.
        catalog: item attributes, for diversity.
    """
    if plan.inputs.get("popularity", np.zeros(0)).shape != (plan.n_items,):
        raise ProtocolError("The plan to evaluate carries no popularity counts of its items.")
    model = restore(plan.model, plan.n_items, plan.params)
    attributes = catalog.attribute_matrix[: plan.n_items]
    sums = Accumulator()
    block = people_at_once(plan.n_items, task.probes)
    buffer = np.empty((min(block, len(cohort)) * (task.probes or 1), plan.n_items), np.float32)
    for start in range(0, len(cohort), block):
        people = cohort.take(slice(start, start + block))
        owner, asked = ask(people, task.probes)
        known = asked.low if task.known is None else resolve(people.log, task.known, people.users)[1][owner]
        context = replace(asked, low=known)
        out, gone = np.zeros_like(known), known
        if task.masked is not None:
            out, gone = (place[owner] for place in resolve(people.log, task.masked, people.users))
        back = (people.low[owner] if task.known is None else known) > 0
        if task.new_since is not None:
            back = _did_before(people, task.new_since)[owner]
        if task.personalise is None:
            scores = _scores(model, context, asked, buffer[: len(asked)])
        else:
            scores = _own_scores(model, people, context, asked, owner, task.personalise, plan.key.child("local-only"))
        metrics = evaluate_people(
            scores,
            item_lists(asked, out, gone),
            item_lists(asked, asked.low, asked.high),
            task.n_known_items,
            task.ks,
            attributes=attributes,
            popularity=plan.inputs["popularity"],
            overwrite=True,
            returning=back,
            sampled=(task.sampled_negatives, asked.ids, plan.key.child("sampled")) if task.sampled_negatives else None,
        )
        if task.private:
            sums.fold(bounded(average_people(metrics, owner, len(people)), task.ks))
            continue
        weights = poisson_weights(plan.key.child("bootstrap"), people.ids, task.replicates)
        sums.fold(contributions(average_people(metrics, owner, len(people)), weights))
    return Tally(sums.value(), len(cohort), {})


def _did_before(people: Cohort, second: int) -> NDArray[np.bool_]:
    """Return [c] who did something before."""
    return resolve(people.log, TimeWindow(start=second, end=second), people.users)[0] > 0


def bounded(people: PeopleMetrics, ks: tuple[int, ...]) -> dict[str, NDArray[np.float64]]:
    """Return ``{"metrics": [M + 1]}``: sums of `private_names` over all people, then how many people.

    Every entry of a person's row is in [0, 1], so its norm is at most `private_norm`, whatever the person did.
    """
    group = people.groups[ALL]
    columns = [people.names.index(name) for name in private_names(ks)]
    rows = np.clip(np.nan_to_num(group.values[:, columns], nan=0.0, posinf=0.0, neginf=0.0), 0.0, 1.0)
    return {"metrics": np.append(rows.sum(axis=0), float(len(rows)))}


def people_at_once(n_items: int, probes: int | None = None) -> int:
    """Return how many people to judge in one computation, each asked up to `probes` times."""
    return max(1, SCORES // (n_items * (probes or 1)))


def ask(people: Cohort, probes: int | None) -> tuple[NDArray[np.int64], Cohort]:
    """Return the questions that are put to people: ``(owner [q], cohort of q questions)``.

    A question's held-out places are ``[low, high)``; everything before `low` is known when it is asked.
    """
    if probes is None:
        return np.arange(len(people), dtype=np.int64), people
    width = people.high - people.low
    count = np.minimum(width, probes)
    owner = np.repeat(np.arange(len(people), dtype=np.int64), count)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    place = people.low[owner] + nth * width[owner] // count[owner]
    return owner, replace(people.take(owner), low=place, high=place + 1)


def item_lists(cohort: Cohort, low: NDArray[np.int64], high: NDArray[np.int64]) -> ItemLists:
    """Return each client's items at places ``[low, high)`` of its history."""
    width = high - low
    offsets = np.concatenate(([0], np.cumsum(width))).astype(np.int64)
    rows = np.arange(int(offsets[-1])) + np.repeat(cohort.log.offsets[cohort.users] + low - offsets[:-1], width)
    return ItemLists(offsets, cohort.log.item[rows].astype(np.int64))


def _scores(
    model: Recommender, known: Cohort, asked: Cohort, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return scores given what lies before `known.low`, in the moment of the first interaction that is asked for."""
    context = model.spec.context
    moments = None if context is None else moments_at(asked, asked.low[:, None], context)[:, 0]
    return score_all(model, histories(known, known.low, model.spec), out, moments)


def _own_scores(
    model: Recommender,
    people: Cohort,
    known: Cohort,
    asked: Cohort,
    owner: NDArray[np.int64],
    fit: FitTask,
    key: Key,
) -> NDArray[np.float32]:
    """Return the scores of models that each person trained alone, on their own interactions in the fit's window."""
    shared = {name: value.detach().clone() for name, value in model.named_parameters()}
    low, high = resolve(people.log, fit.window, people.users)
    training = replace(people, low=low, high=high)
    scores = _scores(model, known, asked)  # somebody without anything to train on keeps the model as it came
    able = np.flatnonzero(high > low)
    for start in range(0, len(able), PERSONAL_BLOCK):
        places = able[start : start + PERSONAL_BLOCK]
        trained = train_batched(model, training.take(places), fit.local, key)
        for i, place in enumerate(places):
            set_params(model, {name: value.numpy() for name, value in trained.client_params(shared, i).items()})
            rows = np.flatnonzero(owner == place)
            scores[rows] = _scores(model, known.take(rows), asked.take(rows))
        set_params(model, {name: value.numpy() for name, value in shared.items()})
    return scores
