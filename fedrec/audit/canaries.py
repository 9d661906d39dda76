"""Canary clients: people who do not exist, whose contributions the auditor chose, in a pool beside real people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedrec.client.pool import ClientPool
from fedrec.data.slices import LastWindow, TimeWindow
from fedrec.evaluation.asked import cooccurrence_shapes
from fedrec.evaluation.metrics import private_names, private_norm
from fedrec.params import Array, Params
from fedrec.privacy import clip
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import CooccurrenceTask, CountTask, EvaluateTask, FitTask
from fedrec.random import Key

FIRST_ID = 1 << 40
"""Number of the first canary in random streams, far from those of real people."""
TOO_LONG = 1e3
"""By how much a canary's vector passes the clip norm before it is clipped: a person may send anything."""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Spots = Mapping[str, tuple[Ints, Ints]]
"""Name of a released tensor to the numbers of canaries and the place of each in it."""


@dataclass(frozen=True)
class Asked:
    """What the auditor knows of one round beside what is released.

    Attributes:
        task: kind of the task.
        plan: slice and round.
        clip_norm: C, L2 bound of one person's contribution.
        there: [m] whether the canary was asked and took part.
        turn: [m] whether it takes part if it is in the run and asked; known to everybody.
        spots: where each canary's one number stands in what is released; a canary without a spot is silent.
        known: [m] what all real people contributed at that spot: the auditor knows everybody else.
        sent: [m] what the node's whole sum holds there.
        within: how many of the node's clients say that they needed no clipping, less half of all.
    """

    task: str
    plan: tuple[int, int]
    clip_norm: float
    there: Bools
    turn: Bools
    spots: Spots
    known: Floats
    sent: Floats
    within: float = 0.0

    @property
    def speaks(self) -> Bools:
        """[m] which canaries have a spot."""
        found = np.zeros(len(self.there), np.bool_)
        for who, _ in self.spots.values():
            found[who] = True
        return found

    def joined(self, other: Asked) -> Asked:
        """Return what is known of both, if they are of one round; else of the other alone."""
        if (self.task, self.plan) != (other.task, other.plan):
            return other
        there, known, sent = self.there | other.there, self.known + other.known, self.sent + other.sent
        return replace(self, there=there, known=known, sent=sent, within=self.within + other.within)

    def read(self, released: Params) -> Floats:
        """Return [m] the released numbers at the canaries' spots; 0 for silent canaries."""
        return _read(self.spots, {name: released[name].reshape(-1) for name in self.spots}, len(self.there))


