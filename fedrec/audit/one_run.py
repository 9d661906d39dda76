"""The audit of one run: canaries in the real pipeline, and what its releases give away of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedrec.audit.canaries import Asked, CanaryPool
from fedrec.audit.life import Life, Release, live, people_of
from fedrec.client.pool import LogPool
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.slices import TimeSlice, resolve
from fedrec.evaluation.attacks import Bound, one_run_bound, share_interval
from fedrec.privacy.accounting import LEAST, epsilon
from fedrec.privacy.events import AnyEvent, GaussianEvent, MatrixEvent
from fedrec.privacy.matrix import optimised
from fedrec.protocol.plan import RoundPlan
from fedrec.random import Key
from fedrec.server.work import Observer

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
NOTHING = 1e-4
"""A deviation of so few clip norms is the rounding of float32, not noise."""
ALIKE, FEWEST = 0.9, 10
"""Noise of two releases is the same if it correlates by more, seen at twice so many canaries at least."""


@dataclass(frozen=True)
class Heard:
    """One release as the auditor sees it, in clip norms, for each of m canaries.

    Attributes:
        name: what was released.
        task: kind of the task.
        seen: [m] what was released at the canary's spot, without what real people sent.
        noise: [m] what was released there, without what anybody sent.
        influence: [m] what the canary changed before noise was added.
        there: [m] whether the canary was asked and took part.
        turn: [m] whether it takes part if it is in the run and asked.
        speaks: [m] whether it had a spot at all.
        clip_norm: C.
        event: what was paid; None where nothing was.
        rate: probability with which each eligible person was asked.
        count_noise: noise of the count of updates within the clip norm, in people; None where nothing is counted.
    """

    name: str
    task: str
    seen: Floats
    noise: Floats
    influence: Floats
    there: Bools
    turn: Bools
    speaks: Bools
    clip_norm: float
    event: AnyEvent | None
    rate: float
    count_noise: float | None = None


@dataclass(frozen=True)
class Recording:
    """A life with canaries in it.

    Attributes:
        life: what the run left.
        included: [m] which canaries were in the pool.
        heard: every release that canaries could be in.
        plans: the first plan of each kind of task.
    """

    life: Life
    included: Bools
    heard: tuple[Heard, ...]
    plans: dict[str, RoundPlan]

    @property
    def unheard(self) -> tuple[str, ...]:
        """What was paid for and not attacked: rounds without anybody, metrics of windows of validation."""
        heard = {one.name for one in self.heard}
        paid = () if self.life.ledger is None else self.life.ledger.entries()
        return tuple(entry.name for entry in paid if entry.name not in heard)


class _Listener:
    """Brings together what the node knows of a round and what is released of it."""

    def __init__(self, private: bool) -> None:
        self.heard: list[Heard] = []
        self._private = private
        self._asked: Asked | None = None

    def told(self, asked: Asked) -> None:
        if self._private:
            self._asked = asked if self._asked is None else self._asked.joined(asked)
        else:
            self._hear(f"exact sum of a round ({asked.task})", asked, asked.sent, None, 1.0)

    def release(self, release: Release) -> None:
        asked, self._asked = self._asked, None
        if asked is None or not asked.spots.keys() <= release.noised.keys():
            return  # a round without anybody
        if asked.task == "evaluate" and not asked.there.any():
            return  # metrics of a window in which no canary is eligible
        count = None if release.within is None else release.within - asked.within
        self._hear(release.name, asked, asked.read(release.noised), release.event, release.rate, count)

    def _hear(
        self,
        name: str,
        asked: Asked,
        out: Floats,
        event: AnyEvent | None,
        rate: float,
        count_noise: float | None = None,
    ) -> None:
        seen, noise, influence = (
            part / asked.clip_norm for part in (out - asked.known, out - asked.sent, asked.sent - asked.known)
        )
        who = asked.there, asked.turn, asked.speaks
        self.heard.append(
            Heard(name, asked.task, seen, noise, influence, *who, asked.clip_norm, event, rate, count_noise)
        )


def record(
    experiment: Experiment,
    dataset: Dataset,
    slices: Sequence[TimeSlice],
    n_canaries: int,
    key: Key,
    observe: Observer = lambda event: None,
) -> Recording:
    """Play the planned life with canaries, each in the pool with probability 1/2, among all real people.

    Args:
        experiment: what to audit.
        dataset: the real people.
        slices: the planned life.
        n_canaries: m.
        key: decides which canaries are in, and where they show.
        observe: is told what happens.
    """
    included = key.child("included").numpy().random(n_canaries) < 0.5
    listener = _Listener(experiment.privacy.mode != "none")
    inner = LogPool(dataset.log, dataset.catalog, engine=experiment.runtime.engine)
    windows = [time_slice.train for time_slice in slices]
    if getattr(experiment.privacy, "metrics", "research") == "private":
        windows += [time_slice.test for time_slice in slices]
    pool = CanaryPool(inner, included, key.child("spots"), windows, listener.told)
    n_people = people_of(*resolve(dataset.log, slices[0].train))
    life = live(experiment, dataset.catalog, slices, pool, n_people, listener.release, observe)
    return Recording(life, included, tuple(listener.heard), pool.plans)


def scores(heard: Sequence[Heard], n_canaries: int) -> Floats:
    r"""Return [m] the log-likelihood ratios of "in the pool" against "not", summed over releases.

    With a release r in clip norms, :math:`\ell(r) = \log\big(1 - q + q \, e^{(2 r - 1) / 2 z^2}\big)`: the best test
    of one canary against the noise that is claimed, when everybody else is known. A stage of correlated noise is
    encoded by its matrix first, which makes the noise independent: with :math:`y = C r` and :math:`s = C x` for the
    canary's turns x, :math:`\ell(r) = (2 y^T s - s^T s) / 2 z^2 sens^2`.

    Source: Neyman and Pearson, 1933; the mixture is that of Poisson sampling, Abadi et al., CCS 2016, section 3.2.
    """
    total = np.zeros(n_canaries)
    single, stages = _stages(heard)
    for one in single:
        z, q = one.event.noise_multiplier if one.event else LEAST, one.rate
        ratio = (2.0 * one.seen - 1.0) / (2.0 * z**2)
        mixed = ratio if q >= 1.0 else np.logaddexp(math.log1p(-q), math.log(q) + ratio)
        total += np.where(one.speaks, mixed, 0.0)
    for event, members in stages:
        seen = _encoded(event, np.array([one.seen for one in members]))
        sent = _encoded(event, np.array([np.where(one.turn & one.speaks, 1.0, 0.0) for one in members]))
        deviation = event.noise_multiplier * event.sensitivity
        total += ((2.0 * seen - sent) * sent).sum(axis=0) / (2.0 * deviation**2)
    return total


def _stages(heard: Sequence[Heard]) -> tuple[list[Heard], list[tuple[MatrixEvent, list[Heard]]]]:
    """Return the releases with independent noise, and those of each stage of correlated noise in their order."""
    stages: dict[tuple[str, MatrixEvent], list[Heard]] = {}
    for one in heard:
        if isinstance(one.event, MatrixEvent):
            stages.setdefault((one.name, one.event), []).append(one)
    single = [one for one in heard if not isinstance(one.event, MatrixEvent)]
    return single, [(event, members) for (_, event), members in stages.items()]


def _encoded(event: MatrixEvent, rows: Floats) -> Floats:
    """Return ``C rows`` for the stage's lower-triangular Toeplitz matrix C; rows [t, m] start with the stage."""
    found = np.zeros_like(rows)
    for lag, coefficient in enumerate(optimised(event.rounds, event.band, event.min_separation).coefficients):
        found[lag:] += coefficient * rows[: len(rows) - lag]
    return found


