"""Windows of a person's history, and the slices of time that a lifelong run goes through.

A `Window` says which of a client's own interactions a task is about, in words that a client applies to its own store:
no list of rows ever travels. Resolved on a log it gives, for each user, a range ``[low, high)`` of places in that
user's history; everything before `low` is what the person already knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fedrec.data.catalog import ItemCatalog
from fedrec.data.log import InteractionLog
from fedrec.errors import DataError

FOREVER = 2**62
"""Seconds before 1970 that no interaction is from."""


class TimeWindow(BaseModel):
    """Interactions with ``start <= time < end``."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    kind: Literal["time"] = "time"
    start: int
    """First second of the window (UTC)."""
    end: int
    """First second after the window (UTC)."""


class LastWindow(BaseModel):
    """Interactions counted from the end of each history: `take` of them, after leaving out the last `skip`."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    kind: Literal["last"] = "last"
    skip: int = Field(ge=0)
    """How many of the newest interactions lie after the window."""
    take: int | None = Field(default=None, ge=1)
    """How many interactions the window holds; None: all older ones."""


Window = Annotated[TimeWindow | LastWindow, Field(discriminator="kind")]


def resolve(
    log: InteractionLog, window: TimeWindow | LastWindow, users: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ``(low, high)``: the range of places that the window covers in each user's history.

    Args:
        log: the histories.
        window: which part of each.
        users: [c] user numbers; everybody if not given.

    Returns:
        [c] places before the first interaction in the window, and [c] places after the last one.
    """
    start, end = (log.offsets[:-1], log.offsets[1:]) if users is None else (log.offsets[users], log.offsets[users + 1])
    start, end = np.asarray(start), np.asarray(end)
    if isinstance(window, TimeWindow):
        return _first_since(log, start, end, window.start) - start, _first_since(log, start, end, window.end) - start
    high = np.maximum(end - start - window.skip, 0)
    low = np.zeros_like(high) if window.take is None else np.maximum(high - window.take, 0)
    return low, high


def _first_since(log: InteractionLog, start: NDArray[np.int64], end: NDArray[np.int64], time: int) -> NDArray[np.int64]:
    """Return [c] the first row of ``[start, end)`` at or after `time`: bisection, all histories at once.

    It reads a few rows of each history, where comparing every time of the log would read and hold all of them.
    """
    low, high = start.copy(), end.copy()
    for _ in range(int((end - start).max(initial=0)).bit_length()):
        middle = (low + high) >> 1
        open_ = low < high
        earlier = open_ & (log.time[np.where(open_, middle, 0)] < time)
        low = np.where(earlier, middle + 1, low)
        high = np.where(earlier, high, middle)
    return low


@dataclass(frozen=True)
class TimeSlice:
    """One step of the life of the recommender: what is trained on, then what it is tested on.

    Attributes:
        index: place in the stream, 0 is the base.
        train: the interactions to learn from; older ones may serve as context.
        test: the interactions to predict, all of them newer than `train`.
        n_items: catalogue size while training.
        n_items_test: catalogue size while testing; the items in between are new.
        known: while testing, everything up to its end is known, whatever is tested; None: all before each question.
        fit: what the rounds train on, if not `train`; popularity and statistics are counted over `train` either way.
        life: the test windows of all slices, to measure what is retained; empty where nothing is held back for that.
        masked: while testing, what people took in it is no candidate; None: all that is known.
        since: people who did nothing before this second are new when tested; None: those of whom nothing is known.
        born: of each slice of `life`, `since` and how many items there were before it.
        validation: interactions between `train` and `test`, for choices; None: none are kept.
    """

    index: int
    train: TimeWindow | LastWindow
    test: TimeWindow | LastWindow
    n_items: int
    n_items_test: int
    known: TimeWindow | LastWindow | None = None
    fit: TimeWindow | LastWindow | None = None
    life: tuple[TimeWindow, ...] = ()
    validation: TimeWindow | LastWindow | None = None
    masked: TimeWindow | None = None
    since: int | None = None
    born: tuple[tuple[int, int], ...] = ()

    @property
    def new_items(self) -> range:
        """Numbers of items that joined after training."""
        return range(self.n_items, self.n_items_test)


