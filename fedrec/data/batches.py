"""Padded batches cut from histories, in NumPy, for many clients at once.

What a client draws depends on its own number and the key only, so one client alone and a thousand together draw the
same. Sequences are left-aligned; `START` stands before the first interaction; padding is 0 and masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedrec.data.context import ContextConfig, split
from fedrec.data.log import InteractionLog
from fedrec.random import Key, bits_of, uniforms_of

START = -1
NEVER = 2**31 - 1

Ints = NDArray[np.int64]


class Histories(NamedTuple):
    """What b people did so far: `items` [b, L] item numbers (`START` first where the model wants it), `mask` [b, L]."""

    items: Any
    mask: Any


class Batch(NamedTuple):
    """What one local step of b people looks at: NumPy arrays as drawn, torch tensors inside a model.

    Attributes:
        inputs: [b, L] item numbers known before the targets, or `START`.
        input_mask: [b, L] true where `inputs` is not padding.
        targets: [b, T] item numbers to predict; position t of a causal model follows input t.
        target_mask: [b, T] true where a target counts.
        negatives: [b, N] item numbers that stand for the rest of the catalogue.
        negative_since: [b, N] the position from which on the person has the negative, so that it no longer counts as
            one; `NEVER` where that does not happen.
        seeds: [b] integers that seed the dropout of each person.
        events: [b, T] which of the spec's kinds each target is, -1 for another; [b, 0] if nobody asked.
        values: [b, T] value of each target, NaN where it has none; [b, 0] if nobody asked.
        moments: [b, T, m] what is known of the moment of each target; [b, 0, 0] if nobody asked.
    """

    inputs: Any
    input_mask: Any
    targets: Any
    target_mask: Any
    negatives: Any
    negative_since: Any
    seeds: Any
    events: Any = np.zeros((0, 0), np.int64)
    values: Any = np.zeros((0, 0), np.float32)
    moments: Any = np.zeros((0, 0, 0), np.float32)


@dataclass(frozen=True)
class BatchSpec:
    """What a model wants to see.

    Attributes:
        kind: "causal": inputs shifted against targets; "pairs": the whole history beside sampled targets.
        length: the longest input.
        windows: for "causal", the newest stretch of a history or a random one.
        targets: for "pairs", how many targets.
        negatives: how many uniform negatives; None: the whole catalogue.
        kinds: names of events that targets are told apart by, and a wish for their values; None: neither is needed.
        context: what is told apart of the moment of a target; None: nothing.
    """

    kind: Literal["causal", "pairs"]
    length: int
    windows: Literal["last", "random"] = "last"
    targets: int = 0
    negatives: int | None = 0
    kinds: tuple[str, ...] | None = None
    context: ContextConfig | None = None


@dataclass(frozen=True)
class Cohort:
    """The clients of one computation, and the stretch of each history that it is about.

    Attributes:
        log: the histories.
        users: [c] row groups of `log`.
        ids: [c] numbers that name the clients in random streams.
        low: [c] place of the first interaction in the window.
        high: [c] place after the last interaction in the window.
    """

    log: InteractionLog
    users: Ints
    ids: Ints
    low: Ints
    high: Ints

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.users)

    def take(self, which: Any) -> Cohort:
        """Return the cohort of only these places (an index array or a slice)."""
        return Cohort(self.log, self.users[which], self.ids[which], self.low[which], self.high[which])


def draw(cohort: Cohort, spec: BatchSpec, n_items: int, key: Key, whole_history: bool = True) -> Batch:
    """Return the batch that each client of the cohort draws under `key`, as arrays with the cohort as first axis.

    Negatives are uniform over the `n_items` of the catalogue, whatever anybody touched: no test set can inform them.
    What the person already has at a position is not a negative there, as it is not a candidate when ranking; without
    `whole_history` only what the person took in the window counts as had, the way to forget old likes.
    """
    (batch,) = draw_steps([cohort], spec, n_items, [key], whole_history)
    return batch


def draw_steps(
    cohorts: Sequence[Cohort], spec: BatchSpec, n_items: int, keys: Sequence[Key], whole_history: bool = True
) -> list[Batch]:
    """Return what `draw` returns for each key, in one computation: many small ones cost more to start than to do.

    Args:
        cohorts: the same c clients for every key, perhaps with another window each time.
        spec: what the model wants to see.
        n_items: size of the catalogue.
        keys: of the steps.
        whole_history: see `draw`.
    """
    ids, c = cohorts[0].ids, len(cohorts[0])
    if spec.negatives is None:
        negatives = np.tile(np.arange(n_items), (len(keys), c, 1))
    else:
        bits = bits_of([key.child("negatives") for key in keys], ids, spec.negatives)
        negatives = (bits - bits // np.uint64(n_items) * np.uint64(n_items)).view(np.int64)  # quicker than a remainder
    seeds = (bits_of([key.child("dropout") for key in keys], ids, 1)[..., 0] >> np.uint64(33)).astype(np.int64)
    if spec.kind == "pairs":
        never = np.full_like(negatives[0], NEVER)
        pairs = _pairs(cohorts, spec, keys)
        told = (np.zeros((c, 0), np.int64), np.zeros((c, 0), np.float32), np.zeros((c, 0, 0), np.float32))
        return [Batch(*pair, own, never, seed, *told) for pair, own, seed in zip(pairs, negatives, seeds, strict=True)]
    return [
        _causal_batch(*each, whole_history)
        for each in zip(cohorts, [spec] * len(keys), keys, negatives, seeds, strict=True)
    ]


def _causal_batch(
    cohort: Cohort, spec: BatchSpec, key: Key, negatives: Ints, seeds: Ints, whole_history: bool
) -> Batch:
    start, end = _window(cohort, spec, key)
    since = cohort.log.first_place(cohort.users, negatives)
    if not whole_history:
        since = np.where(since < cohort.low[:, None], NEVER, since)
    # What comes after the stretch must not show in the batch, not even as a number.
    since = np.where(since < end[:, None], since - start[:, None], NEVER)
    told = _told(cohort, start, end, spec.kinds)
    moments = _moments(cohort, start, end, spec.context)
    return Batch(*_causal(cohort, start, end), negatives, since, seeds, *told, moments)


def _window(cohort: Cohort, spec: BatchSpec, key: Key) -> tuple[Ints, Ints]:
    """Return the [c] first and past-the-last places of the stretch that each client trains on."""
    end = cohort.high
    if spec.windows == "random":
        first = np.minimum(cohort.low + spec.length, cohort.high)
        u = key.child("window").uniforms(cohort.ids, 1)[:, 0]
        end = first + np.floor(u * (cohort.high - first + 1)).astype(np.int64)
    return np.maximum(end - spec.length, 0), end


def _causal(cohort: Cohort, start: Ints, end: Ints) -> tuple[Ints, NDArray[np.bool_], Ints, NDArray[np.bool_]]:
    width = int((end - start).max(initial=1))
    place = start[:, None] + np.arange(width)
    valid = place < end[:, None]
    targets = _items(cohort, place, valid)
    inputs = _items(cohort, place - 1, valid & (place > 0))
    inputs[(place == 0) & valid] = START
    return inputs, valid, targets, valid & (place >= cohort.low[:, None])


def _told(cohort: Cohort, start: Ints, end: Ints, kinds: tuple[str, ...] | None) -> tuple[Ints, NDArray[np.float32]]:
    """Return kinds and values of the targets of `_causal`, or nothing of each."""
    if kinds is None:
        return np.zeros((len(cohort), 0), np.int64), np.zeros((len(cohort), 0), np.float32)
    log = cohort.log
    place = start[:, None] + np.arange(int((end - start).max(initial=1)))
    valid = place < end[:, None]
    rows = np.where(valid, log.offsets[cohort.users][:, None] + place, 0)
    bare = [split(kind)[0] for kind in log.event_kinds]
    number = np.array([kinds.index(kind) if kind in kinds else -1 for kind in bare], np.int64)
    events = np.where(valid, number[log.event[rows]], -1)
    return events, np.where(valid, log.value[rows], np.nan).astype(np.float32)


def _moments(cohort: Cohort, start: Ints, end: Ints, context: ContextConfig | None) -> NDArray[np.float32]:
    """Return [c, T, m] the moments of the targets of `_causal`, zeros for padding; or nothing."""
    if context is None:
        return np.zeros((len(cohort), 0, 0), np.float32)
    place = start[:, None] + np.arange(int((end - start).max(initial=1)))
    return moments_at(cohort, place, context) * (place < end[:, None])[..., None]


def moments_at(cohort: Cohort, place: Ints, context: ContextConfig) -> NDArray[np.float32]:
    """Return the moments of the interactions at these places of each history; any for places past its end."""
    log = cohort.log
    most = np.maximum(log.counts[cohort.users] - 1, 0)
    rows = log.offsets[cohort.users][:, None] + np.minimum(place, most[:, None])
    return context.moments(np.asarray(log.time)[rows], np.asarray(log.event)[rows], log.event_kinds)


def _pairs(
    cohorts: Sequence[Cohort], spec: BatchSpec, keys: Sequence[Key]
) -> Iterator[tuple[Ints, NDArray[np.bool_], Ints, NDArray[np.bool_]]]:
    """Yield inputs, their mask, targets and their mask for each step; the inputs of a cohort that stays are shared."""
    draws = uniforms_of([key.child("targets") for key in keys], cohorts[0].ids, spec.targets)
    known: dict[int, Histories] = {}
    for cohort, u in zip(cohorts, draws, strict=True):
        if id(cohort) not in known:
            known[id(cohort)] = histories(cohort, cohort.high, spec)
        found = known[id(cohort)]
        width = cohort.high - cohort.low
        place = cohort.low[:, None] + (u * width[:, None]).astype(np.int64)
        valid = np.repeat((width > 0)[:, None], spec.targets, axis=1)
        yield found.items, found.mask, _items(cohort, place, valid), valid


def _items(cohort: Cohort, place: Ints, valid: NDArray[np.bool_]) -> Ints:
    """Return the items at these places of each history, 0 where not valid."""
    rows, item = cohort.log.offsets[cohort.users][:, None] + place, np.asarray(cohort.log.item)
    if valid.all():
        return item.take(rows).astype(np.int64)
    return np.where(valid, item.take(np.where(valid, rows, 0)), 0).astype(np.int64)


def histories(cohort: Cohort, end: Ints, spec: BatchSpec) -> Histories:
    """Return what each client knew before place `end` [c], as a recommender's `encode` wants it."""
    lead = 1 if spec.kind == "causal" else 0
    start = np.maximum(end + lead - spec.length, 0)
    width = max(1, int((end + lead - start).max(initial=1)))
    place = start[:, None] + np.arange(width) - lead
    valid = place < end[:, None]
    items = _items(cohort, place, valid & (place >= 0))
    items[(place < 0) & valid] = START
    return Histories(items, valid)


def histories_of(lists: Sequence[Sequence[int]], spec: BatchSpec) -> Histories:
    """Return plain lists of item numbers, oldest first, as a recommender's `encode` wants them."""
    counts = np.array([len(items) for items in lists], np.int64)
    flat = np.array([item for items in lists for item in items] or [0], np.int64)
    n = len(lists)
    log = InteractionLog(
        np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        flat.astype(np.int32),
        np.zeros(len(flat), np.int64),
        np.zeros(len(flat), np.int8),
        np.zeros(len(flat), np.float32),
        tuple(str(i) for i in range(n)),
    )
    users = np.arange(n, dtype=np.int64)
    return histories(Cohort(log, users, users, np.zeros_like(counts), counts), counts, spec)