def canary_bound(heard: Sequence[Heard], included: Bools, delta: float, confidence: float) -> Bound:
    """Return the lower bound on epsilon that guessing which canaries were in gives; it assumes nothing."""
    return one_run_bound(scores(heard, len(included)), included, delta, confidence)


def measured_epsilon(heard: Sequence[Heard], included: Bools, delta: float, confidence: float) -> float | None:
    """Return the epsilon of the noise, the sampling and the sensitivity that were measured, at their lenient ends.

    If noise is Gaussian, and independent or correlated as claimed, the run costs at least this much with the given
    confidence. Noise is measured at every canary's spot, sampling by how often canaries were asked, sensitivity by the
    most that one changed. Every release that was heard counts, whether somebody paid for it or not.

    Returns:
        Infinity where something was released without noise; None if nothing was heard.
    """
    single, stages = _stages(heard)
    groups: dict[tuple[str, AnyEvent | None], list[Heard]] = {}
    for one in single:
        groups.setdefault((one.task, one.event), []).append(one)
    level = (1.0 - confidence) / max(1, 2 * len(groups) + len(stages))
    found = [_measured_stage(event, members, level) for event, members in stages]
    found += [_measured_rounds(members, included, level) for members in groups.values()]
    lived = [(z, rate, count) for z, rate, count in found if rate > 0.0 and z < math.inf]
    if any(z < NOTHING for z, _, _ in lived):
        return math.inf
    events = [GaussianEvent(noise_multiplier=z, sampling=rate, count=count) for z, rate, count in lived]
    return epsilon(events, delta) if events else None


