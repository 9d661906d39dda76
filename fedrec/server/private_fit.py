"""One round of training with a charge and noise: independent, with a clip norm that is learnt, or correlated."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from fedrec.config import Experiment, PoissonCohort, TurnCohort
from fedrec.errors import MaskingError, PrivacyError
from fedrec.privacy.adaptive import AdaptiveMechanism, next_clip_norm
from fedrec.privacy.settings import AdaptiveClipping
from fedrec.protocol.codec import Shapes
from fedrec.protocol.link import Link
from fedrec.protocol.tally import Expectation
from fedrec.protocol.task import FitTask
from fedrec.server.gather import Gathered, Roster, gather
from fedrec.server.guard import Guard, adaptive_clipping, banded_noise
from fedrec.server.private import PlanFor, drawn, private_gather, zeros


class Place(NamedTuple):
    """Where in a life a round stands."""

    slice: int
    round: int


def private_fit(
    guard: Guard,
    experiment: Experiment,
    place: Place,
    task: FitTask,
    link: Link,
    roster: Roster,
    plan_for: PlanFor,
    shapes: Shapes,
) -> tuple[Gathered, float | None]:
    """Gather one round's mean update with noise, divided by the expected cohort; nothing if the round is given up.

    Returns:
        The noised mean, and the clip norm of the next round where it is learnt.

    Raises:
        BudgetExhausted: the round would pass the budget; nothing was sent.
        RunError: every node that was asked failed.
        PrivacyError: the cohort is not one that the ledger can account for.
    """
    cohort, timeout = experiment.training.cohort, experiment.training.timeout_seconds
    if isinstance(cohort, TurnCohort):
        got = _correlated(guard, experiment, cohort, place, task, link, roster, plan_for, shapes)
        return got, None
    if not isinstance(cohort, PoissonCohort):
        raise PrivacyError('A private round needs Poisson sampling; set training.cohort.kind to "poisson".')
    rate = guard.rate(place.slice, cohort.expected)
    expected = rate * guard.people(place.slice)
    name = f"slice {place.slice}: round {place.round}"
    adaptive = adaptive_clipping(guard.settings)
    if adaptive is not None:
        learning = guard.adaptive(adaptive, task.local.clip_norm, expected)
        return _adaptive(guard, adaptive, learning, name, rate, expected, link, roster, plan_for, shapes, timeout)
    mechanism = guard.mechanism(guard.settings.fit, task.local.clip_norm)
    try:
        got = private_gather(guard, name, mechanism, rate, expected, link, roster, plan_for, shapes, timeout)
    except MaskingError as error:
        got = _given_up(f"the round is abandoned: {error}")
    return got, None


def _adaptive(
    guard: Guard,
    settings: AdaptiveClipping,
    mechanism: AdaptiveMechanism,
    name: str,
    rate: float,
    expected_cohort: float,
    link: Link,
    roster: Roster,
    plan_for: PlanFor,
    shapes: Shapes,
    timeout_seconds: float | None,
) -> tuple[Gathered, float | None]:
    """Gather the sum and how many updates needed no clipping, and release both under one charge."""
    charge = guard.ledger.charge(name, mechanism.event(guard.charged(rate)), clip_norm=mechanism.clip_norm)
    secret = guard.secret(charge)
    places = drawn(secret, roster, rate)

    def expectation(n: int) -> Expectation:
        return Expectation(shapes, n, mechanism.clip_norm, counts=("clipped",))

    got = gather(link, roster, places, plan_for, expectation, timeout_seconds)
    within = got.n_clients - got.stats.get("clipped", 0.0)
    total, noise = got.sums or zeros(shapes), guard.noise(secret)
    mean, share = mechanism.noised(total, within, got.n_clients, expected_cohort, charge, noise)
    guard.told(charge, rate, expected_cohort, mean)
    return replace(got, sums=mean, stats={}), next_clip_norm(settings, mechanism.clip_norm, share)


def _correlated(
    guard: Guard,
    experiment: Experiment,
    cohort: TurnCohort,
    place: Place,
    task: FitTask,
    link: Link,
    roster: Roster,
    plan_for: PlanFor,
    shapes: Shapes,
) -> Gathered:
    """Gather the sum of those whose turn it is, with the round's row of correlated noise."""
    training = experiment.training
    rounds = (training.base if place.slice == 0 else training.later).rounds
    settings = banded_noise(guard.settings)
    if settings is None:
        raise PrivacyError('People who take turns need correlated noise; set privacy.fit_noise.kind to "banded".')
    make = partial(guard.banded, settings, task.local.clip_norm, rounds - place.round, cohort.groups)
    stage = guard.stages.at(f"slice {place.slice}: rounds", place.round, make)
    row = stage.begin(place.round, {name: shape for name, (shape, _) in shapes.items()})
    if row is None:
        return _given_up("the round was begun before the server stopped, and is not repeated with the same noise")
    everybody = np.arange(roster.n_clients, dtype=np.int64)
    bound = stage.mechanism.clip_norm
    timeout = training.timeout_seconds
    got = gather(link, roster, everybody, plan_for, lambda n: Expectation(shapes, n, bound), timeout)
    expected = guard.people(place.slice) / cohort.groups
    sums = stage.mechanism.noised(got.sums or zeros(shapes), expected, stage.charge, row)
    guard.told(stage.charge, 1.0 / cohort.groups, expected, sums)
    return replace(got, sums=sums, stats={})


def _given_up(reason: str) -> Gathered:
    return Gathered({}, 0, {}, 0, ({"node": "all", "reason": reason},), 0, 0)
