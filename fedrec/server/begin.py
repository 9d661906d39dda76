"""How a slice begins: room for new items, what everybody took, and the statistic of who took what together."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fedrec.config import BlockSplit, Experiment, StatisticsConfig
from fedrec.data.features import item_features
from fedrec.evaluation.asked import cooccurrence_shapes
from fedrec.models.blend import joined, started, turned
from fedrec.models.build import trained
from fedrec.models.configs import BlendConfig, PopularityConfig, SpectralConfig
from fedrec.params import Array, Params
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import CountTask
from fedrec.server import optimizer
from fedrec.server.gather import Ask, Gathered, Roster, gather
from fedrec.server.judge import grown, initial
from fedrec.server.popular import with_popularity
from fedrec.server.private import private_gather
from fedrec.server.rehearsal import remembered
from fedrec.server.round import Recipe, take_census
from fedrec.server.spectral import Features, added, grown_statistic, projected, spectral_params
from fedrec.server.teach import prior_config
from fedrec.server.work import Event, Work

MOST_EVIDENCE = 1e4
"""Beyond what one person adds to any number of the co-occurrence statistic."""


def begin(work: Work) -> Work:
    """Take the census; if the slice has not begun yet, make room for new items and count."""
    time_slice, recipe = work.time_slice, work.recipe
    training = recipe.experiment.training
    stage = training.base if time_slice.index == 0 else training.later
    roster = take_census(work.trusted, time_slice.fit or time_slice.train, recipe)
    record = {"slice": time_slice.index, "rounds": stage.rounds, "clients": roster.n_clients, "done": work.state.round}
    work.desk.observe(Event("slice", record))
    work = replace(work, roster=roster)
    if work.state.counted != time_slice.index:
        return work
    counted = roster if time_slice.fit is None else take_census(work.trusted, time_slice.train, recipe)
    return _begun(work, counted)


def _begun(work: Work, roster: Roster) -> Work:
    state, time_slice, recipe = work.state, work.time_slice, work.recipe
    experiment, began = recipe.experiment, recipe.clock()
    model = trained(experiment.model)
    params = (
        grown(model, state.released, time_slice.n_items, recipe)
        if state.params and not anew(experiment)
        else {**initial(model, time_slice.n_items, recipe), **recipe.carried}
    )
    memories = _memories(work)
    counted = _count(work, roster)
    total = np.zeros(time_slice.n_items, np.float32)
    before = state.counts.get("counts", np.zeros(0, np.float32))
    total[: len(before)] += before
    total += counted.sums.get("counts", 0.0)
    params = with_popularity(model, params, total, _deviation(recipe, roster.n_clients) * (time_slice.index + 1) ** 0.5)
    down, up = counted.bytes_down, counted.bytes_up
    work = work.blamed(counted.offenders)
    if experiment.training.statistics is not None:
        statistic, prior, params, gathered = _statistic(work, roster, params, total)
        down, up = down + gathered.bytes_down, up + gathered.bytes_up
        kept = {} if work.roster is None or work.roster.n_clients else {**state.adoption, "tried": {}}
        work = work.blamed(gathered.offenders).advanced(statistic=statistic, prior=prior, adoption=kept)
    return work.advanced(
        params=params,
        average={},
        teacher=params if state.released and experiment.training.local.imitate else {},
        anchor=state.released if _holds_on(experiment) else {},
        memory={} if anew(experiment) else optimizer.grow_memory(state.memory, params),
        counts={"counts": total},
        counted=time_slice.index + 1,
        round=0,
        memories=memories,
        lesson={},
        best={},
        stopping={},
        overhead={"seconds": round(recipe.clock() - began, 4), "bytes_down": down, "bytes_up": up},
    )


def _deviation(recipe: Recipe, n_clients: int) -> float:
    """Return the standard deviation of the noise in one slice's counts."""
    if recipe.guard is not None:
        counting = recipe.guard.mechanism(recipe.guard.settings.count, recipe.guard.settings.count_clip)
        return counting.clip_norm * counting.noise_multiplier
    mode = recipe.local
    return 0.0 if mode is None else mode.settings.count_clip * mode.count.noise_multiplier * n_clients**0.5


def _memories(work: Work) -> Params:
    """Return what a later slice rehearses; nothing in the first one, or where nobody asks for it."""
    state, experiment = work.state, work.recipe.experiment
    settings = experiment.training.rehearsal
    if settings is None or not state.params:
        return {}
    counts = state.counts["counts"]
    return remembered(trained(experiment.model), state.released, len(counts), counts, settings, work.key)


