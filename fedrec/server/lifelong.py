"""The lifelong loop: learn a slice, be tested on the next, publish a release, go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedrec import params as named
from fedrec.config import Experiment
from fedrec.data.catalog import ItemCatalog
from fedrec.data.slices import TimeSlice
from fedrec.models.configs import PopularityConfig
from fedrec.protocol.codec import Plain
from fedrec.protocol.link import Link
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Expectation
from fedrec.protocol.task import CountTask
from fedrec.server import optimizer
from fedrec.server.judge import Contender, grown, initial, judge, local_only_contender, popularity_contender
from fedrec.server.registry import Registry
from fedrec.server.release import Release
from fedrec.server.round import Gathered, Recipe, Roster, gather, run_round, take_census
from fedrec.server.state import ServerState

PRIVACY = {
    "statement": "Not private: no noise is added. Clients send the exact sums of their updates, counts and metrics.",
    "unit": "user",
    "epsilon": None,
    "delta": None,
}
"""What a run without a lossy or telling codec says."""


def privacy(experiment: Experiment) -> dict[str, Any]:
    """Return the privacy statement of an experiment: what is protected, and what the codec gives away."""
    codec = experiment.training.codec
    if isinstance(codec, Plain):
        return dict(PRIVACY)
    statement = (
        "Not private: no noise is added. Clients send the sums of their updates as the codec "
        f"'{codec.kind}' writes them, which hides nothing, and the exact sums of their counts and metrics."
    )
    return {**PRIVACY, "statement": f"{statement} {codec.reveals}".rstrip()}


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
    """

    registry: Registry
    catalog: ItemCatalog
    checkpoint: Checkpoint
    observe: Observer


def run_stream(
    state: ServerState, link: Link, slices: Sequence[TimeSlice], recipe: Recipe, desk: Desk
) -> Iterator[tuple[ServerState, Release]]:
    """Go through the slices from where `state` stands, and yield the new state with each release.

    Every step is a function of the state, so a run that was killed and resumed publishes the same bytes.

    Raises:
        RunError: no node or no client is there, or all fail.
        RegistryError: a release or a checkpoint cannot be written.
    """
    for time_slice in slices[state.slice :]:
        state = _learn(state, link, time_slice, recipe, desk)
        desk.observe(Event("evaluate", {"slice": time_slice.index}))
        began = recipe.clock()
        verdict = _verdict(state, link, time_slice, recipe, desk.registry)
        verdict["seconds"] = round(recipe.clock() - began, 3)
        state, release = _publish(state, time_slice, verdict, recipe, desk)
        desk.checkpoint(state)
        desk.observe(Event("release", state.releases[-1]))
        yield state, release


def _learn(state: ServerState, link: Link, time_slice: TimeSlice, recipe: Recipe, desk: Desk) -> ServerState:
    """Grow the model to the slice's catalogue, count, and train all rounds that are not done yet."""
    training = recipe.experiment.training
    stage = training.base if time_slice.index == 0 else training.later
    roster = take_census(link, time_slice.train, recipe)
    record = {"slice": time_slice.index, "rounds": stage.rounds, "clients": roster.n_clients, "done": state.round}
    desk.observe(Event("slice", record))
    if state.counted == time_slice.index:
        state = _begin(state, link, time_slice, recipe, roster)
    for number in range(state.round, stage.rounds):
        if set(link.nodes()) != {node for node, _, _ in roster.nodes}:
            roster = take_census(link, time_slice.train, recipe)
        state, record = run_round(state, link, recipe, time_slice, roster)
        desk.observe(Event("round", record))
        if (number + 1) % recipe.experiment.runtime.checkpoint_every == 0:
            desk.checkpoint(state)
    return state


