"""The lifelong loop: learn a slice, be tested on the next, publish a release, go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedrec.data.slices import TimeSlice
from fedrec.protocol.link import Link
from fedrec.server import adopt, begin, drift, fisher, publish, stage, student, teach, tiers, trial
from fedrec.server.release import Release
from fedrec.server.round import Recipe
from fedrec.server.state import ServerState
from fedrec.server.work import Desk, Step, Work

STEPS: tuple[Step, ...] = (
    fisher.weigh,
    begin.begin,
    tiers.begin,
    stage.train,
    teach.teach,
    trial.open_trial,
    adopt.adopt,
    student.make,
    trial.test,
    drift.watch,
    publish.publish,
)
"""What is done in every slice, in this order. A step that the experiment does not ask for returns its work as it came.

Why this order: docs/decisions/0007-a-slice-is-a-list-of-steps.md.
"""


def run_stream(
    state: ServerState,
    link: Link,
    slices: Sequence[TimeSlice],
    recipe: Recipe,
    desk: Desk,
    steps: Sequence[Step] = STEPS,
) -> Iterator[tuple[ServerState, Release]]:
    """Go through the slices from where `state` stands, and yield the new state with each release.

    Every step is a function of the state, so a run that was killed and resumed publishes the same bytes.

    Args:
        state: where to begin.
        link: how to reach the nodes.
        slices: of the whole life.
        recipe: the experiment.
        desk: where results go.
        steps: of each slice; the last one publishes.

    Raises:
        RunError: no node or no client is there, or all fail.
        RegistryError: a release or a checkpoint cannot be written.
    """
    whole = recipe.guard
    for time_slice in slices[state.slice :]:
        guard = None if whole is None else whole.at(time_slice.index)
        before = slices[time_slice.index - 1] if time_slice.index else None
        work = Work(state, link, time_slice, before, replace(recipe, guard=guard), desk)
        desk.due(time_slice)
        for step in steps:
            work = step(work)
        state = work.state
        assert work.release is not None
        yield state, work.release
