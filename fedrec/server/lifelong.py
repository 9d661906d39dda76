"""The lifelong loop: learn a slice, be tested on the next, publish a release, go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedrec import params as named
from fedrec.config import BlockSplit, EvaluationConfig, Experiment, StatisticsConfig
from fedrec.data.catalog import ItemCatalog
from fedrec.data.features import item_features
from fedrec.data.slices import TimeSlice
from fedrec.evaluation.asked import cooccurrence_shapes
from fedrec.models.blend import started
from fedrec.models.build import trained
from fedrec.models.configs import BlendConfig, NearestConfig, PopularityConfig, SpectralConfig
from fedrec.params import Array, Params
from fedrec.privacy.settings import LocalPrivacy
from fedrec.protocol.codec import Plain
from fedrec.protocol.link import Link
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import CountTask
from fedrec.server import optimizer
from fedrec.server.adopt import adopted, release_of
from fedrec.server.drift import watched
from fedrec.server.fisher import weighed
from fedrec.server.gather import Ask, Gathered, Roster, gather
from fedrec.server.guard import Guard, statement
from fedrec.server.judge import (
    Contender,
    grown,
    initial,
    judge,
    judge_life,
    judge_privately,
    local_only_contender,
    popularity_contender,
)
from fedrec.server.local import local_statement
from fedrec.server.private import private_gather
from fedrec.server.quarantine import newly_quarantined, trusted
from fedrec.server.registry import Registry
from fedrec.server.rehearsal import remembered
from fedrec.server.release import Release, Student
from fedrec.server.round import Recipe, run_round, take_census
from fedrec.server.spectral import added, grown_statistic, projected, spectral_params
from fedrec.server.state import ServerState
from fedrec.server.student import device_student
from fedrec.server.teach import prior_config, taught
from fedrec.server.tiers import begun, small_round, tier_of

MOST_EVIDENCE = 1e4
"""Beyond what one person adds to any number of the co-occurrence statistic."""
PRIVACY = {
    "statement": "Not private: no noise is added. Clients send the exact sums of their updates, counts and metrics.",
    "unit": "user",
    "epsilon": None,
    "delta": None,
}
"""What a run without a lossy or telling codec says."""


def privacy(experiment: Experiment, guard: Guard | None = None) -> dict[str, Any]:
    """Return the privacy statement of an experiment: what is protected, what was spent, what the codec gives away."""
    if guard is not None:
        return statement(guard)
    if isinstance(experiment.privacy, LocalPrivacy):
        return local_statement(experiment.privacy)
    codec = experiment.training.codec
    if isinstance(codec, Plain):
        return dict(PRIVACY)
    words = (
        "Not private: no noise is added. Clients send the sums of their updates as the codec "
        f"'{codec.kind}' writes them, which hides nothing, and the exact sums of their counts and metrics."
    )
    return {**PRIVACY, "statement": f"{words} {codec.reveals}".rstrip()}


@dataclass(frozen=True)
class Event:
    """Something that an observer may show: "slice", "round", "evaluate" or "release", with its record."""

    kind: str
    record: dict[str, Any]


Observer = Callable[[Event], None]
Checkpoint = Callable[[ServerState], None]


@dataclass(frozen=True)
class Desk:
    """Where a run leaves its results.

    Attributes:
        registry: takes the releases.
        catalog: the public catalogue, published with them.
        checkpoint: stores the state, so that a killed run can go on.
        observe: is told what happens.
        due: returns when a slice may begin.
    """

    registry: Registry
    catalog: ItemCatalog
    checkpoint: Checkpoint
    observe: Observer
    due: Callable[[TimeSlice], None] = lambda time_slice: None


def run_stream(
    state: ServerState, link: Link, slices: Sequence[TimeSlice], recipe: Recipe, desk: Desk
) -> Iterator[tuple[ServerState, Release]]:
    """Go through the slices from where `state` stands, and yield the new state with each release.

    Every step is a function of the state, so a run that was killed and resumed publishes the same bytes.

    Raises:
        RunError: no node or no client is there, or all fail.
        RegistryError: a release or a checkpoint cannot be written.
    """
    whole = recipe.guard
    for time_slice in slices[state.slice :]:
        guard = None if whole is None else whole.at(time_slice.index)
        recipe = replace(recipe, guard=guard, tier=tier_of(recipe.experiment, small=False))
        desk.due(time_slice)
        if time_slice.index and state.counted == time_slice.index:
            state = weighed(state, link, slices[time_slice.index - 1], recipe)
        state = _learn(state, link, time_slice, recipe, desk)
        if recipe.experiment.training.distil is not None:
            state = taught(state, time_slice, recipe, desk.registry, desk.checkpoint)
        desk.observe(Event("evaluate", {"slice": time_slice.index}))
        began, allowed = recipe.clock(), trusted(link, state, recipe.experiment)
        if isinstance(recipe.experiment.model, BlendConfig):
            state = adopted(state, recipe.experiment.model, time_slice, allowed, recipe)
        student = _student(state, time_slice, recipe)
        if student is not None and recipe.experiment.training.tiers is not None:
            state = state.advanced(small=student.params)
        verdict = _verdict(state, allowed, time_slice, recipe, desk.registry, student)
        state = _blamed(state, verdict["offenders"], recipe, desk)
        verdict["seconds"] = round(recipe.clock() - began, 3)
        state, release = _publish(state, time_slice, verdict, recipe, desk, student)
        desk.checkpoint(state)
        desk.observe(Event("release", state.releases[-1]))
        yield state, release


def _learn(state: ServerState, link: Link, time_slice: TimeSlice, recipe: Recipe, desk: Desk) -> ServerState:
    """Grow the model to the slice's catalogue, count, and train all rounds that are not done yet."""
    training = recipe.experiment.training
    stage = training.base if time_slice.index == 0 else training.later
    allowed = trusted(link, state, recipe.experiment)
    roster = take_census(allowed, time_slice.fit or time_slice.train, recipe)
    record = {"slice": time_slice.index, "rounds": stage.rounds, "clients": roster.n_clients, "done": state.round}
    desk.observe(Event("slice", record))
    if state.counted == time_slice.index:
        counted = roster if time_slice.fit is None else take_census(allowed, time_slice.train, recipe)
        state = begun(_begin(state, allowed, time_slice, recipe, counted, desk), time_slice, recipe)
    for number in range(state.round, stage.rounds):
        allowed = trusted(link, state, recipe.experiment)
        if set(allowed.nodes()) != {node for node, _, _ in roster.nodes}:
            roster = take_census(allowed, time_slice.fit or time_slice.train, recipe)
        state = small_round(state, allowed, recipe, time_slice, roster)
        before = state
        state, record = run_round(state, allowed, recipe, time_slice, roster)
        desk.observe(Event("round", record))
        for one in newly_quarantined(before, state, recipe.experiment):
            desk.observe(Event("quarantine", one))
        if recipe.guard is not None or (number + 1) % recipe.experiment.runtime.checkpoint_every == 0:
            desk.checkpoint(state)
    return state


