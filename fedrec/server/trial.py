"""The trial of a new release: what it is tested on, and beside whom."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fedrec.models.configs import NearestConfig, SpectralConfig
from fedrec.server.adopt import release_of
from fedrec.server.judge import (
    Contender,
    adapted_contender,
    judge,
    judge_life,
    judge_privately,
    local_only_contender,
    popularity_contender,
)
from fedrec.server.work import Event, Work


def open_trial(work: Work) -> Work:
    """Tell that learning is over; what comes now is time of evaluation."""
    work.desk.observe(Event("evaluate", {"slice": work.time_slice.index}))
    return replace(work, began=work.recipe.clock())


def test(work: Work) -> Work:
    """Evaluate the new release beside the previous one, popularity, its student and local-only."""
    verdict = _verdict(work)
    work = work.blamed(verdict["offenders"])
    seconds = round(work.recipe.clock() - work.began, 3)
    return replace(work, verdict={**verdict, "seconds": seconds})


def _verdict(work: Work) -> dict[str, Any]:
    state, link, time_slice, recipe = work.state, work.trusted, work.time_slice, work.recipe
    model = recipe.experiment.model
    contenders = {"release": Contender(model, release_of(state, model))}
    private = recipe.guard is not None and recipe.guard.settings.metrics == "private"
    wanted = not private or recipe.experiment.evaluation.promotion_margin is not None
    if state.parent is not None and wanted:
        contenders["previous"] = Contender(model, work.desk.registry.load(state.parent).params)
    contenders["popularity"] = popularity_contender(state.counts)
    settings = recipe.experiment.training.student
    if work.student is not None and settings is not None and not private:
        contenders["student"] = Contender(settings.model, work.student.params)
    alone = recipe.experiment.evaluation.local_only.people and not isinstance(model, SpectralConfig | NearestConfig)
    if alone and not private:
        contenders["local_only"] = local_only_contender(recipe, time_slice)
    adapt = recipe.experiment.evaluation.adapt
    if adapt is not None and not private:
        contenders["adapted"] = adapted_contender(recipe, time_slice, contenders["release"].params, adapt)
    counts = np.zeros(time_slice.n_items_test, np.float32)
    counts[: len(state.counts["counts"])] = state.counts["counts"]
    if recipe.guard is not None and private:
        return judge_privately(recipe.guard, contenders, time_slice, link, recipe, {"counts": counts})
    verdict = judge(contenders, time_slice, link, recipe, {"counts": counts})
    if time_slice.life:
        life, down, up = judge_life(contenders["release"], time_slice, link, recipe, {"counts": counts})
        verdict |= {"life": life, "bytes_down": verdict["bytes_down"] + down, "bytes_up": verdict["bytes_up"] + up}
    return verdict
