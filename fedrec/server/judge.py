"""Federated evaluation: the same round machinery, asked for sums of metrics instead of updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedrec.data.slices import FOREVER, LastWindow, TimeSlice, TimeWindow
from fedrec.errors import RunError
from fedrec.evaluation.asked import metric_shapes
from fedrec.evaluation.intervals import Estimate, difference, summarise
from fedrec.evaluation.metrics import metric_names, private_names, private_norm
from fedrec.models.build import build, trained
from fedrec.models.configs import AnyModelConfig, PopularityConfig
from fedrec.models.freeze import PUBLIC, needs_vectors
from fedrec.models.recommender import get_params
from fedrec.params import Params
from fedrec.protocol.link import Link
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import EvaluateTask, FitTask, LocalTraining
from fedrec.server.gather import Ask, Gathered, Roster, gather
from fedrec.server.guard import Guard
from fedrec.server.private import private_gather
from fedrec.server.round import Recipe, take_census
from fedrec.server.sampling import sample
from fedrec.server.state import ServerState

MOST_MEASURED = 1e3
"""Beyond what one person adds to any sum of metrics, bootstrap weights included."""
COMPARED = ("ndcg", "hr", "recall")


@dataclass(frozen=True)
class Contender:
    """One row of the table: a model, and whether each client trains it alone first."""

    model: AnyModelConfig
    params: Params
    personalise: FitTask | None = None
    people: int | None = None


def judge(
    contenders: Mapping[str, Contender], time_slice: TimeSlice, link: Link, recipe: Recipe, popularity: Params
) -> dict[str, Any]:
    """Evaluate every contender on the slice's test window, all on the same people with the same bootstrap weights.

    Args:
        contenders: name of the row to what is evaluated; the first is what the others are compared with.
        time_slice: what to predict.
        link: how to reach the nodes.
        recipe: the experiment.
        popularity: {"counts": [n_items_test]} released counts, for novelty.

    Returns:
        ``rows``: name to group to ``{"n", "metrics": {metric: {"value", "low", "high"}}}``; ``differences``: the first
        contender minus each other, metric to estimate; ``bytes_down``, ``bytes_up``, ``refused``.
    """
    settings = recipe.experiment.evaluation
    roster = take_census(link, time_slice.test, recipe)
    names = metric_names(settings.ks)
    tallies: dict[str, Gathered] = {
        name: _ask(contender, time_slice, link, recipe, roster, popularity) for name, contender in contenders.items()
    }
    first, *others = contenders
    rows = {name: as_rows(summarise(got.sums, names)) for name, got in tallies.items() if got.n_clients}
    differences = {
        other: {
            f"{metric}@{k}": as_json(difference(tallies[first].sums, tallies[other].sums, names, f"{metric}@{k}"))
            for metric in COMPARED
            for k in settings.ks
        }
        for other in others
        if other in rows and contenders[other].people is None and _same_people(tallies[first], tallies[other])
    }
    return {
        "rows": rows,
        "differences": differences,
        "bytes_down": sum(got.bytes_down for got in tallies.values()),
        "bytes_up": sum(got.bytes_up for got in tallies.values()),
        "refused": [refusal for got in tallies.values() for refusal in got.refused],
        "offenders": [node for got in tallies.values() for node in got.offenders],
    }


def judge_life(
    contender: Contender, time_slice: TimeSlice, link: Link, recipe: Recipe, popularity: Params
) -> tuple[list[dict[str, Any]], int, int]:
    """Evaluate a release on the test window of every slice of the life, older and newer ones.

    Who was new in a slice, and which items were, is judged by that slice.

    Returns:
        One record per slice, group to ``{"n", "metrics": {metric: {"value", "low", "high"}}}``, without groups where
        nobody was tested; bytes down and up.
    """
    names, found = metric_names(recipe.experiment.evaluation.ks), []
    down = up = 0
    born = time_slice.born or ((None, time_slice.n_items),) * len(time_slice.life)
    for window, (since, n_items) in zip(time_slice.life, born, strict=True):
        asked = replace(time_slice, test=window, since=since, n_items=n_items)
        got = _ask(contender, asked, link, recipe, take_census(link, window, recipe), popularity)
        found.append(as_rows(summarise(got.sums, names)) if got.n_clients else {})
        down, up = down + got.bytes_down, up + got.bytes_up
    return found, down, up


def _same_people(a: Gathered, b: Gathered) -> bool:
    """Whether two evaluations reached the same clients, so that they can be compared person by person."""
    return a.n_clients > 0 and np.allclose(a.sums["weight.all"], b.sums["weight.all"])


def _ask(
    contender: Contender, time_slice: TimeSlice, link: Link, recipe: Recipe, roster: Roster, popularity: Params
) -> Gathered:
    experiment = recipe.experiment
    task, plan_for = _question(contender, time_slice, recipe, popularity)
    places = np.arange(roster.n_clients, dtype=np.int64)
    if contender.people is not None:
        from fedrec.learning import FixedCohort

        people = ServerState.root_key(experiment).child("slice", time_slice.index, "judge", "people")
        places = sample(FixedCohort(size=contender.people), roster.n_clients, people)
    shapes = metric_shapes(task, time_slice.n_items_test)
    return gather(Ask(link, roster, plan_for, shapes, experiment.training.timeout_seconds), places, most=MOST_MEASURED)


def _question(
    contender: Contender, time_slice: TimeSlice, recipe: Recipe, popularity: Params, private: bool = False
) -> tuple[EvaluateTask, Callable[[NDArray[np.int64]], RoundPlan]]:
    """Return what is asked about a contender, and the plan that asks it of a node's slots."""
    settings = recipe.experiment.evaluation
    key = ServerState.root_key(recipe.experiment).child("slice", time_slice.index, "judge")
    task = EvaluateTask(
        window=time_slice.test,
        probes=settings.probes,
        known=time_slice.known,
        masked=time_slice.masked,
        new_since=time_slice.since,
        ks=settings.ks,
        replicates=0 if private else settings.replicates,
        n_known_items=time_slice.n_items,
        sampled_negatives=None if private else settings.sampled_negatives,
        private=private,
        personalise=contender.personalise,
    )
    params = grown(contender.model, contender.params, time_slice.n_items_test, recipe)

    def plan_for(slots: NDArray[np.int64]) -> RoundPlan:
        return RoundPlan(
            time_slice.index,
            0,
            task,
            contender.model,
            time_slice.n_items_test,
            params,
            key,
            recipe.catalog_digest,
            slots,
            {"popularity": popularity["counts"]},
        )

    return task, plan_for