def _statistic(work: Work, roster: Roster, params: Params, counts: Array) -> tuple[Params, Params, Params, Gathered]:
    """Gather the slice's statistic, add it to the ones before, and make the spectral model from all of it.

    The space of features is laid down by the first slice's items and their released popularity, and stays.

    Returns:
        the statistic of all slices so far; the parameters of a blend's prior; those that rounds train; what was asked.
    """
    state, time_slice, recipe = work.state, work.time_slice, work.recipe
    settings = recipe.experiment.training.statistics or StatisticsConfig()
    n_items = time_slice.n_items
    task = settings.task(time_slice.train)
    popular = state.statistic.get("popular", counts)
    features = statistic_features(work, popular)
    rank = 0 if features is None else features.shape[1]
    key = work.key.child("statistic")
    inputs = {} if features is None else {"features": features}

    def plan_for(slots: NDArray[np.int64]) -> RoundPlan:
        return RoundPlan(
            time_slice.index, 0, task, PopularityConfig(), n_items, {}, key, recipe.catalog_digest, slots, inputs
        )

    shapes = cooccurrence_shapes(task, n_items, rank)
    guard, ask = recipe.guard, Ask(work.trusted, roster, plan_for, shapes, recipe.experiment.training.timeout_seconds)
    if guard is None:
        got = gather(ask, most=MOST_EVIDENCE)
        if got.n_clients:
            got = replace(got, sums=projected(features, got.sums, got.n_clients))
    else:
        name = f"slice {time_slice.index}: co-occurrence statistic"
        mechanism = guard.mechanism(guard.settings.statistics, 1.0)
        prepare = partial(projected, features)
        got = private_gather(guard, name, mechanism, 1.0, 1.0, ask, prepare)
        counting = guard.mechanism(guard.settings.count, guard.settings.count_clip)
        noise = {"variance": mechanism, "count_variance": counting}
        variances = {
            what: np.full(1, (one.clip_norm * one.noise_multiplier) ** 2, np.float32) for what, one in noise.items()
        }
        got = replace(got, sums={**got.sums, **variances})
    before = state.releases[-1]["n_items"] if state.releases else n_items
    total = {**added(grown_statistic(state.statistic, before, n_items), got.sums), "popular": popular, "counts": counts}
    if settings.recency < 1.0:
        total["recent"] = _recent(state.statistic.get("recent"), state.counts.get("counts"), counts, settings.recency)
    model = recipe.experiment.model
    if isinstance(model, SpectralConfig):
        params = spectral_params(total, counts, model, features, n_items)
    prior: Params = {}
    wanted = prior_config(recipe.experiment)
    if wanted is not None:
        prior = spectral_params(total, counts, wanted, features, n_items)
    first = not state.params or anew(recipe.experiment)
    if isinstance(model, BlendConfig) and model.start == "prior":
        if first:
            params = started(prior, params, model)
        elif roster.n_clients:
            params = (turned if model.follow == "all" else joined)(prior, params, before, model)
    return total, prior, params, got


def _recent(recent: Array | None, before: Array | None, counts: Array, recency: float) -> Array:
    """Return [n] counts in which each older slice weighs `recency` times as much as the next one.

    Args:
        recent: what this returned in the slice before; None in the first.
        before: counts of all slices before; None in the first.
        counts: [n] counts of all slices.
        recency: the factor.
    """
    found = counts.copy()
    if before is not None and recent is not None:
        found[: len(before)] -= before
        found[: len(recent)] += np.float32(recency) * recent
    return found


def statistic_features(work: Work, popular: Array) -> Features | None:
    """Return [n, r] the public space that the statistic is gathered in; None: it is about items alone.

    Args:
        work: the slice.
        popular: counts of the first slice, which lay the space down for good.
    """
    state, settings = work.state, work.recipe.experiment.training.statistics or StatisticsConfig()
    n_items = work.time_slice.n_items
    if not settings.task(work.time_slice.train).feature_share:
        return None
    fitted = state.releases[0]["n_items"] if state.releases else n_items
    return item_features(work.desk.catalog.prefix(n_items), settings.features, fitted, popular)


def _count(work: Work, roster: Roster) -> Gathered:
    time_slice, recipe = work.time_slice, work.recipe
    key = work.key.child("count")
    shapes = {"counts": ((time_slice.n_items,), np.dtype(np.float32))}
    guard, mode = recipe.guard, recipe.local
    clip = None if guard is None else guard.settings.count_clip
    bound, noise = None, None
    if mode is not None:
        clip, bound, noise = mode.settings.count_clip, mode.count_bound(time_slice.n_items), mode.count

    def plan_for(slots: NDArray[np.int64]) -> RoundPlan:
        task, n_items = CountTask(window=time_slice.train, clip_norm=clip, private=noise), time_slice.n_items
        return RoundPlan(time_slice.index, 0, task, PopularityConfig(), n_items, {}, key, recipe.catalog_digest, slots)

    ask = Ask(work.trusted, roster, plan_for, shapes, recipe.experiment.training.timeout_seconds)
    if guard is None:
        return gather(ask, bound=bound, most=1.0 if mode is None else None)
    name = f"slice {time_slice.index}: popularity counts"
    mechanism = guard.mechanism(guard.settings.count, guard.settings.count_clip)
    return private_gather(guard, name, mechanism, 1.0, 1.0, ask)


def _holds_on(experiment: Experiment) -> bool:
    """Whether what a slice began with is needed again."""
    training = experiment.training
    return (
        bool(training.anchor or training.item_mean or training.ewc)
        or experiment.evaluation.promotion_margin is not None
    )


def anew(experiment: Experiment) -> bool:
    """Whether every slice begins with a new model."""
    return isinstance(experiment.split, BlockSplit) and experiment.split.refit == "fresh"