class CanaryPool:
    """A `ClientPool` with canaries beside the real people; each sends all that it may in one number of the sum.

    A canary is eligible in the windows it is given; when exact metrics are asked for it says nothing. No two canaries
    share a number, so that none hides another (their directions are orthogonal); where there are more canaries than
    numbers the rest is silent.

    Attributes:
        included: [m] which canaries are in the pool at all; only the auditor knows.
        plans: the first plan of each kind of task that came in.

    Source: Andrew et al., ICLR 2024 (canary clients of known directions in the rounds of one run); Nasr et al., USENIX
    Security 2023, section 4 (Dirac canaries).
    """

    def __init__(
        self,
        inner: ClientPool,
        included: Bools,
        key: Key,
        training: Sequence[TimeWindow | LastWindow],
        told: Callable[[Asked], None] = lambda asked: None,
    ) -> None:
        """Stand before a pool.

        Args:
            inner: the real people.
            included: [m] which canaries take part in the run.
            key: decides the canaries' spots.
            training: the windows in which canaries are eligible; also those of tests if metrics are private.
            told: is told what the node knows, before anybody gets a sum; once for each client where sums are masked.
        """
        self.included = included
        self.plans: dict[str, RoundPlan] = {}
        self._inner, self._key, self._training, self._told = inner, key, tuple(training), told
        self._present = np.flatnonzero(included)
        self._n_inner: dict[TimeWindow | LastWindow, int] = {}
        self._spots: dict[tuple[str, ...], Spots] = {}

    @property
    def name(self) -> str:
        """What the node is called."""
        return self._inner.name

    def census(self, window: TimeWindow | LastWindow, catalog_digest: str) -> int:
        """Return how many clients have an interaction in the window, canaries among them."""
        self._n_inner[window] = n = self._inner.census(window, catalog_digest)
        return n + (len(self._present) if window in self._training else 0)

    def run(self, plan: RoundPlan) -> Tally:
        """Let the real people do the task, and add the canaries that were asked."""
        self.plans.setdefault(plan.task.kind, plan)
        n = self._n_inner[plan.task.window]
        people = self._inner.run(replace(plan, slots=plan.slots[plan.slots < n]))
        if isinstance(plan.task, EvaluateTask) and not plan.task.private:
            return people
        there = np.zeros(len(self.included), np.bool_)
        there[self._present[plan.slots[plan.slots >= n] - n]] = True
        turn = np.ones(len(there), np.bool_)
        if isinstance(plan.task, FitTask) and plan.task.turn is not None:
            turn = plan.task.turn.taken(FIRST_ID + np.arange(len(there), dtype=np.int64))
            there &= turn
        kind = np.float64 if isinstance(plan.task, EvaluateTask) else np.float32
        sums: dict[str, Array] = {name: np.zeros(shape, kind) for name, shape in _shapes(plan).items()}
        for name, value in people.sums.items():
            sums[name] += value
        asked = self._add(plan, sums, there, turn)
        spoke = there & asked.speaks
        # Half of them say that they were clipped, so that a clip norm that is learnt stays where people hold it.
        clipped = people.stats.get("clipped", 0.0) + float(spoke[::2].sum())
        n_clients = people.n_clients + int(spoke.sum())
        self._told(replace(asked, within=n_clients / 2 - clipped))
        return Tally(sums, people.n_clients + int(spoke.sum()), {**people.stats, "clipped": clipped})

    def _add(self, plan: RoundPlan, sums: dict[str, Array], there: Bools, turn: Bools) -> Asked:
        """Add what the canaries that are there send, in place, and return what the auditor knows."""
        views, bound, m = _views(plan, sums), _bound(plan), len(there)
        known_as = (plan.task.kind, *(f"{name} {len(view)}" for name, view in views.items()))
        if known_as not in self._spots:
            self._spots[known_as] = spread({n: len(v) for n, v in views.items()}, m, self._key.child(*known_as))
        spots = self._spots[known_as]
        known = _read(spots, views, m)
        # One number far above the bound, brought to it by what every client is clipped with.
        value = bound * TOO_LONG * float(clip.clip_factors(np.array([bound * TOO_LONG]), bound)[0])
        for name, (who, place) in spots.items():
            views[name][place[there[who]]] += np.float32(value)
        return Asked(plan.task.kind, (plan.slice, plan.round), bound, there, turn, spots, known, _read(spots, views, m))


def spread(sizes: Mapping[str, int], n: int, key: Key) -> Spots:
    """Return a spot of its own for each of n canaries, in turn one in each tensor, so that no small tensor is missed.

    Where there are fewer numbers than canaries, who gets none is drawn.

    Args:
        sizes: name of a tensor to how many numbers it has.
        n: how many canaries.
        key: decides.
    """
    random = key.numpy()
    picks = {name: random.permutation(size)[:n] for name, size in sizes.items()}
    turns = sorted((turn, name) for name, pick in picks.items() for turn in range(len(pick)))[:n]
    order = random.permutation(n)
    found: dict[str, tuple[Ints, Ints]] = {}
    for name, pick in picks.items():
        mine = [number for number, (_, owner) in enumerate(turns) if owner == name]
        found[name] = (order[mine].astype(np.int64), pick[: len(mine)].astype(np.int64))
    return found


def _read(spots: Spots, flat: Mapping[str, Array], m: int) -> Floats:
    found = np.zeros(m)
    for name, (who, place) in spots.items():
        found[who] = flat[name][place]
    return found


def _shapes(plan: RoundPlan) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a node uploads for a plan."""
    task = plan.task
    if isinstance(task, CooccurrenceTask):
        rank = plan.inputs["features"].shape[1] if "features" in plan.inputs else 0
        return {name: shape for name, (shape, _) in cooccurrence_shapes(task, plan.n_items, rank).items()}
    if isinstance(task, CountTask):
        return {"counts": (plan.n_items,)}
    if isinstance(task, EvaluateTask):
        return {"metrics": (len(private_names(task.ks)) + 1,)}
    return {name: value.shape for name, value in plan.params.items()}


def _views(plan: RoundPlan, sums: Mapping[str, Array]) -> dict[str, Array]:
    """Return the parts of an upload that are released as they are, by the name of the release, each as one axis.

    Of the pairs that is the items' column: what is released of the other is its projection on the features.
    """
    names = {"pairs": "items"}
    return {names.get(n, n): v[:, 0] if n == "pairs" else v.reshape(-1) for n, v in sorted(sums.items())}


def _bound(plan: RoundPlan) -> float:
    """Return the norm that one client's contribution may have; where there is no bound, 1."""
    if isinstance(plan.task, FitTask):
        return plan.task.local.clip_norm
    if isinstance(plan.task, EvaluateTask):
        return private_norm(plan.task.ks)
    return (isinstance(plan.task, CountTask) and plan.task.clip_norm) or 1.0