def judge_privately(
    guard: Guard,
    contenders: Mapping[str, Contender],
    time_slice: TimeSlice,
    link: Link,
    recipe: Recipe,
    popularity: Params,
) -> dict[str, Any]:
    """Evaluate contenders with noise and a charge for each; returns what `judge` does, without differences.

    Of everybody in the test window `fedrec.evaluation.metrics.private_names` are known, and how many people that is,
    each with the noise of one release.
    """
    ks = recipe.experiment.evaluation.ks
    roster = take_census(link, time_slice.test, recipe)
    names, bound = private_names(ks), private_norm(ks)
    mechanism = guard.mechanism(guard.settings.metrics_noise, bound)
    shapes = {"metrics": ((len(names) + 1,), np.dtype(np.float64))}
    rows: dict[str, Any] = {}
    asked: list[Gathered] = []
    for name, contender in contenders.items():
        _, plan_for = _question(contender, time_slice, recipe, popularity, private=True)
        purpose = f"slice {time_slice.index}: metrics of {name}"
        timeout = recipe.experiment.training.timeout_seconds
        got = private_gather(guard, purpose, mechanism, 1.0, 1.0, Ask(link, roster, plan_for, shapes, timeout))
        asked.append(got)
        *sums, n_people = got.sums["metrics"].tolist()
        deviation = bound * mechanism.noise_multiplier
        rows[name] = {"all": _noised_row(names, sums, n_people, deviation)}
    return {
        "rows": rows,
        "differences": {},
        "bytes_down": sum(got.bytes_down for got in asked),
        "bytes_up": sum(got.bytes_up for got in asked),
        "refused": [refusal for got in asked for refusal in got.refused],
        "offenders": [node for got in asked for node in got.offenders],
    }


