"""What stands between a sum and its use in a private run: sampling, the ledger and the noise, always together."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from fedrec.config import Experiment
from fedrec.errors import PrivacyError
from fedrec.learning import PoissonCohort, TurnCohort
from fedrec.models.configs import BlendConfig
from fedrec.params import Params
from fedrec.privacy.accounting import calibrate
from fedrec.privacy.adaptive import AdaptiveMechanism, count_noise
from fedrec.privacy.events import Event, GaussianEvent, MatrixEvent
from fedrec.privacy.ledger import Charge, PrivacyLedger
from fedrec.privacy.matrix import BandedMechanism, optimised
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.noise import NoiseSource, SecureNoise, SeededNoise
from fedrec.privacy.settings import AdaptiveClipping, BandedNoise, CentralPrivacy, DistributedPrivacy, UserLevelPrivacy
from fedrec.protocol.codec import AnyCodec, Plain, Sparse
from fedrec.random import Key
from fedrec.server.gather import Ask
from fedrec.server.stages import Stages

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
        stages: correlated noise, if the experiment asks for it.
    """

    settings: UserLevelPrivacy
    ledger: PrivacyLedger
    scale: float
    root: Key | None
    population: tuple[int, int]
    stages: Stages

    def at(self, slice_index: int) -> Self:
        """Return the guard of a slice: where the life is planned unevenly, its noise differs from that of the first."""
        return replace(self, scale=slice_scale(self.settings, self.scale, slice_index))

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

    def adaptive(self, settings: AdaptiveClipping, clip_norm: float, expected_cohort: float) -> AdaptiveMechanism:
        """Return the mechanism of a round that learns its clip norm."""
        multiplier = self.settings.fit * self.scale
        return AdaptiveMechanism(clip_norm, multiplier, count_noise(settings, expected_cohort, multiplier))

    def banded(self, settings: BandedNoise, clip_norm: float, rounds: int, groups: int) -> BandedMechanism:
        """Return the mechanism of a stage of correlated noise."""
        strategy = optimised(rounds, settings.band, groups)
        return BandedMechanism(clip_norm, self.settings.fit * self.scale, strategy)

    def secret(self, charge: Charge) -> Key:
        """Return what the cohort of a charge is drawn from; nobody who sees the plan can derive it."""
        return Key(os.urandom(32)) if self.root is None else charge.key(self.root)

    def source(self, ask: Ask, rate: float) -> str | None:
        """Return the digest of all that a release from a seed is computed from; None: its noise is the system's."""
        if self.root is None:
            return None
        plan = ask.plan_for(np.zeros(0, np.int64))
        people = [[name, n_clients] for _, name, n_clients in ask.roster.nodes]
        return hashlib.sha256(json.dumps([self.root.hex(), plan.digest, people, rate]).encode()).hexdigest()

    def noise(self, secret: Key) -> NoiseSource:
        """Return the noise of a charge."""
        return SecureNoise() if self.root is None else SeededNoise(secret.child("noise"))

    def told(
        self, charge: Charge, rate: float, expected_cohort: float, released: Params, share: float | None = None
    ) -> None:
        """Do nothing: an auditor's guard listens here to every release of a sum, see `fedrec.audit`."""


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
    whole = scale
    for index in range(experiment.n_slices):
        scale = slice_scale(settings, whole, index)
        judged = JUDGED + (index > 0 and experiment.evaluation.promotion_margin is not None)  # its parent as well
        stage = training.base if index == 0 else training.later
        if index and training.ewc is not None:
            matters = GaussianEvent(noise_multiplier=settings.fisher * scale)
            events.append((f"slice {index - 1}: what matters (Fisher)", matters))
        events.append((f"slice {index}: popularity counts", GaussianEvent(noise_multiplier=settings.count * scale)))
        if training.statistics is not None:
            noise = settings.statistics * scale
            events.append((f"slice {index}: co-occurrence statistic", GaussianEvent(noise_multiplier=noise)))
        if stage.rounds:
            event = _fitting(experiment, population, index, scale)
            events.append((f"slice {index}: {stage.rounds} rounds{_correlated(event)}", event))
        asked = 0 if training.stopping is None else stage.rounds // training.stopping.every
        if asked:
            noise = settings.metrics_noise * scale
            tried = GaussianEvent(noise_multiplier=noise, count=asked)
            events.append((f"slice {index}: validation of the rounds", tried))
        if isinstance(experiment.model, BlendConfig):
            contenders = 1 + len(experiment.model.weights) + len(experiment.model.mixes)
            tried = GaussianEvent(noise_multiplier=settings.metrics_noise * scale, count=contenders)
            events.append((f"slice {index}: validation of the fit", tried))
        if settings.metrics == "private":
            noise = settings.metrics_noise * scale
            events.append((f"slice {index}: metrics", GaussianEvent(noise_multiplier=noise, count=judged)))
    return events


