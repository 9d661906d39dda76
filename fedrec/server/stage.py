"""The rounds of a slice, and when they end."""

from __future__ import annotations

from dataclasses import replace

from fedrec.models.build import trained
from fedrec.server.adopt import asked
from fedrec.server.judge import Contender
from fedrec.server.round import run_round, take_census
from fedrec.server.tiers import small_round, tier_of
from fedrec.server.work import Event, Work


def train(work: Work) -> Work:
    """Train the rounds that are not done yet, until validation has had enough; store the state on the way."""
    recipe = replace(work.recipe, tier=tier_of(work.recipe.experiment, small=False))
    time_slice, desk, training = work.time_slice, work.desk, recipe.experiment.training
    stage = training.base if time_slice.index == 0 else training.later
    window = time_slice.fit or time_slice.train
    roster = work.roster or take_census(work.trusted, window, recipe)
    for number in range(work.state.round, stage.rounds):
        if work.state.stopping.get("ended"):
            break
        allowed = work.trusted
        if set(allowed.nodes()) != {node for node, _, _ in roster.nodes}:
            roster = take_census(allowed, window, recipe)
        state = small_round(work.state, allowed, recipe, time_slice, roster)
        state, record = run_round(state, allowed, recipe, time_slice, roster)
        desk.observe(Event("round", record))
        work.tell_of_quarantine(state)
        work = _weighed(replace(work, state=state), number + 1)
        if recipe.guard is not None or (number + 1) % recipe.experiment.runtime.checkpoint_every == 0:
            desk.checkpoint(work.state)
    if work.state.best:
        work = work.advanced(params=work.state.best, average={}, best={})
    return work.noted(stopping=dict(work.state.stopping) or None)


def _weighed(work: Work, done: int) -> Work:
    """Every so many rounds ask validation; keep the best parameters, and end the rounds when nothing better came."""
    settings, state = work.recipe.experiment.training.stopping, work.state
    if settings is None or done % settings.every:
        return work
    model = trained(work.recipe.experiment.model)
    found, margin, overhead = asked(work, {f"round {done}": Contender(model, state.released)})
    value = found.get(f"round {done}", 0.0)
    before = state.stopping
    better = not before or value > before["tried"][before["round"] // settings.every - 1] + margin
    stopping = {
        "tried": [*before.get("tried", ()), value],
        "round": done if better else before["round"],
        "ended": not better and done - before["round"] >= settings.patience * settings.every,
    }
    return work.advanced(best=state.released if better else state.best, stopping=stopping, overhead=overhead)