def _noised_row(names: Sequence[str], sums: Sequence[float], n_people: float, deviation: float) -> dict[str, Any]:
    """Return noised means as JSON, each with a 95 % interval for both the noise and the choice of people.

    A metric in [0, 1] with mean m has a variance of at most ``m (1 - m)``; the noise on the ratio s / n has the
    standard deviation ``sd sqrt(1 + m^2) / n`` to first order.
    """
    n = max(n_people, 1.0)
    metrics: dict[str, Any] = {}
    for name, total in zip(names, sums, strict=True):
        mean = min(1.0, max(0.0, total / n))
        width = 1.96 * math.sqrt(mean * (1.0 - mean) / n + deviation**2 * (1.0 + mean**2) / n**2)
        metrics[name] = {"value": mean, "low": max(0.0, mean - width), "high": min(1.0, mean + width)}
    return {"n": max(0, round(n_people)), "metrics": metrics}


def grown(model: AnyModelConfig, params: Params, n_items: int, recipe: Recipe) -> Params:
    """Return the parameters grown to `n_items`; the values of new rows depend on the experiment's seed only."""
    key = ServerState.root_key(recipe.experiment).child("model")
    config_key = key.child(model.kind)
    rows = max((len(value) for name, value in params.items() if name in _row_names(model)), default=0)
    if rows == n_items:
        return params
    from fedrec.models.build import restore

    return placed(model, get_params(restore(model, rows, params).grow(n_items, config_key)), recipe)


def initial(model: AnyModelConfig, n_items: int, recipe: Recipe) -> Params:
    """Return the parameters of a fresh model."""
    fresh = get_params(build(model, n_items, ServerState.root_key(recipe.experiment).child("model", model.kind)))
    return placed(model, fresh, recipe)


def placed(model: AnyModelConfig, params: Params, recipe: Recipe) -> Params:
    """Return the parameters with the public vectors of all items in their place, those that have just joined too.

    Raises:
        RunError: the recipe has no vectors.
    """
    if not needs_vectors(model):
        return params
    if recipe.vectors is None:
        raise RunError("This model knows items by public vectors, and the run was given none.")
    return {**params, PUBLIC: recipe.vectors[: len(params[PUBLIC])]}


def _row_names(model: AnyModelConfig) -> frozenset[str]:
    from fedrec.models.build import MODELS

    names: frozenset[str] = MODELS[type(model)].row_names
    return names


def popularity_contender(counts: Params) -> Contender:
    """Return the popularity row: everybody gets what most people took so far."""
    return Contender(PopularityConfig(), counts)


def local_only_contender(recipe: Recipe, time_slice: TimeSlice) -> Contender:
    """Return the local-only row: a fresh model that each client trains alone on all that it did before the test."""
    settings, model = recipe.experiment.evaluation.local_only, trained(recipe.experiment.model)
    fit = FitTask(window=_so_far(time_slice.train), local=settings.training)
    return Contender(model, initial(model, time_slice.n_items, recipe), fit, settings.people)


def adapted_contender(recipe: Recipe, time_slice: TimeSlice, params: Params, local: LocalTraining) -> Contender:
    """Return the row of a release of which each client first trains a copy on all that is known of it."""
    known = time_slice.known or time_slice.validation or time_slice.train
    return Contender(recipe.experiment.model, params, FitTask(window=_so_far(known), local=local))


def _so_far(window: TimeWindow | LastWindow) -> TimeWindow | LastWindow:
    """Return all of a history up to the end of a window."""
    if isinstance(window, TimeWindow):
        return TimeWindow(start=-FOREVER, end=window.end)
    return LastWindow(skip=window.skip)


def as_json(estimate: Estimate) -> dict[str, float | None]:
    """Return an estimate as JSON."""
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def as_rows(summary: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    """Return groups of estimates as JSON: ``{group: {"n": people, "metrics": {name: estimate}}}``."""
    return {
        group: {
            "n": max(estimate.n for estimate in metrics.values()),
            "metrics": {name: as_json(estimate) for name, estimate in metrics.items()},
        }
        for group, metrics in summary.items()
    }