def slice_scale(settings: UserLevelPrivacy, scale: float, index: int) -> float:
    """Return the factor on all noise multipliers in a slice."""
    return scale * settings.later_noise if index else scale


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


def banded_noise(settings: UserLevelPrivacy) -> BandedNoise | None:
    """Return how noise is correlated, None where it is not."""
    found = settings.fit_noise if isinstance(settings, CentralPrivacy) else None
    return found if isinstance(found, BandedNoise) else None


def adaptive_clipping(settings: UserLevelPrivacy) -> AdaptiveClipping | None:
    """Return how the clip norm is learnt, None where it is fixed."""
    return settings.adaptive if isinstance(settings, CentralPrivacy) else None


def _correlated(event: Event) -> str:
    """Return what a plan says of correlated noise."""
    if not isinstance(event, MatrixEvent):
        return ""
    return (
        f", one release: noise correlated over {event.band}, each person every {event.min_separation} rounds, "
        f"{event.max_participations} times at most"
    )


def _fitting(experiment: Experiment, population: tuple[int, int], index: int, scale: float) -> Event:
    settings, training = user_level(experiment), experiment.training
    stage = training.base if index == 0 else training.later
    banded = banded_noise(settings)
    if banded is not None:
        if not isinstance(training.cohort, TurnCohort):
            raise PrivacyError(
                'Correlated noise needs people to take part at known distances; set training.cohort.kind to "turns".'
            )
        if adaptive_clipping(settings) is not None:
            raise PrivacyError(
                "Correlated noise only cancels between rounds of the same clip norm; leave out privacy.adaptive."
            )
        strategy = optimised(stage.rounds, banded.band, training.cohort.groups)
        return BandedMechanism(training.local.clip_norm, settings.fit * scale, strategy).event()
    if isinstance(training.cohort, TurnCohort):
        raise PrivacyError(
            "People who take turns are not sampled, which independent noise relies on; set privacy.fit_noise.kind to "
            '"banded" (in mode "central"; a band of 1 is independent noise).'
        )
    if not isinstance(training.cohort, PoissonCohort):
        raise PrivacyError(
            'A cohort of fixed size cannot be accounted as Poisson sampling; set training.cohort.kind to "poisson", '
            'or to "turns" with privacy.fit_noise.kind = "banded", which needs no sampling.'
        )
    rate = min(1.0, training.cohort.expected / population[min(index, 1)])
    return GaussianEvent(noise_multiplier=settings.fit * scale, sampling=_claimed(settings, rate), count=stage.rounds)


def calibrated(experiment: Experiment, population: tuple[int, int]) -> float:
    """Return the factor on all noise multipliers with which the planned life spends the budget and no more."""
    settings = user_level(experiment)
    scale = 1.0
    if settings.calibrate:
        scale = calibrate(
            lambda scale: [event for _, event in planned(experiment, population, scale)],
            settings.epsilon,
            settings.delta,
        )
    _check_count(experiment, population, scale)
    return scale


def _check_count(experiment: Experiment, population: tuple[int, int], scale: float) -> None:
    """Refuse a count of unclipped updates that would cost more than its round, before anything is sent."""
    settings, training = user_level(experiment), experiment.training
    adaptive = adaptive_clipping(settings)
    if adaptive is not None and isinstance(training.cohort, PoissonCohort):
        multiplier = settings.fit * scale * min(1.0, settings.later_noise if experiment.n_slices > 1 else 1.0)
        cohort = min(training.cohort.expected, *population)
        AdaptiveMechanism(training.local.clip_norm, multiplier, count_noise(adaptive, cohort, multiplier))


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
    return Guard(settings, ledger, calibrated(experiment, population), root, population, Stages(ledger, root))


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
            f"{_rounds(settings)} The number of people is public. "
            "Accounted over the whole life with privacy loss distributions. "
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


def _rounds(settings: UserLevelPrivacy) -> str:
    """Return what is believed of who takes part in training."""
    banded = banded_noise(settings)
    if banded is None:
        return "In rounds of training every eligible person is sampled independently (Poisson)."
    return (
        f"Rounds of training carry noise that is correlated over {banded.band} of them; people take turns, and nothing "
        "is claimed from sampling."
    )


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
