"""Membership inference against a finished model: was this person in, was this interaction in?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedrec.audit.life import live, people_of
from fedrec.client.evaluator import ask, people_at_once
from fedrec.client.pool import LogPool
from fedrec.config import Experiment
from fedrec.data.batches import Cohort, histories
from fedrec.data.cleaning import Dataset
from fedrec.data.log import InteractionLog
from fedrec.data.slices import LastWindow, TimeSlice, TimeWindow, resolve
from fedrec.errors import PrivacyError
from fedrec.evaluation.attacks import Bound, Detection, detection, one_run_bound
from fedrec.models.build import restore
from fedrec.models.recommender import Recommender, score_all
from fedrec.random import Key
from fedrec.server.work import Observer

PROBES = 8
"""At so many places of a person's history the model is asked for what came next."""
LEAST = 3
"""Interactions that a person must have in the window to lose one of them for the attack."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Secrets:
    """What the attacker has to find out, drawn before the run.

    Attributes:
        member: [n_users] whether the person's history is in the run, with probability 1/2 each.
        able: people with enough interactions in the window for both attacks.
        first: [a] place of one interaction of each able person in the window.
        second: [a] place of another; which of the two stands first is drawn.
        drops_first: [a] which of the two is taken out before the run, with probability 1/2 each.
    """

    member: NDArray[np.bool_]
    able: Ints
    first: Ints
    second: Ints
    drops_first: NDArray[np.bool_]

    @property
    def dropped(self) -> Ints:
        """[a] place of the interaction that is not in the run."""
        return np.where(self.drops_first, self.first, self.second)

    @property
    def kept(self) -> Ints:
        """[a] place of its twin, which is in the run if the person is."""
        return np.where(self.drops_first, self.second, self.first)


@dataclass(frozen=True)
class Membership:
    """What the attacks on one released model found.

    Attributes:
        person: people of the run against people who were left out, by how well the model predicts their histories.
        interaction: of people in the run, interactions that were in against ones that were taken out.
        bound: the lower bound on epsilon that the attack on people proves.
    """

    person: Detection
    interaction: Detection
    bound: Bound


def attack(
    experiment: Experiment,
    dataset: Dataset,
    slices: Sequence[TimeSlice],
    delta: float,
    confidence: float,
    key: Key,
    observe: Observer = lambda event: None,
    shadows: int = 0,
) -> Membership:
    """Play the life with half of the people, each without one interaction, and attack its last release.

    The attacker knows all histories, and scores by the log-probability that the released model gives to what a person
    did. Both questions are fair coins, drawn the same way whatever the data, so chance is 1/2 exactly: popular items
    or long histories give nothing away.

    Args:
        experiment: what to audit.
        dataset: the real people.
        slices: the planned life.
        delta: of the claim.
        confidence: of the bound and of the intervals.
        key: decides the secrets.
        observe: is told what happens.
        shadows: how many further runs, each with half of the people, tell how well a person is predicted who was not
            in; a person's score is the difference. 0: the plain score.

    Raises:
        PrivacyError: there are too few people to attack.

    Source: Yeom et al., CSF 2018 (threshold on the loss); Watson et al., ICLR 2022 (difference to shadow models without
    the person).
    """
    window = whole(slices)
    secrets = draw(dataset.log, window, key)
    if min(int(secrets.member[secrets.able].sum()), int((~secrets.member[secrets.able]).sum())) < 2:
        raise PrivacyError("Too few people have three interactions or more, so membership cannot be attacked.")
    log = without(dataset.log, secrets, np.ones(dataset.log.n_users, np.bool_))
    model = _model(experiment, dataset, slices, without(dataset.log, secrets, secrets.member), observe)
    person = _person_scores(model, log, window, secrets.able)
    if shadows:
        person = person - _calibration(experiment, dataset, slices, secrets, log, key, shadows, observe)
    member = secrets.member[secrets.able]
    inside = replace(
        secrets,
        able=secrets.able[member],
        first=secrets.first[member],
        second=secrets.second[member],
        drops_first=secrets.drops_first[member],
    )
    kept, dropped = (_interaction_scores(model, dataset.log, inside, place) for place in (inside.kept, inside.dropped))
    return Membership(
        detection(person[member], person[~member], confidence),
        detection(kept, dropped, confidence),
        one_run_bound(person, member, delta, confidence),
    )


def whole(slices: Sequence[TimeSlice]) -> TimeWindow | LastWindow:
    """Return the window of all that is trained on in a life."""
    first, last = slices[0].train, slices[-1].train
    if isinstance(first, TimeWindow) and isinstance(last, TimeWindow):
        return TimeWindow(start=first.start, end=last.end)
    return first


def draw(log: InteractionLog, window: TimeWindow | LastWindow, key: Key) -> Secrets:
    """Return the secrets of a run on this log."""
    low, high = resolve(log, window)
    random = key.child("secrets").numpy()
    member = random.random(log.n_users) < 0.5
    able = np.flatnonzero(high - low >= LEAST)
    width = (high - low)[able]
    a = np.floor(random.random(len(able)) * width).astype(np.int64)
    b = (a + 1 + np.floor(random.random(len(able)) * (width - 1)).astype(np.int64)) % width
    return Secrets(member, able, low[able] + a, low[able] + b, random.random(len(able)) < 0.5)


def without(log: InteractionLog, secrets: Secrets, member: NDArray[np.bool_]) -> InteractionLog:
    """Return the log of the members alone, without the dropped interactions; everybody keeps their number."""
    kept = member[log.user]
    kept[log.offsets[secrets.able] + secrets.dropped] = False
    return InteractionLog.from_rows(
        log.user[kept].astype(np.int64), log.item[kept].astype(np.int64), log.time[kept], tuple(log.user_ids),
        log.event[kept], log.value[kept], log.event_kinds,
    )  # fmt: skip


def _model(
    experiment: Experiment, dataset: Dataset, slices: Sequence[TimeSlice], log: InteractionLog, observe: Observer
) -> Recommender:
    pool = LogPool(log, dataset.catalog, engine=experiment.runtime.engine)
    n_people = people_of(*resolve(dataset.log, slices[0].train))
    state = live(experiment, dataset.catalog, slices, pool, n_people, observe=observe).state
    return restore(experiment.model, slices[-1].n_items, state.released)


def _calibration(
    experiment: Experiment,
    dataset: Dataset,
    slices: Sequence[TimeSlice],
    secrets: Secrets,
    log: InteractionLog,
    key: Key,
    shadows: int,
    observe: Observer,
) -> Floats:
    """Return each able person's mean score under shadow models that were made without them."""
    total, times = np.zeros(len(secrets.able)), np.zeros(len(secrets.able))
    for number in range(shadows):
        member = key.child("shadow", number).numpy().random(dataset.log.n_users) < 0.5
        shadow = experiment.model_copy(update={"seed": key.child("shadow seed", number).integer() % (1 << 31)})
        model = _model(shadow, dataset, slices, without(dataset.log, secrets, member), observe)
        out = ~member[secrets.able]
        total += np.where(out, _person_scores(model, log, whole(slices), secrets.able), 0.0)
        times += out
    known = times > 0
    mean = np.divide(total, times, out=np.zeros_like(total), where=known)
    return np.where(known, mean, mean[known].mean() if known.any() else 0.0)