def _blamed(state: ServerState, offenders: Sequence[int], recipe: Recipe, desk: Desk) -> ServerState:
    """Return the state with these offences, and tell of nodes that come into quarantine."""
    after = state.blamed(offenders)
    for one in newly_quarantined(state, after, recipe.experiment):
        desk.observe(Event("quarantine", one))
    return after


def _begin(
    state: ServerState, link: Link, time_slice: TimeSlice, recipe: Recipe, roster: Roster, desk: Desk
) -> ServerState:
    """Make room for new items and add the slice's popularity counts."""
    model, began = trained(recipe.experiment.model), recipe.clock()
    params = (
        grown(model, state.released, time_slice.n_items, recipe)
        if state.params and not anew(recipe.experiment)
        else {**initial(model, time_slice.n_items, recipe), **recipe.carried}
    )
    memories = _memories(state, time_slice, recipe)
    counted = _count(link, time_slice, recipe, roster)
    before = state.counts.get("counts", np.zeros(0, np.float32))
    total = np.zeros(time_slice.n_items, np.float32)
    total[: len(before)] += before
    total += counted.sums.get("counts", 0.0)
    spent = counted
    state = _blamed(state, counted.offenders, recipe, desk)
    if recipe.experiment.training.statistics is not None:
        statistic, prior, params, gathered = _statistic(state, link, time_slice, recipe, roster, desk, params, total)
        spent = replace(
            counted,
            bytes_down=counted.bytes_down + gathered.bytes_down,
            bytes_up=counted.bytes_up + gathered.bytes_up,
        )
        state = _blamed(state, gathered.offenders, recipe, desk)
        state = state.advanced(statistic=statistic, prior=prior, adoption={})
    return state.advanced(
        params=params,
        average={},
        teacher=params if state.released and recipe.experiment.training.local.imitate else {},
        anchor=state.released if _holds_on(recipe.experiment) else {},
        memory={} if anew(recipe.experiment) else optimizer.grow_memory(state.memory, params),
        counts={"counts": total},
        counted=time_slice.index + 1,
        round=0,
        memories=memories,
        lesson={},
        overhead={
            "seconds": round(recipe.clock() - began, 4),
            "bytes_down": spent.bytes_down,
            "bytes_up": spent.bytes_up,
        },
    )


def _memories(state: ServerState, time_slice: TimeSlice, recipe: Recipe) -> Params:
    """Return what a later slice rehearses; nothing in the first one, or where nobody asks for it."""
    settings, model = recipe.experiment.training.rehearsal, trained(recipe.experiment.model)
    if settings is None or not state.params:
        return {}
    key = ServerState.root_key(recipe.experiment).child("slice", time_slice.index)
    counts = state.counts["counts"]
    return remembered(model, state.released, len(counts), counts, settings, key)


