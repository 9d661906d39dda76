"""One round of training with a charge and noise: independent, with a clip norm that is learnt, or correlated."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

from fedrec.config import Experiment
from fedrec.errors import MaskingError, PrivacyError
from fedrec.learning import PoissonCohort, TurnCohort
from fedrec.privacy.adaptive import AdaptiveMechanism, next_clip_norm
from fedrec.privacy.settings import AdaptiveClipping
from fedrec.protocol.task import FitTask
from fedrec.server.gather import Ask, Gathered, gather
from fedrec.server.guard import Guard, adaptive_clipping, banded_noise
from fedrec.server.private import drawn, private_gather, zeros


class Place(NamedTuple):
    """Where in a life a round stands."""

    slice: int
    round: int


def private_fit(
    guard: Guard,
    experiment: Experiment,
    place: Place,
    task: FitTask,
    ask: Ask,
) -> tuple[Gathered, float | None]:
    """Gather one round's mean update with noise, divided by the expected cohort; nothing if the round is given up.

    Returns:
        The noised mean, and the clip norm of the next round where it is learnt.

    Raises:
        BudgetExhausted: the round would pass the budget; nothing was sent.
        RunError: every node that was asked failed.
        PrivacyError: the cohort is not one that the ledger can account for.
    """
    cohort = experiment.training.cohort
    if isinstance(cohort, TurnCohort):
        got = _correlated(guard, experiment, cohort, place, task, ask)
        return got, None
    if not isinstance(cohort, PoissonCohort):
        raise PrivacyError('A private round needs Poisson sampling; set training.cohort.kind to "poisson".')
    rate = guard.rate(place.slice, cohort.expected)
    expected = rate * guard.people(place.slice)
    name = f"slice {place.slice}: round {place.round}"
    adaptive = adaptive_clipping(guard.settings)
    if adaptive is not None:
        learning = guard.adaptive(adaptive, task.local.clip_norm, expected)
        return _adaptive(guard, adaptive, learning, name, rate, expected, ask)
    mechanism = guard.mechanism(guard.settings.fit, task.local.clip_norm)
    try:
        got = private_gather(guard, name, mechanism, rate, expected, ask)
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
    ask: Ask,
) -> tuple[Gathered, float | None]:
    """Gather the sum and how many updates needed no clipping, and release both under one charge."""
    event = mechanism.event(guard.charged(rate))
    charge = guard.ledger.charge(name, event, mechanism.clip_norm, guard.source(ask, rate))
    secret = guard.secret(charge)
    places = drawn(secret, ask.roster, rate)
    got = gather(ask, places, mechanism.clip_norm, counts=("clipped",))
    within = got.n_clients - got.stats.get("clipped", 0.0)
    total, noise = got.sums or zeros(ask.shapes), guard.noise(secret)
    mean, share = mechanism.noised(total, within, got.n_clients, expected_cohort, charge, noise)
    guard.told(charge, rate, expected_cohort, mean, share)
    return replace(got, sums=mean, stats={}), next_clip_norm(settings, mechanism.clip_norm, share)


def _correlated(
    guard: Guard,
    experiment: Experiment,
    cohort: TurnCohort,
    place: Place,
    task: FitTask,
    ask: Ask,
) -> Gathered:
    """Gather the sum of those whose turn it is, with the round's row of correlated noise."""
    training = experiment.training
    rounds = (training.base if place.slice == 0 else training.later).rounds
    settings = banded_noise(guard.settings)
    if settings is None:
        raise PrivacyError('People who take turns need correlated noise; set privacy.fit_noise.kind to "banded".')
    make = partial(guard.banded, settings, task.local.clip_norm, rounds - place.round, cohort.groups)
    stage = guard.stages.at(f"slice {place.slice}: rounds", place.round, make)
    row = stage.begin(place.round, {name: shape for name, (shape, _) in ask.shapes.items()})
    if row is None:
        return _given_up("the round was begun before the server stopped, and is not repeated with the same noise")
    got = gather(ask, bound=stage.mechanism.clip_norm)
    expected = guard.people(place.slice) / cohort.groups
    sums = stage.mechanism.noised(got.sums or zeros(ask.shapes), expected, stage.charge, row)
    guard.told(stage.charge, 1.0 / cohort.groups, expected, sums)
    return replace(got, sums=sums, stats={})


def _given_up(reason: str) -> Gathered:
    return Gathered({}, 0, {}, 0, ({"node": "all", "reason": reason},), 0, 0)