def _begin(state: ServerState, link: Link, time_slice: TimeSlice, recipe: Recipe, roster: Roster) -> ServerState:
    """Make room for new items and add the slice's popularity counts."""
    model, began = recipe.experiment.model, recipe.clock()
    params = (
        grown(model, state.released, time_slice.n_items, recipe)
        if state.params
        else initial(model, time_slice.n_items, recipe)
    )
    counted = _count(link, time_slice, recipe, roster)
    before = state.counts.get("counts", np.zeros(0, np.float32))
    total = np.zeros(time_slice.n_items, np.float32)
    total[: len(before)] += before
    total += counted.sums.get("counts", 0.0)
    return state.advanced(
        params=params,
        average={},
        memory=optimizer.grow_memory(state.memory, params),
        counts={"counts": total},
        counted=time_slice.index + 1,
        round=0,
        overhead={
            "seconds": round(recipe.clock() - began, 4),
            "bytes_down": counted.bytes_down,
            "bytes_up": counted.bytes_up,
        },
    )


def _count(link: Link, time_slice: TimeSlice, recipe: Recipe, roster: Roster) -> Gathered:
    key = ServerState.root_key(recipe.experiment).child("slice", time_slice.index, "count")
    shape = {"counts": ((time_slice.n_items,), np.dtype(np.float32))}
    return gather(
        link,
        roster,
        np.arange(roster.n_clients, dtype=np.int64),
        lambda slots: RoundPlan(
            time_slice.index,
            0,
            CountTask(window=time_slice.train),
            PopularityConfig(),
            time_slice.n_items,
            {},
            key,
            recipe.catalog_digest,
            slots,
        ),
        lambda n: Expectation(shape, n),
        recipe.experiment.training.timeout_seconds,
    )


def _verdict(
    state: ServerState, link: Link, time_slice: TimeSlice, recipe: Recipe, registry: Registry
) -> dict[str, Any]:
    """Evaluate the new release beside the previous one, popularity and local-only."""
    model = recipe.experiment.model
    contenders = {"release": Contender(model, state.released)}
    if state.parent is not None:
        contenders["previous"] = Contender(model, registry.load(state.parent).params)
    contenders["popularity"] = popularity_contender(state.counts)
    if recipe.experiment.evaluation.local_only.people:
        contenders["local_only"] = local_only_contender(recipe, time_slice)
    counts = np.zeros(time_slice.n_items_test, np.float32)
    counts[: len(state.counts["counts"])] = state.counts["counts"]
    return judge(contenders, time_slice, link, recipe, {"counts": counts})


def _publish(
    state: ServerState, time_slice: TimeSlice, verdict: dict[str, Any], recipe: Recipe, desk: Desk
) -> tuple[ServerState, Release]:
    """Write the release, and move the state on to the next slice."""
    experiment = recipe.experiment
    release = desk.registry.publish(
        state.released,
        desk.catalog.prefix(time_slice.n_items),
        run=state.run,
        slice=time_slice.index,
        parent=state.parent,
        model=experiment.model.model_dump(mode="json"),
        experiment=experiment.model_dump(mode="json", exclude={"runtime"}),
        experiment_digest=experiment.digest(),
        metrics=verdict["rows"],
        privacy=privacy(experiment),
    )
    own = [record for record in state.rounds if record["slice"] == time_slice.index]
    record = {
        "version": release.version,
        "slice": time_slice.index,
        "digest": release.manifest.sha256,
        "parent": state.parent,
        "promoted": True,
        "n_items": time_slice.n_items,
        "train_rows": int(state.counts["counts"].sum()) - sum(r["train_rows"] for r in state.releases),
        "train_start": getattr(time_slice.train, "start", None),
        "train_end": getattr(time_slice.train, "end", None),
        "test_end": getattr(time_slice.test, "end", None),
        "rounds": len(own),
        "seconds": round(sum(r["seconds"] for r in own), 3),
        "bytes_down": sum(r["bytes_down"] for r in own),
        "bytes_up": sum(r["bytes_up"] for r in own),
        "client_bytes": named.n_bytes(state.released),
        "overhead": {name: spent + verdict[name] for name, spent in state.overhead.items()},
        "refused": verdict["refused"],
        "epsilon": None,
        "rows": verdict["rows"],
        "differences": verdict["differences"],
    }
    moved = state.advanced(
        slice=time_slice.index + 1, round=0, parent=release.version, releases=(*state.releases, record)
    )
    return moved, release