def _statistic(
    state: ServerState,
    link: Link,
    time_slice: TimeSlice,
    recipe: Recipe,
    roster: Roster,
    desk: Desk,
    params: Params,
    counts: Array,
) -> tuple[Params, Params, Params, Gathered]:
    """Gather the slice's statistic, add it to the ones before, and make the spectral model from all of it.

    The space of features is laid down by the first slice's items and their released popularity, and stays.

    Returns:
        the statistic of all slices so far; the parameters of a blend's prior; those that rounds train; what was asked.
    """
    settings = recipe.experiment.training.statistics or StatisticsConfig()
    n_items = time_slice.n_items
    task = settings.task(time_slice.train)
    fitted = state.releases[0]["n_items"] if state.releases else n_items
    popular, catalog = state.statistic.get("popular", counts), desk.catalog.prefix(n_items)
    features = item_features(catalog, settings.features, fitted, popular) if task.feature_share else None
    rank = 0 if features is None else features.shape[1]
    key = ServerState.root_key(recipe.experiment).child("slice", time_slice.index, "statistic")
    inputs = {} if features is None else {"features": features}

    def plan_for(slots: NDArray[np.int64]) -> RoundPlan:
        return RoundPlan(
            time_slice.index, 0, task, PopularityConfig(), n_items, {}, key, recipe.catalog_digest, slots, inputs
        )

    shapes = cooccurrence_shapes(task, n_items, rank)
    guard, ask = recipe.guard, Ask(link, roster, plan_for, shapes, recipe.experiment.training.timeout_seconds)
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
    model = recipe.experiment.model
    if isinstance(model, SpectralConfig):
        params = spectral_params(total, counts, model, features, n_items)
    prior: Params = {}
    wanted = prior_config(recipe.experiment)
    if wanted is not None:
        prior = spectral_params(total, counts, wanted, features, n_items)
    first = not state.params or anew(recipe.experiment)
    if isinstance(model, BlendConfig) and first and model.start == "prior":
        params = started(prior, params, model)
    return total, prior, params, got


def _count(link: Link, time_slice: TimeSlice, recipe: Recipe, roster: Roster) -> Gathered:
    key = ServerState.root_key(recipe.experiment).child("slice", time_slice.index, "count")
    shapes = {"counts": ((time_slice.n_items,), np.dtype(np.float32))}
    guard, mode = recipe.guard, recipe.local
    clip = None if guard is None else guard.settings.count_clip
    bound, noise = None, None
    if mode is not None:
        clip, bound, noise = mode.settings.count_clip, mode.count_bound(time_slice.n_items), mode.count

    def plan_for(slots: NDArray[np.int64]) -> RoundPlan:
        task, n_items = CountTask(window=time_slice.train, clip_norm=clip, private=noise), time_slice.n_items
        return RoundPlan(time_slice.index, 0, task, PopularityConfig(), n_items, {}, key, recipe.catalog_digest, slots)

    ask = Ask(link, roster, plan_for, shapes, recipe.experiment.training.timeout_seconds)
    if guard is None:
        return gather(ask, bound=bound, most=1.0 if mode is None else None)
    name = f"slice {time_slice.index}: popularity counts"
    mechanism = guard.mechanism(guard.settings.count, guard.settings.count_clip)
    return private_gather(guard, name, mechanism, 1.0, 1.0, ask)


def _student(state: ServerState, time_slice: TimeSlice, recipe: Recipe) -> Student | None:
    """Return the release's device student, a function of the state; None where none is wanted."""
    settings, model = recipe.experiment.training.student, recipe.experiment.model
    if settings is None:
        return None
    key = ServerState.root_key(recipe.experiment).child("slice", time_slice.index, "student")
    tiers = recipe.experiment.training.tiers
    own = 0.0 if tiers is None else tiers.own
    released, counts = release_of(state, model), state.counts["counts"]
    return device_student(model, released, counts, settings, time_slice.n_items, key, state.small or None, own)


