"""What one client's upload tells of the items that the client touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedrec import params as named
from fedrec.client.pool import LogPool
from fedrec.data.slices import resolve
from fedrec.params import Array
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.noise import SeededNoise
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import CooccurrenceTask, CountTask, FitTask
from fedrec.protocol.triangle import unpacked
from fedrec.random import Key
from fedrec.server.spectral import projected

Floats = NDArray[np.float64]
MANY = 1 << 30
"""More people than whose norm any upload has: what is measured is not refused."""


@dataclass(frozen=True)
class Leak:
    """How well touched items are found, on average over people.

    Attributes:
        task: kind of the task.
        part: which part of the upload was read.
        view: "upload": what a client sends, as whoever receives it sees it; "noised": the same with the noise of the
            release, which is what is left for somebody who knows everybody else.
        precision: share of the named items that were touched.
        recall: share of the touched items that were named.
        chance: precision of somebody who guesses.
        auc: probability that a touched item looks more touched than another; 1/2 is chance.
        auc_low: lower end of its 95 % interval over people.
        auc_high: upper end.
        people: how many uploads were looked at.
        longest: the largest norm among them, in clip norms; None where nothing is clipped.
    """

    task: str
    part: str
    view: str
    precision: float
    recall: float
    chance: float
    auc: float
    auc_low: float
    auc_high: float
    people: int
    longest: float | None


def touched(
    pool: LogPool, plan: RoundPlan, mechanism: GaussianMechanism | None, n_people: int, key: Key, masked: bool = False
) -> list[Leak]:
    """Return what single uploads to a plan give away: as they are, and under the noise of the release if there is one.

    The attacker names every item whose row is not zero; where most rows are not, as many of the strongest as the
    person touched, which favours the attacker.

    Args:
        pool: the real people.
        plan: what is asked; one person at a time answers it.
        mechanism: clip norm and noise of the release.
        n_people: how many people are attacked.
        key: decides who, and the noise.
        masked: uploads are masked: nobody receives one that tells anything, so only the noised sum is attacked.
    """
    if isinstance(plan.task, FitTask):  # whoever's turn it is
        plan = replace(plan, task=plan.task.model_copy(update={"turn": None}))
    low, high = resolve(pool.log, plan.task.window)
    users = np.flatnonzero(high > low)
    slots = np.sort(key.child("who").numpy().permutation(len(users))[:n_people])
    longest = 0.0
    found: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for slot in slots:
        tally = _received(pool.run(replace(plan, slots=np.array([slot], np.int64))), plan, pool.name)
        truth = np.zeros(plan.n_items, np.bool_)
        truth[pool.log.history(users[slot])[: high[users[slot]]]] = True
        if truth.all() or not tally.sums:
            continue
        longest = max(longest, named.norm(_released(tally.sums, plan)))
        alone = strengths(tally.sums, plan)
        views = {} if masked else {"upload": alone}
        if mechanism is not None:
            views["noised"] = strengths(_noised(tally.sums, mechanism, key.child("noise", int(slot))), plan)
        for view, parts in views.items():
            for part in alone:
                found.setdefault((part, view), []).append(_judged(parts[part], truth))
    most = None if mechanism is None else longest / mechanism.clip_norm
    return [_leak(plan.task.kind, part, view, np.array(rows), most) for (part, view), rows in found.items()]


def strengths(sums: Mapping[str, Array], plan: RoundPlan) -> dict[str, Floats]:
    """Return, for each part of an upload that tells of items, [n_items] how touched each item looks in it.

    Counts and pairs are never negative, so their sign helps against noise; of the statistic in feature space how far it
    stretches the item's own features, for it lies in the span of those that were touched; of an update the length of
    the item's rows.
    """
    n, task = plan.n_items, plan.task
    found: dict[str, Floats] = {}
    if not isinstance(task, CountTask | CooccurrenceTask):
        from fedrec.models.build import MODELS

        rows_of = sorted(MODELS[type(plan.model)].row_names & sums.keys())
        squares = [np.square(sums[name].reshape(n, -1), dtype=np.float64).sum(axis=1) for name in rows_of]
        return {"rows": np.sqrt(np.sum(squares, axis=0))} if squares else {}
    if "counts" in sums:
        found["counts"] = sums["counts"].astype(np.float64)
    if "pairs" in sums:
        found["pairs"] = np.asarray(unpacked(sums["pairs"][:, 0], n).sum(axis=1), np.float64)
    if "features" in sums:
        rows = plan.inputs["features"].astype(np.float64)
        square = unpacked(sums["features"], rows.shape[1]).astype(np.float64)
        length = np.maximum(np.linalg.norm(rows, axis=1), 1e-12)
        found["features"] = np.asarray(np.linalg.norm(rows @ square, axis=1) / length)
    return found


def _received(tally: Tally, plan: RoundPlan, node: str) -> Tally:
    """Return an upload after its way through the codec."""
    shapes = {name: (value.shape, value.dtype) for name, value in tally.sums.items()}
    return Tally.from_bytes(tally.to_bytes(plan.coding, node), plan.coding, shapes)


def _released(sums: Mapping[str, Array], plan: RoundPlan) -> Mapping[str, Array]:
    """Return what noise is added to: of pairs the items' part and what they are in feature space."""
    return projected(plan.inputs.get("features"), sums, MANY) if "pairs" in sums else sums


def _noised(sums: Mapping[str, Array], mechanism: GaussianMechanism, key: Key) -> dict[str, Array]:
    """Return one upload with the noise of the whole release."""
    charge = PrivacyLedger(None, epsilon=None, delta=0.5).charge("one upload", mechanism.event(), mechanism.clip_norm)
    return mechanism.noised(dict(sorted(sums.items())), 1.0, charge, SeededNoise(key))


def _judged(found: Floats, truth: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Return precision, recall, chance and the area under the curve of one person."""
    n, wanted = len(truth), int(truth.sum())
    named = found > 0
    if 2 * int(named.sum()) > n:
        named = np.zeros(n, np.bool_)
        named[np.argsort(-found, kind="stable")[:wanted]] = True
    hits = int((named & truth).sum())
    others = np.sort(found[~truth])
    above = np.searchsorted(others, found[truth], "left") + np.searchsorted(others, found[truth], "right")
    auc = float(above.mean()) / (2.0 * len(others))
    return hits / max(1, int(named.sum())), hits / wanted, wanted / n, auc


def _leak(task: str, part: str, view: str, rows: Floats, longest: float | None) -> Leak:
    precision, recall, chance, auc = (float(column.mean()) for column in rows.T)
    width = 1.96 * float(rows[:, 3].std(ddof=1)) / math.sqrt(len(rows)) if len(rows) > 1 else 0.5
    low, high = max(0.0, auc - width), min(1.0, auc + width)
    return Leak(task, part, view, precision, recall, chance, auc, low, high, len(rows), longest)
