"""The last part of learning a slice: who teaches the next release, on what, and how a killed server goes on with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedrec.config import Experiment
from fedrec.data.slices import TimeSlice
from fedrec.errors import ConfigError
from fedrec.models.build import restore, trained
from fedrec.models.configs import AnyModelConfig, BlendConfig, SpectralConfig
from fedrec.models.recommender import Recommender
from fedrec.models.transfer import DistilConfig
from fedrec.params import Params
from fedrec.random import Key
from fedrec.server.distil import Teacher, distilled, entropy, had_before, matched_temperature
from fedrec.server.judge import grown
from fedrec.server.registry import Registry
from fedrec.server.round import Recipe
from fedrec.server.state import ServerState
from fedrec.server.synthetic import Source, first_shares, sample_histories
from fedrec.server.work import Work

PROBED = 64
"""Histories on which temperatures are matched."""
COST = 0.0
"""Epsilon of distillation: everything it reads was released before."""


def check_distil(experiment: Experiment) -> None:
    """Raise what makes distillation impossible in an experiment.

    Raises:
        ConfigError: a teacher or a source is asked for that will not be there, or nothing is fitted.
    """
    settings = experiment.training.distil
    if settings is None:
        return
    transfer = settings.transfer
    if isinstance(experiment.model, SpectralConfig):
        raise ConfigError(
            "A spectral model is made from the statistic and not taught; leave out [training.distil] or choose another "
            "model.kind."
        )
    if experiment.training.statistics is None and (settings.statistic or transfer.statistic):
        raise ConfigError(
            "The statistic is to teach, but none is gathered; add a table [training.statistics], or set "
            "training.distil.statistic and training.distil.transfer.statistic to 0."
        )
    if transfer.statistic and not settings.statistic and not isinstance(experiment.model, BlendConfig):
        raise ConfigError(
            "Histories cannot be drawn from a statistic that does not teach; set training.distil.transfer.statistic to "
            "0 or training.distil.statistic above it."
        )
    if not settings.statistic + settings.fitted:
        raise ConfigError(
            "In the first slice there is no previous release, so somebody else must teach; set "
            "training.distil.statistic or training.distil.fitted above 0."
        )
    if not transfer.statistic + transfer.fitted + transfer.popularity:
        raise ConfigError(
            "In the first slice histories cannot be drawn from a previous release; set a weight of another source in "
            "training.distil.transfer above 0."
        )


def prior_config(experiment: Experiment) -> SpectralConfig | None:
    """Return how the statistic becomes a spectral model beside what rounds train; None where nobody wants one."""
    if isinstance(experiment.model, BlendConfig):
        return experiment.model.prior
    distil = experiment.training.distil
    return distil.prior if distil is not None and distil.statistic else None


def teach(work: Work) -> Work:
    """Let all that the server has teach the fitted model, from where the state stands; stored every so many steps.

    In a slice in which nobody did anything there is nothing new to teach.
    """
    state, time_slice, recipe = work.state, work.time_slice, work.recipe
    settings = recipe.experiment.training.distil
    if settings is None or state.lesson.get("done") or (work.roster is not None and not work.roster.n_clients):
        return work
    began, checkpoint = recipe.clock(), work.desk.checkpoint
    key = work.key.child("distil")
    if not state.lesson:
        start = state.released
        state = state.advanced(study={f"fitted:{n}": v for n, v in start.items()}, params=start, average={})
    fitted = {name.removeprefix("fitted:"): v for name, v in state.study.items() if name.startswith("fitted:")}
    models = _models(state, fitted, time_slice, recipe, work.desk.registry)
    teachers, report = _calibrated(models, settings, state, key)
    histories = transfer_set(teachers, settings, state, length_of(settings, models["fitted"][0]), key)
    state = state.advanced(lesson={**report, "step": state.lesson.get("step", 0), "loss": state.lesson.get("loss", [])})
    config, every = trained(recipe.experiment.model), recipe.experiment.runtime.checkpoint_every
    wanted = [one for one in teachers if one.weight > 0]
    memory = {n.removeprefix("memory:"): v for n, v in state.study.items() if n.startswith("memory:")}
    kept = {n: v for n, v in state.study.items() if n.startswith("fitted:")}
    student = restore(config, time_slice.n_items, state.params)
    for now in distilled(student, wanted, histories, key, settings, state.lesson["step"], memory):
        state = state.advanced(
            params=now.params,
            study={**kept, **{f"memory:{n}": v for n, v in now.memory.items()}},
            lesson={**state.lesson, "step": now.done, "loss": [*state.lesson["loss"], round(now.loss, 6)]},
        )
        if now.done % every == 0 and now.done < settings.steps:
            checkpoint(state)
    spent = {**state.overhead, "seconds": state.overhead["seconds"] + round(recipe.clock() - began, 4)}
    losses = state.lesson["loss"]
    state = state.advanced(
        study={}, overhead=spent, lesson={**state.lesson, "done": True, "loss": [losses[0], losses[-1]]}
    )
    checkpoint(state)
    return replace(work, state=state)


def length_of(settings: DistilConfig, student: Recommender) -> int:
    """Return how long synthetic histories are."""
    return settings.transfer.length or student.spec.length - (student.spec.kind == "causal")


def _models(
    state: ServerState, fitted: Params, time_slice: TimeSlice, recipe: Recipe, registry: Registry
) -> dict[str, tuple[Recommender, float, NDArray[np.float32]]]:
    """Return who may teach: name to model, weight and what it knows."""
    experiment, n = recipe.experiment, time_slice.n_items
    settings = experiment.training.distil
    assert settings is not None
    everything = np.ones(n, np.float32)
    found = {"fitted": (restore(trained(experiment.model), n, fitted), settings.fitted, everything)}
    prior = prior_config(experiment)
    if prior is not None and state.prior and settings.statistic:
        found["statistic"] = (restore(prior, n, state.prior), settings.statistic, reliability(state.statistic, n))
    tiers, student = experiment.training.tiers, experiment.training.student
    if tiers is not None and student is not None:
        found["small"] = (restore(student.model, n, state.small), tiers.weight, everything)
    if state.parent is not None:
        before = registry.load(state.parent)
        model: AnyModelConfig = experiment.model
        params = grown(model, before.params, n, recipe)
        known = (np.arange(n) < before.manifest.n_items).astype(np.float32)
        found["previous"] = (restore(model, n, params), settings.previous, known)
    return found


def reliability(statistic: Params, n_items: int) -> NDArray[np.float32]:
    r"""Return [n] how far the statistic knows each item: ``(c_i^2 - \sigma^2)^+ / c_i^2`` of its noised counts.

    Without noise that is 1 for every item that anybody took, and 0 for the others.
    """
    counts = np.maximum(np.asarray(statistic["counts"], np.float64), 0.0)
    variance = float(statistic["count_variance"][0]) if "count_variance" in statistic else 0.0
    square = np.square(counts)
    return np.divide(np.maximum(square - variance, 0.0), square, out=np.zeros(n_items), where=square > 0).astype(
        np.float32
    )


def _calibrated(
    models: Mapping[str, tuple[Recommender, float, NDArray[np.float32]]],
    settings: DistilConfig,
    state: ServerState,
    key: Key,
) -> tuple[list[Teacher], dict[str, Any]]:
    """Return the teachers at temperatures that make them as sure as the fitted model, whose loss was a softmax."""
    fitted, _, known = models["fitted"]
    n = len(known)
    own = sample_histories(
        Source(fitted), first_shares(state.counts["counts"]), PROBED, length_of(settings, fitted), key.child("probe")
    )
    items = torch.from_numpy(own)
    places = torch.arange(1, own.shape[1] + 1, max(1, own.shape[1] // 8)).expand(len(own), -1)
    had = had_before(items, places, n)

    @torch.no_grad()
    def scores(model: Recommender, of: NDArray[np.float32]) -> torch.Tensor:
        out = had | (torch.from_numpy(of) <= 0)
        return model.score(model.states(items, places).flatten(0, 1)).masked_fill(out, float("-inf"))

    wanted = entropy(scores(fitted, known), 1.0)
    teachers, told = [], {}
    for name, (model, weight, of) in models.items():
        temperature = 1.0 if name == "fitted" else matched_temperature(scores(model, of), wanted)
        teachers.append(Teacher(name, model, weight, of, temperature))
        told[name] = {"weight": weight, "temperature": round(temperature, 6), "knows": round(float(of.mean()), 4)}
    return teachers, {"teachers": told, "entropy": round(wanted, 4), "epsilon": COST}


def transfer_set(
    teachers: list[Teacher], settings: DistilConfig, state: ServerState, length: int, key: Key
) -> NDArray[np.int64]:
    """Return [n, l] synthetic histories, drawn from the sources in proportion to their weights."""
    wanted = settings.transfer
    sources: dict[str, Source] = {one.name: Source(one.model, one.temperature, one.known) for one in teachers}
    sources["popularity"] = Source(None)
    weights = {name: getattr(wanted, name, 0.0) for name in sources}
    total = sum(weights.values())
    first, parts, left = first_shares(state.counts["counts"]), [], wanted.histories
    for place, (name, weight) in enumerate(weights.items()):
        n = left if place == len(weights) - 1 and weight else min(left, round(wanted.histories * weight / total))
        parts.append(sample_histories(sources[name], first, n, length, key.child("histories", name)))
        left -= n
    return np.concatenate(parts)