def _person_scores(model: Recommender, log: InteractionLog, window: TimeWindow | LastWindow, users: Ints) -> Floats:
    """Return the mean log-probability of what each person did at a few places of the window."""
    low, high = resolve(log, window, users)
    owner, asked = ask(Cohort(log, users, users, low, high), PROBES)
    found = _log_probabilities(model, asked, asked.low, log.item[log.offsets[asked.users] + asked.low])
    return np.bincount(owner, found, minlength=len(users)) / np.maximum(np.bincount(owner, minlength=len(users)), 1)


def _interaction_scores(model: Recommender, log: InteractionLog, secrets: Secrets, place: Ints) -> Floats:
    """Return the log-probability of the item at a place, given all before the earlier one of the person's two."""
    users = secrets.able
    context = np.minimum(secrets.first, secrets.second)
    cohort = Cohort(log, users, users, context, context + 1)
    return _log_probabilities(model, cohort, context, log.item[log.offsets[users] + place])


def _log_probabilities(model: Recommender, cohort: Cohort, upto: Ints, item: NDArray[np.int32]) -> Floats:
    """Return [c] the log-probability of one item each after the history before `upto`; -log n for an unknown item."""
    found = np.full(len(cohort), -np.log(model.n_items))
    block = people_at_once(model.n_items)
    for start in range(0, len(cohort), block):
        part = slice(start, start + block)
        people = replace(cohort.take(part), low=upto[part])
        scored = score_all(model, histories(people, people.low, model.spec)).astype(np.float64)
        top = scored.max(axis=1, keepdims=True)
        total = top[:, 0] + np.log(np.exp(scored - top).sum(axis=1))
        number = item[part].astype(np.int64)
        there = number < model.n_items
        chosen = scored[np.arange(len(scored)), np.where(there, number, 0)] - total
        found[part] = np.where(there, chosen, found[part])
    return found