def stream_slices(
    log: InteractionLog, catalog: ItemCatalog, base: float, later: int, holdout: float
) -> tuple[TimeSlice, ...]:
    """Cut all interactions by global time into a base, equal later slices, and a tail that is only tested on.

    Slice i is tested on the next slice, before anything is trained on it; the last slice is tested on the tail.

    Args:
        log: all interactions.
        catalog: all items, in order of arrival.
        base: share of the interactions in slice 0.
        later: how many slices follow.
        holdout: share of the interactions in the tail.

    Raises:
        DataError: a slice would be empty.
    """
    n = len(log)
    shares = [base + (1.0 - base - holdout) * i / max(later, 1) for i in range(later + 1)]
    places = [0, *(min(n - 1, round(share * n)) for share in shares), n - 1]
    times = np.partition(log.time, sorted(set(places)))  # a few order statistics; sorting would take many times longer
    first, *cuts, last = (int(times[place]) for place in places)
    bounds = [first, *cuts, last + 1]
    if any(b <= a for a, b in pairwise(bounds)):
        raise DataError(
            f"Cannot cut {n:,} interactions into a base of {base:.0%}, {later} later slices and a tail of {holdout:.0%}"
            ": a slice would be empty; the times are too coarse or the shares too small."
        )
    return tuple(
        TimeSlice(
            index=i,
            train=TimeWindow(start=bounds[i], end=bounds[i + 1]),
            test=TimeWindow(start=bounds[i + 1], end=bounds[i + 2]),
            n_items=catalog.n_items_at(bounds[i + 1]),
            n_items_test=catalog.n_items_at(bounds[i + 2]),
        )
        for i in range(later + 1)
    )


def schedule_slices(
    catalog: ItemCatalog, start: int, interval_seconds: int, later: int, test: float
) -> tuple[TimeSlice, ...]:
    """Cut by the clock alone: slice k is due at ``start + k * interval_seconds``, with what came since the last.

    The end of each interval is tested before the next slice trains on it, so nothing is left out and nothing is learnt
    before it is tested. No interaction is looked at, so a server that knows only the catalogue can do it.

    Args:
        catalog: all items known by now, in order of arrival.
        start: when the first slice is due, seconds since 1970 UTC; it takes everything before.
        interval_seconds: from one slice to the next.
        later: how many slices follow the first.
        test: share of an interval that is tested.

    Raises:
        DataError: the catalogue holds no item from before the first slice.
    """
    tested = max(1, round(test * interval_seconds))
    due = [start + k * interval_seconds for k in range(later + 1)]
    if not catalog.n_items_at(due[0] - tested):
        raise DataError(
            f"No item of the catalogue joined before {due[0] - tested} (split.start, less the tested part), so the "
            "first slice has nothing to rank; let split.start be later."
        )
    cuts = [-FOREVER, *(time - tested for time in due)]
    return tuple(
        TimeSlice(
            index=k,
            train=TimeWindow(start=cuts[k], end=cuts[k + 1]),
            test=TimeWindow(start=cuts[k + 1], end=due[k]),
            n_items=catalog.n_items_at(cuts[k + 1]),
            n_items_test=catalog.n_items_at(due[k]),
        )
        for k in range(later + 1)
    )


def leave_one_out(catalog: ItemCatalog, test: Literal["test", "validation"] = "test") -> tuple[TimeSlice, ...]:
    """Return one slice: train on all but each person's last two interactions, test on the last one.

    With ``test="validation"`` the second to last is predicted instead, for choosing settings without looking at the
    last. The person's history at test time is everything before the tested interaction.
    """
    window = LastWindow(skip=0 if test == "test" else 1, take=1)
    return (TimeSlice(0, LastWindow(skip=2), window, len(catalog), len(catalog)),)


def with_validation(slices: Sequence[TimeSlice], share: float) -> tuple[TimeSlice, ...]:
    """Keep the end of each training window for choices; where time goes on, the next slice trains on it.

    Args:
        slices: as cut.
        share: of a window of time that is kept; of histories, one more interaction is.
    """
    found: list[TimeSlice] = []
    for one in slices:
        if isinstance(one.train, TimeWindow):
            before = found[-1].validation if found else None
            start = before.start if isinstance(before, TimeWindow) else one.train.start
            cut = max(start + 1, one.train.end - max(1, round(share * (one.train.end - one.train.start))))
            train: TimeWindow | LastWindow = TimeWindow(start=start, end=cut)
            kept: TimeWindow | LastWindow = TimeWindow(start=cut, end=one.train.end)
        else:
            tested = one.test.skip if isinstance(one.test, LastWindow) else 0
            train, kept = LastWindow(skip=tested + 2), LastWindow(skip=tested + 1, take=1)
        found.append(replace(one, train=train, validation=kept))
    return tuple(found)
