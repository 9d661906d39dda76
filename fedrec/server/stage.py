"""The rounds of a slice."""

from __future__ import annotations

from dataclasses import replace

from fedrec.server.round import run_round, take_census
from fedrec.server.tiers import small_round, tier_of
from fedrec.server.work import Event, Work


def train(work: Work) -> Work:
    """Train all rounds of the slice that are not done yet, and store the state every so often."""
    recipe = replace(work.recipe, tier=tier_of(work.recipe.experiment, small=False))
    time_slice, desk, training = work.time_slice, work.desk, recipe.experiment.training
    stage = training.base if time_slice.index == 0 else training.later
    window = time_slice.fit or time_slice.train
    roster = work.roster or take_census(work.trusted, window, recipe)
    for number in range(work.state.round, stage.rounds):
        allowed = work.trusted
        if set(allowed.nodes()) != {node for node, _, _ in roster.nodes}:
            roster = take_census(allowed, window, recipe)
        state = small_round(work.state, allowed, recipe, time_slice, roster)
        state, record = run_round(state, allowed, recipe, time_slice, roster)
        desk.observe(Event("round", record))
        work.tell_of_quarantine(state)
        work = replace(work, state=state)
        if recipe.guard is not None or (number + 1) % recipe.experiment.runtime.checkpoint_every == 0:
            desk.checkpoint(state)
    return work
