"""What stands between a sum and its use in a private run: sampling, the ledger and the noise, always together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from fedrec.config import Experiment, PoissonCohort
from fedrec.errors import PrivacyError
from fedrec.privacy.accounting import calibrate
from fedrec.privacy.events import Event, GaussianEvent
from fedrec.privacy.ledger import Charge, PrivacyLedger
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.noise import NoiseSource, SecureNoise, SeededNoise
from fedrec.privacy.settings import DistributedPrivacy, UserLevelPrivacy
from fedrec.protocol.codec import AnyCodec, Plain, Sparse
from fedrec.random import Key

JUDGED = 2
"""Recommenders whose metrics a private run always asks for after a slice: the release and popularity."""


@dataclass(frozen=True)
class Guard:
    """The privacy of one run.

    Attributes:
        settings: what the experiment asks for.
        ledger: every release is charged here before anybody is asked.
        scale: factor on all noise multipliers, see `calibrated`.
        root: where noise and cohorts come from in a simulation; None: the operating system's generator.
        population: public number of people in the first slice and in later ones.
    """

    settings: UserLevelPrivacy
    ledger: PrivacyLedger
    scale: float
    root: Key | None
    population: tuple[int, int]

    def people(self, slice_index: int) -> int:
        """Return the public number of people in a slice."""
        return self.population[min(slice_index, 1)]

    def rate(self, slice_index: int, expected: float) -> float:
        """Return the probability with which each eligible person is asked in a round."""
        return min(1.0, expected / self.people(slice_index))

    def charged(self, rate: float) -> float:
        """Return the sampling rate that the ledger is charged for, when people are asked with probability `rate`."""
        return _claimed(self.settings, rate)

    def mechanism(self, multiplier: float, clip_norm: float) -> GaussianMechanism:
        """Return the mechanism of a purpose, its noise multiplier calibrated."""
        return GaussianMechanism(clip_norm, multiplier * self.scale)

    def secret(self, charge: Charge) -> Key:
        """Return what the cohort of a charge is drawn from; nobody who sees the plan can derive it."""
        return Key(os.urandom(32)) if self.root is None else charge.key(self.root)

    def noise(self, secret: Key) -> NoiseSource:
        """Return the noise of a charge."""
        return SecureNoise() if self.root is None else SeededNoise(secret.child("noise"))


def planned(experiment: Experiment, population: tuple[int, int], scale: float) -> list[tuple[str, Event]]:
    """Return everything that the planned life of a run will charge, with what it is for.

    Raises:
        PrivacyError: the cohort is not sampled in a way that the ledger can account for, or the codec rounds.
    """
    settings, training = user_level(experiment), experiment.training
    _check_codec(training.codec)
    if isinstance(settings, DistributedPrivacy):
        _check_masked(experiment, settings, population)
    events: list[tuple[str, Event]] = []
    for index in range(experiment.n_slices):
        judged = JUDGED + (index > 0 and experiment.evaluation.promotion_margin is not None)  # its parent as well
        stage = training.base if index == 0 else training.later
        events.append((f"slice {index}: popularity counts", GaussianEvent(noise_multiplier=settings.count * scale)))
        if training.statistics is not None:
            noise = settings.statistics * scale
            events.append((f"slice {index}: co-occurrence statistic", GaussianEvent(noise_multiplier=noise)))
        if stage.rounds:
            events.append((f"slice {index}: {stage.rounds} rounds", _fitting(experiment, population, index, scale)))
        if settings.metrics == "private":
            noise = settings.metrics_noise * scale
            events.append((f"slice {index}: metrics", GaussianEvent(noise_multiplier=noise, count=judged)))
    return events


def _check_codec(codec: AnyCodec) -> None:
    """Refuse codecs that round: a sum that is rounded by a scale of its own moves by more than one person's bound."""
    values = codec.values if isinstance(codec, Sparse) else codec
    if not isinstance(values, Plain):
        raise PrivacyError(
            f"The codec '{values.kind}' rounds sums, so one person could change them by more than the clip norm; set "
            'training.codec.kind to "plain" in a private run.'
        )


def _check_masked(experiment: Experiment, settings: DistributedPrivacy, population: tuple[int, int]) -> None:
    """Refuse what cannot be asked for in a masked sum."""
    least, training = settings.secure_sum.minimum, experiment.training
    if min(population) < least:
        raise PrivacyError(
            f"A masked sum needs {least} clients at least, but only {min(population)} are there; lower "
            "privacy.secure_sum.minimum or wait for more."
        )
    fits = training.base.rounds or training.later.rounds
    if fits and isinstance(training.cohort, PoissonCohort) and training.cohort.expected < least:
        raise PrivacyError(
            f"A cohort of {training.cohort.expected:g} is smaller than the {least} clients that a masked sum needs at "
            "least; raise training.cohort.expected or lower privacy.secure_sum.minimum."
        )
    if training.statistics is not None and training.statistics.sketch == "pairs":
        raise PrivacyError(
            "A statistic of item pairs is sparse, which would tell the server who took what, or too large to be "
            'masked; set training.statistics.sketch to "features".'
        )


