"""Two tiers of devices: small ones train a small model, large ones the large model, and the two teach each other.

Each tier's updates are summed on their own. The device class is public. After the rounds of a slice the small model is
one of the large one's teachers (`fedrec.server.teach`), and then the release teaches the small one, which is published
beside it as its device student: both ways on synthetic histories.

Source: FedMD (Li and Wang, 2019) and FedDF (Lin et al., NeurIPS 2020) teach unlike models by each other's outputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedrec.config import Experiment
from fedrec.data.slices import TimeSlice
from fedrec.errors import ConfigError
from fedrec.models.configs import SpectralConfig
from fedrec.params import Params
from fedrec.privacy.settings import NoPrivacy
from fedrec.protocol.link import Link
from fedrec.protocol.task import Tier
from fedrec.server import optimizer
from fedrec.server.gather import Roster
from fedrec.server.judge import grown, initial
from fedrec.server.popular import with_popularity
from fedrec.server.round import Recipe, run_round
from fedrec.server.state import ServerState
from fedrec.server.work import Work


def check_tiers(experiment: Experiment) -> None:
    """Raise what makes tiers impossible in an experiment.

    Raises:
        ConfigError: the small model is missing or cannot be fitted, nobody teaches, or the run is private.
    """
    training = experiment.training
    if training.tiers is None:
        return
    if training.student is None or training.distil is None:
        raise ConfigError(
            "Tiers teach each other: add a table [training.distil], and the small model as [training.student.model]."
        )
    if training.minimum_share or training.over_selection:
        raise ConfigError(
            "With tiers only a part of each cohort answers for each model; leave out training.minimum_share and "
            "training.over_selection."
        )
    if isinstance(training.student.model, SpectralConfig):
        raise ConfigError(
            "A spectral model is not fitted, so small devices cannot train it; set training.student.model.kind to "
            '"transformer" or "factorisation".'
        )
    if not isinstance(experiment.privacy, NoPrivacy):
        raise ConfigError(
            "What two tiers of devices spend is not accounted for yet; leave out [training.tiers] in a private run."
        )


def tier_of(experiment: Experiment, small: bool) -> Tier | None:
    """Return which devices train a model; None where there are no tiers."""
    settings = experiment.training.tiers
    if settings is None:
        return None
    key = ServerState.root_key(experiment).child("tiers")
    return Tier(small=small, share=settings.share, key=key.hex())


def begin(work: Work) -> Work:
    """Grow the small model to the slice's catalogue, or make a fresh one in the first; once it is, nothing changes."""
    state, time_slice, recipe = work.state, work.time_slice, work.recipe
    student = recipe.experiment.training.student
    if recipe.experiment.training.tiers is None or student is None:
        return work
    params: Params = (
        grown(student.model, state.small, time_slice.n_items, recipe)
        if state.small
        else initial(student.model, time_slice.n_items, recipe)
    )
    params = with_popularity(student.model, params, state.counts["counts"])
    return work.advanced(small=params, small_memory=optimizer.grow_memory(state.small_memory, params))


def small_round(state: ServerState, link: Link, recipe: Recipe, time_slice: TimeSlice, roster: Roster) -> ServerState:
    """Return the state after the small devices' part of a round, by the one loop of rounds; its cost is overhead."""
    experiment = recipe.experiment
    student = experiment.training.student
    if experiment.training.tiers is None or student is None:
        return state
    training = experiment.training.model_copy(
        update={"rehearsal": None, "ewc": None, "anchor": 0.0, "item_mean": 0.0, "average": 0.0}
    )
    own = experiment.model_copy(update={"model": student.model, "training": training})
    kept: dict[str, Any] = {"average": {}, "anchor": {}, "fisher": {}, "teacher": {}, "rounds": ()}
    apart = state.advanced(params=state.small, memory=state.small_memory, **kept)
    found, record = run_round(
        apart, link, replace(recipe, experiment=own, tier=tier_of(experiment, small=True)), time_slice, roster
    )
    overhead: dict[str, Any] = {part: state.overhead[part] + record[part] for part in state.overhead}
    return state.advanced(small=found.params, small_memory=found.memory, overhead=overhead, offences=found.offences)