def _verdict(
    state: ServerState,
    link: Link,
    time_slice: TimeSlice,
    recipe: Recipe,
    registry: Registry,
    student: Student | None = None,
) -> dict[str, Any]:
    """Evaluate the new release beside the previous one, popularity and local-only."""
    model = recipe.experiment.model
    contenders = {"release": Contender(model, release_of(state, model))}
    private = recipe.guard is not None and recipe.guard.settings.metrics == "private"
    wanted = not private or recipe.experiment.evaluation.promotion_margin is not None
    if state.parent is not None and wanted:
        contenders["previous"] = Contender(model, registry.load(state.parent).params)
    contenders["popularity"] = popularity_contender(state.counts)
    settings = recipe.experiment.training.student
    if student is not None and settings is not None and not private:
        contenders["student"] = Contender(settings.model, student.params)
    alone = recipe.experiment.evaluation.local_only.people and not isinstance(model, SpectralConfig | NearestConfig)
    if alone and not private:
        contenders["local_only"] = local_only_contender(recipe, time_slice)
    counts = np.zeros(time_slice.n_items_test, np.float32)
    counts[: len(state.counts["counts"])] = state.counts["counts"]
    if recipe.guard is not None and private:
        return judge_privately(recipe.guard, contenders, time_slice, link, recipe, {"counts": counts})
    verdict = judge(contenders, time_slice, link, recipe, {"counts": counts})
    if time_slice.life:
        life, down, up = judge_life(contenders["release"], time_slice, link, recipe, {"counts": counts})
        verdict |= {"life": life, "bytes_down": verdict["bytes_down"] + down, "bytes_up": verdict["bytes_up"] + up}
    return verdict


def _spent(recipe: Recipe) -> float | None:
    """Return the epsilon spent so far; in mode "local" the most that any client can have spent."""
    if recipe.guard is not None:
        return recipe.guard.ledger.spent()
    return None if recipe.local is None else recipe.local.settings.epsilon


def _publish(
    state: ServerState,
    time_slice: TimeSlice,
    verdict: dict[str, Any],
    recipe: Recipe,
    desk: Desk,
    student: Student | None = None,
) -> tuple[ServerState, Release]:
    """Write the release, and move the state on to the next slice."""
    experiment = recipe.experiment
    promoted = worth_promoting(verdict["rows"], experiment.evaluation)
    params = release_of(state, experiment.model)
    release = desk.registry.publish(
        params,
        desk.catalog.prefix(time_slice.n_items),
        run=state.run,
        slice=time_slice.index,
        parent=state.parent,
        model=experiment.model.model_dump(mode="json"),
        experiment=experiment.model_dump(mode="json", exclude={"runtime"}),
        experiment_digest=experiment.digest(),
        metrics=verdict["rows"],
        privacy=privacy(experiment, recipe.guard),
        lesson=dict(state.lesson) or None,
        student=student,
        promote=promoted,
    )
    own = [record for record in state.rounds if record["slice"] == time_slice.index]
    record = {
        "version": release.version,
        "slice": time_slice.index,
        "digest": release.manifest.sha256,
        "parent": state.parent,
        "promoted": promoted,
        "n_items": time_slice.n_items,
        "train_rows": round(float(state.counts["counts"].sum())) - sum(r["train_rows"] for r in state.releases),
        "train_start": getattr(time_slice.train, "start", None),
        "train_end": getattr(time_slice.train, "end", None),
        "test_end": getattr(time_slice.test, "end", None),
        "rounds": len(own),
        "seconds": round(sum(r["seconds"] for r in own), 3),
        "bytes_down": sum(r["bytes_down"] for r in own),
        "bytes_up": sum(r["bytes_up"] for r in own),
        "client_bytes": named.n_bytes(params),
        "adoption": dict(state.adoption) or None,
        "lesson": dict(state.lesson) or None,
        "student": None if student is None else student.facts,
        "drift": _drift(state, verdict["rows"], experiment),
        "overhead": {name: spent + verdict[name] for name, spent in state.overhead.items()},
        "refused": verdict["refused"],
        "epsilon": _spent(recipe),
        "rows": verdict["rows"],
        "differences": verdict["differences"],
        "life": verdict.get("life", []),
    }
    moved = state.advanced(slice=time_slice.index + 1, round=0, releases=(*state.releases, record))
    if promoted or state.parent is None:
        return moved.advanced(parent=release.version), release
    # What did harm is not built upon; counts and statistics are sums over all slices, and stay.
    return moved.advanced(params=state.anchor, average={}, memory={}), release


def _drift(state: ServerState, rows: Mapping[str, Any], experiment: Experiment) -> dict[str, Any] | None:
    settings = experiment.training.drift
    return None if settings is None else watched(state.releases, rows, settings, experiment.evaluation.ks[0])


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


def worth_promoting(rows: Mapping[str, Any], settings: EvaluationConfig) -> bool:
    """Return whether a release is no worse than its parent, beyond the margin, on the same test.

    Args:
        rows: those of the verdict; without "previous" there is nothing to be worse than.
        settings: holds the margin.
    """
    name, margin = f"ndcg@{settings.ks[0]}", settings.promotion_margin
    found = [rows.get(row, {}).get("all", {}).get("metrics", {}).get(name) for row in ("release", "previous")]
    if margin is None or None in found:
        return True
    own, parent = (float(one["value"]) for one in found)
    return own >= (1.0 - margin) * parent
