"""Mode "local" seen from the server: what it asks clients to add, what that costs them, and what may be said of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedrec.config import Experiment
from fedrec.errors import PrivacyError
from fedrec.params import Params, n_values
from fedrec.privacy.accounting import calibrate, check_delta, epsilon
from fedrec.privacy.events import Event, GaussianEvent
from fedrec.privacy.local import adjacency, fit_deviation, unit_name, upload_bound
from fedrec.privacy.settings import LocalNoise, LocalPrivacy, UserUnit, WindowUnit
from fedrec.protocol.task import LocalTraining


@dataclass(frozen=True)
class LocalMode:
    """What the server asks of clients that trust nobody.

    Attributes:
        settings: what the experiment asks for.
        scale: factor on both noise multipliers.
    """

    settings: LocalPrivacy
    scale: float

    @property
    def fit(self) -> LocalNoise:
        """The noise of an update."""
        own = self.settings
        return LocalNoise(unit=own.unit, noise_multiplier=own.fit * self.scale, noise=own.noise)

    @property
    def count(self) -> LocalNoise:
        """The noise of popularity counts, at user level whatever the unit."""
        own = self.settings
        return LocalNoise(unit=UserUnit(), noise_multiplier=own.count * self.scale, noise=own.noise)

    def fit_bound(self, local: LocalTraining, params: Params) -> float:
        """Return the L2 bound of one client's noised update."""
        deviation = fit_deviation(self.fit, local.clip_norm, local.learning_rate, local.steps)
        return upload_bound(local.clip_norm, deviation, n_values(params))

    def count_bound(self, n_items: int) -> float:
        """Return the L2 bound of one client's noised counts."""
        clip = self.settings.count_clip
        return upload_bound(clip, 2.0 * clip * self.count.noise_multiplier, n_items)


def local_mode(experiment: Experiment) -> LocalMode | None:
    """Return what to ask of clients; None: the mode is not "local".

    Raises:
        PrivacyError: the experiment asks for what cannot be had in this mode, or no noise meets the budget.
    """
    settings = experiment.privacy
    if not isinstance(settings, LocalPrivacy):
        return None
    if experiment.training.statistics is not None:
        raise PrivacyError(
            'Co-occurrence statistics are not to be had in privacy.mode = "local": noise on each client would drown '
            'them; leave training.statistics out, or take mode "distributed".'
        )
    if not settings.calibrate:
        return LocalMode(settings, 1.0)
    scale = calibrate(
        lambda factor: [event for _, event in client_life(experiment, factor)], settings.epsilon, settings.delta
    )
    return LocalMode(settings, scale)


def client_life(experiment: Experiment, scale: float) -> list[tuple[str, Event]]:
    """Return what a client pays for if it takes part as often as planned: the counts of every slice, and training.

    Raises:
        PrivacyError: the mode is not "local".
    """
    own = experiment.privacy
    if not isinstance(own, LocalPrivacy):
        raise PrivacyError(f'privacy.mode is "{own.mode}", so clients keep no ledgers of their own.')
    training = experiment.training
    counts = GaussianEvent(noise_multiplier=own.count * scale, count=experiment.n_slices)
    life: list[tuple[str, Event]] = [("popularity counts, one a slice", counts)]
    if not training.base.rounds and not training.later.rounds:
        return life
    steps, sampling = (training.local.steps, own.unit.sampling) if isinstance(own.unit, WindowUnit) else (1, 1.0)
    event = GaussianEvent(noise_multiplier=own.fit * scale, sampling=sampling, count=own.participations * steps)
    each = f", {steps} local steps each" if isinstance(own.unit, WindowUnit) else ""
    return [*life, (f"{own.participations} rounds of training{each}", event)]


def local_plan(experiment: Experiment, population: int | None) -> dict[str, Any]:
    """Return a client's planned life as one document, see `fedrec privacy plan`; delta is held to `population`."""
    mode = local_mode(experiment)
    if mode is None:
        raise PrivacyError(f'privacy.mode is "{experiment.privacy.mode}", so clients keep no ledgers of their own.')
    own, life = mode.settings, client_life(experiment, mode.scale)
    events = [event for _, event in life]
    return {
        "experiment": experiment.name,
        "unit": unit_name(own.unit),
        "adjacency": adjacency(own.unit),
        "budget": own.epsilon,
        "delta": own.delta,
        "population": None,
        "scale": mode.scale,
        "epsilon": epsilon(events, own.delta),
        "epsilon_rdp": epsilon(events, own.delta, "rdp"),
        "warning": check_delta(own.delta, population or 1),
        "events": [{"purpose": name, **event.model_dump(mode="json")} for name, event in life],
    }


def local_statement(settings: LocalPrivacy) -> dict[str, Any]:
    """Return what a report says of a run in mode "local"; epsilon is the most that any client can have spent."""
    unit = unit_name(settings.unit)
    protected = (
        f"protected is {unit}, not a person: whole histories hold many windows, and inserting one interaction shifts "
        "those after it. Each client trains by DP-SGD (Opacus) over its own windows"
        if isinstance(settings.unit, WindowUnit)
        else "protected is a person's whole history. Each client clips its update and adds noise"
    )
    drawn = (
        "the operating system's generator"
        if settings.noise == "system"
        else "the experiment's seed: a simulation that protects nobody"
    )
    return {
        "statement": (
            f"Differential privacy, mode local: nobody is trusted; {protected} before anything leaves it, and its "
            "popularity counts carry noise at user level. "
            f"Adjacency: {adjacency(settings.unit)}. Each client's own ledger stops it at epsilon "
            f"{settings.epsilon:g}, over its whole life; who takes part, and that somebody has interactions in a "
            f"slice, is known to the server. Noise comes from {drawn}. The metrics of this report are exact and NOT "
            'covered by the guarantee (privacy.metrics = "research"). Settings that were tuned on this data are not '
            "accounted for."
        ),
        "unit": unit,
        "adjacency": adjacency(settings.unit),
        "mode": "local",
        "epsilon": settings.epsilon,
        "budget": settings.epsilon,
        "delta": settings.delta,
        "noise": settings.noise,
        "metrics": settings.metrics,
    }
