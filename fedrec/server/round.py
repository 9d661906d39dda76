"""One round: ask nodes to do a task, check what they send, add it up."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedrec import params as named
from fedrec.config import Experiment, TrainingConfig
from fedrec.data.slices import LastWindow, TimeSlice, TimeWindow
from fedrec.errors import FedrecError, RunError, TallyRefused
from fedrec.learning import AnyAggregate, FixedCohort, Mean, PoissonCohort, TurnCohort
from fedrec.models.build import MODELS, trained
from fedrec.models.configs import AnyModelConfig
from fedrec.models.freeze import trainable
from fedrec.params import Params
from fedrec.protocol.link import Link
from fedrec.protocol.plan import Census, CensusRequest, RoundPlan
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import FitTask, Tier, Turn
from fedrec.random import Key
from fedrec.server import optimizer
from fedrec.server.anchor import item_means, pulled
from fedrec.server.drift import hurried
from fedrec.server.gather import TICKET_BYTES, Ask, Roster, gather
from fedrec.server.guard import Guard
from fedrec.server.local import LocalMode
from fedrec.server.pace import in_stage, lesson_inputs
from fedrec.server.private_fit import Place, private_fit
from fedrec.server.rehearsal import rehearsed
from fedrec.server.robust import combined
from fedrec.server.sampling import sample
from fedrec.server.state import ServerState

Clock = Callable[[], float]


@dataclass(frozen=True)
class Recipe:
    """What stays the same over the rounds of a run.

    Attributes:
        experiment: the settings.
        catalog_digest: the catalogue that item numbers refer to.
        clock: seconds, for measuring how long a round takes.
        guard: ledger and noise of a run that is private at user level.
        local: what is asked of clients that trust nobody.
        tier: which class of devices the rounds ask; None: all.
        vectors: [n, d] public vectors of all items of the catalogue, for models that know items by their text.
        carried: weights of another domain that training begins with; empty: it begins with fresh ones.
    """

    experiment: Experiment
    catalog_digest: str
    clock: Clock
    guard: Guard | None = None
    local: LocalMode | None = None
    tier: Tier | None = None
    vectors: NDArray[np.float32] | None = None
    carried: Params = field(default_factory=dict)


def take_census(link: Link, window: TimeWindow | LastWindow, recipe: Recipe) -> Roster:
    """Ask every node how many of its clients have interactions in the window.

    Raises:
        RunError: no node answered, with what they said instead.
    """
    nodes = link.nodes()
    tickets = {node: secrets.token_hex(TICKET_BYTES) for node in nodes}
    requests = {
        node: CensusRequest(window=window, catalog_digest=recipe.catalog_digest, ticket=ticket).to_bytes()
        for node, ticket in tickets.items()
    }
    found: list[tuple[int, str, int]] = []
    errors: list[str] = []
    timeout = recipe.experiment.training.timeout_seconds
    for reply in link.exchange("census", requests, timeout):
        try:
            ticket = tickets.pop(reply.node, None)
            if ticket is None:
                raise TallyRefused("it answered twice or was not asked")
            if reply.document is None:
                raise TallyRefused(reply.error)
            census = Census.from_bytes(reply.document)
            if census.ticket != ticket:
                raise TallyRefused("it answers another request: a replay, a late answer or another node's")
            found.append((reply.node, census.node, census.n_clients))
        except FedrecError as error:
            errors.append(f"node {reply.node}: {error}")
    if not found:
        raise RunError(f"No node answered the census ({'; '.join(errors[:3]) or 'none is connected'}).")
    return Roster(tuple(sorted(found, key=lambda node: (node[1], node[0]))))


def run_round(
    state: ServerState, link: Link, recipe: Recipe, time_slice: TimeSlice, roster: Roster
) -> tuple[ServerState, dict[str, Any]]:
    """Train the shared model for one round and return the new state and the round's record.

    The mean update over the clients that answered is the server optimizer's step. A round without any leaves the
    parameters as they were.
    """
    began = recipe.clock()
    training = recipe.experiment.training
    key = round_key(recipe.experiment, time_slice.index, state.round)
    clip_norm = state.clip_norm or training.local.clip_norm
    local = training.local.model_copy(update={"clip_norm": clip_norm})
    mode = recipe.local
    model = trained(recipe.experiment.model)
    learnt = {name: state.params[name] for name in trainable(model, state.params)}
    bound = clip_norm if mode is None else mode.fit_bound(local, learnt)
    task = FitTask(
        window=time_slice.fit or time_slice.train,
        local=local,
        turn=turn_of(recipe.experiment, time_slice.index, state.round),
        tier=recipe.tier,
        private=None if mode is None else mode.fit,
    )
    shapes = {name: (value.shape, value.dtype) for name, value in learnt.items()}
    stage = training.base if time_slice.index == 0 else training.later
    inputs = lesson_inputs(state, training, stage)

    def plan_for(slots: NDArray[np.int64]) -> RoundPlan:
        return RoundPlan(
            time_slice.index,
            state.round,
            task,
            in_stage(model, stage),
            time_slice.n_items,
            state.params,
            key,
            recipe.catalog_digest,
            slots,
            inputs,
            codec=training.codec,
            download=training.download,
        )

    ask = Ask(link, roster, plan_for, shapes, training.timeout_seconds)
    guard, next_clip_norm = recipe.guard, state.clip_norm
    if guard is None:
        places, enough = selected(training, roster.n_clients, key)
        combine = None if isinstance(training.aggregate, Mean) else partial(_combined, training.aggregate, model)
        got = gather(ask, places, bound, enough=enough, combine=combine)
        mean = named.scale(got.sums, 1.0 / got.n_clients) if got.n_clients else {}
        needed = training.minimum_share * (len(places) if enough is None else enough)
        if got.n_clients < needed:
            mean = {}
            missing = f"the round is abandoned: {got.n_clients} of the {math.ceil(needed)} clients it needs answered"
            got = replace(got, refused=(*got.refused, {"node": "all", "reason": missing}))
    else:
        place = Place(time_slice.index, state.round)
        got, next_clip_norm = private_fit(guard, recipe.experiment, place, task, ask)
        mean = dict(got.sums)
    params, memory, norm = dict(state.params), dict(state.memory), 0.0
    if mean:
        norm = named.norm(mean)
        mean = pulled(mean, params, state.anchor, training.anchor)
        if training.ewc is not None:
            mean = pulled(mean, params, state.anchor, training.ewc.strength, state.fisher)
        if training.rehearsal is not None and state.memories:
            mean = rehearsed(mean, params, state.memories, model, training.rehearsal, local, key)
        speed = optimizer.speed(stage, state.round) * hurried(state.releases)
        learnt, memory = optimizer.step(training.server, learnt, memory, mean, speed)
        rows = MODELS[type(model)].row_names & learnt.keys()
        params |= item_means(learnt, state.anchor, training.item_mean, rows)
    average = optimizer.averaged(state.average, params, training.average, state.round)
    average |= {name: params[name] for name in average.keys() - learnt.keys()}  # what is frozen stays, bit for bit
    record = {
        "slice": time_slice.index,
        "round": state.round,
        "task": "fit",
        "loss": got.stats["loss"] / got.n_clients if got.n_clients and "loss" in got.stats else None,
        "clip_norm": clip_norm,
        "clipped": got.stats.get("clipped", 0.0),
        "cohort": got.cohort,
        "clients": got.n_clients,
        "refused": list(got.refused),
        "bytes_down": got.bytes_down,
        "bytes_up": got.bytes_up,
        "seconds": round(recipe.clock() - began, 4),
        "update_norm": norm,
    }
    if mode is not None:
        record["spent"] = got.stats.get("spent", 0.0)
    new = state.blamed(got.offenders).advanced(
        round=state.round + 1,
        params=params,
        average=average,
        memory=memory,
        clip_norm=next_clip_norm,
        rounds=(*state.rounds, record),
    )
    return new, record


def selected(training: TrainingConfig, n_eligible: int, key: Key) -> tuple[NDArray[np.int64], int | None]:
    """Return the places of the clients to ask, and after how many answers the round is closed; None: all of them."""
    cohort = training.cohort
    if not training.over_selection or isinstance(cohort, TurnCohort):
        return sample(cohort, n_eligible, key.child("cohort")), None
    more = 1.0 + training.over_selection
    if isinstance(cohort, PoissonCohort):
        places = sample(PoissonCohort(expected=cohort.expected * more), n_eligible, key.child("cohort"))
        return places, min(len(places), round(cohort.expected))
    places = sample(FixedCohort(size=math.ceil(cohort.size * more)), n_eligible, key.child("cohort"))
    return places, min(len(places), cohort.size)


def _combined(settings: AnyAggregate, model: AnyModelConfig, tallies: Sequence[Tally]) -> Params:
    return combined(tallies, settings, MODELS[type(model)].row_names)


def turn_of(experiment: Experiment, slice_index: int, round_number: int) -> Turn | None:
    """Return whose turn it is in a round; None where cohorts are sampled."""
    cohort = experiment.training.cohort
    if not isinstance(cohort, TurnCohort):
        return None
    key = ServerState.root_key(experiment).child("slice", slice_index, "turns")
    return Turn(groups=cohort.groups, group=round_number % cohort.groups, key=key.hex())


def round_key(experiment: Experiment, slice_index: int, round_number: int) -> Key:
    """Return the key of one training round."""
    return ServerState.root_key(experiment).child("slice", slice_index, "round", round_number)