def _measured_rounds(members: list[Heard], included: Bools, level: float) -> tuple[float, float, int]:
    """Return the noise multiplier at most, the rate at least, and how many releases with independent noise it were.

    Where updates within the clip norm are counted too, a person moves the count by one half, and the two releases cost
    what one of multiplier z does with ``1 / z^2 = 1 / z_sum^2 + 1 / (2 count_noise)^2``.
    """
    changed = max(float(np.abs(one.influence).max(initial=0.0)) for one in members)
    counted = np.array([one.count_noise for one in members if one.count_noise is not None])
    level /= 2 if len(counted) else 1
    noise = noise_at_most(np.concatenate([one.noise[one.speaks] for one in members]), level)
    asked = sum(int(one.there[included].sum()) for one in members)
    could = len(members) * int(included.sum())
    rate = 1.0 if asked == could else share_interval(asked, could, 1.0 - 2.0 * level)[0]
    if len(counted):
        of_count = 2.0 * noise_at_most(counted, level)
        changed = math.hypot(changed, noise / max(of_count, 1e-9))
    return (noise / changed if changed else math.inf), rate, len(members)


def _measured_stage(event: MatrixEvent, members: list[Heard], level: float) -> tuple[float, float, int]:
    """Return the same of a stage of correlated noise, which is one release.

    Noise and influence are encoded first. A person who takes part too often, or again too soon, changes more. No round
    alone may have less noise than the whole, either.
    """
    influence = _encoded(event, np.array([np.abs(one.influence) for one in members]))
    changed = float(np.linalg.norm(influence, axis=0).max(initial=0.0))
    if changed == 0.0:
        return math.inf, 1.0, 1
    each = level / (1 + len(members))
    noise = _encoded(event, np.array([one.noise for one in members]))[:, members[0].speaks]
    alone = [noise_at_most(one.noise[one.speaks], each) / max(float(one.influence.max()), 1e-9) for one in members]
    return min(noise_at_most(noise.ravel(), each) / changed, *alone), 1.0, 1


def noise_at_most(sample: Floats, level: float) -> float:
    """Return the standard deviation that normal noise with mean 0 exceeds with probability `level` given the sample."""
    from scipy.stats import chi2

    return math.sqrt(float(np.square(sample).sum()) / float(chi2.ppf(level, len(sample)))) if len(sample) else 0.0


def repeated_noise(heard: Sequence[Heard]) -> tuple[str, str] | None:
    """Return the names of two releases with the same noise, or None: noise that is used twice can be subtracted."""
    for task in sorted({one.task for one in heard}):
        own = [one for one in heard if one.task == task and np.ptp(one.noise) > 0]
        for size in sorted({int(one.speaks.sum()) for one in own}):
            alike = [one for one in own if int(one.speaks.sum()) == size]
            rows = np.array([one.noise[one.speaks] for one in alike])
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            i, j = np.nonzero(np.triu(rows @ rows.T, 1) > ALIKE)
            if len(i) and size >= 2 * FEWEST:
                return alike[int(i[0])].name, alike[int(j[0])].name
    return None