def _claimed(settings: UserLevelPrivacy, rate: float) -> float:
    """Return the sampling rate that may be claimed: a server that draws the cohort knows who is in it."""
    return 1.0 if isinstance(settings, DistributedPrivacy) and settings.against == "server" else rate


def _fitting(experiment: Experiment, population: tuple[int, int], index: int, scale: float) -> Event:
    settings, training = user_level(experiment), experiment.training
    stage = training.base if index == 0 else training.later
    if not isinstance(training.cohort, PoissonCohort):
        raise PrivacyError(
            'A cohort of fixed size cannot be accounted as Poisson sampling; set training.cohort.kind to "poisson", '
            'or privacy.fit.kind to "banded", which needs no sampling.'
        )
    rate = min(1.0, training.cohort.expected / population[min(index, 1)])
    return GaussianEvent(noise_multiplier=settings.fit * scale, sampling=_claimed(settings, rate), count=stage.rounds)


def calibrated(experiment: Experiment, population: tuple[int, int]) -> float:
    """Return the factor on all noise multipliers with which the planned life spends the budget and no more."""
    settings = user_level(experiment)
    if not settings.calibrate:
        return 1.0
    return calibrate(
        lambda scale: [event for _, event in planned(experiment, population, scale)], settings.epsilon, settings.delta
    )


def user_level(experiment: Experiment) -> UserLevelPrivacy:
    """Return the settings of a run that is private at user level.

    Raises:
        PrivacyError: it is not.
    """
    settings = experiment.privacy
    if isinstance(settings, UserLevelPrivacy):
        return settings
    raise PrivacyError(f'privacy.mode is "{settings.mode}", so there is no user-level budget to plan.')


def guard_of(experiment: Experiment, ledger: PrivacyLedger, n_people: int) -> Guard:
    """Return the guard of a run.

    Args:
        experiment: what the run does.
        ledger: where it pays.
        n_people: the census of the first slice, where the experiment declares no population.
    """
    settings = user_level(experiment)
    population = populations(settings, n_people)
    root = None if settings.noise == "system" else Key.from_seed(experiment.seed).child("privacy")
    return Guard(settings, ledger, calibrated(experiment, population), root, population)


def populations(settings: UserLevelPrivacy, n_people: int) -> tuple[int, int]:
    """Return the public number of people in the first slice and in later ones."""
    first = settings.population or n_people
    return first, settings.later_population or first


def statement(guard: Guard) -> dict[str, Any]:
    """Return what a report says of a user-level private run."""
    settings = guard.settings
    metrics = (
        "Metrics carry noise and are charged."
        if settings.metrics == "private"
        else 'The metrics of this report are exact and NOT covered by the guarantee (privacy.metrics = "research").'
    )
    drawn = (
        "Noise and cohorts come from the operating system's generator."
        if settings.noise == "system"
        else "Noise and cohorts come from the experiment's seed: a simulation that protects nobody."
    )
    return {
        "statement": (
            f"User-level differential privacy, mode {settings.mode}; adjacency: add or remove one person with the "
            f"whole history. {_trust(settings)} "
            "In rounds of training every eligible person is sampled independently (Poisson); "
            "the number of people is public. Accounted over the whole life with privacy loss distributions. "
            f"{metrics} {drawn} Settings that were tuned on this data are not accounted for."
        ),
        "unit": "user",
        "adjacency": "add or remove one person",
        "mode": settings.mode,
        "epsilon": guard.ledger.spent(),
        "budget": settings.epsilon,
        "delta": settings.delta,
        "noise": settings.noise,
        "metrics": settings.metrics,
        "scale": guard.scale,
    }


def _trust(settings: UserLevelPrivacy) -> str:
    """Return who must be believed, and for what."""
    if not isinstance(settings, DistributedPrivacy):
        return "The server is trusted: nodes clip each person's contribution and add up, the server adds noise."
    view = (
        "The budget holds against the server too, so nothing is claimed from sampling."
        if settings.against == "server"
        else "The budget holds against readers of releases, who do not know who was sampled; the server does, and "
        "against it the guarantee is weaker."
    )
    return (
        "The server sees masked sums alone, in which the clients' noise already is, and who took part; it is trusted "
        "to introduce real clients to each other and to say how many there are. " + view
    )
