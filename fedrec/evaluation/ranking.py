"""Where the held-out items stand among all items that a person does not know yet.

Everything that is undecided counts against the recommender: a tie with an item that the person did not choose is lost,
and a score that is NaN is the worst score there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import ConfigError, DataError
from fedrec.evaluation.passes import WORST, Flags, bound_of_kth, n_at_least, row_blocks
from fedrec.random import Key


@dataclass(frozen=True, eq=False)
class ItemLists:
    """A list of item numbers for each of b people, one after the other (CSR).

    >>> ItemLists(np.array([0, 2, 2, 3]), np.array([7, 4, 9])).rows.tolist()
    [0, 0, 2]

    Attributes:
        offsets: [b + 1] int64; the list of person i is ``items[offsets[i] : offsets[i + 1]]``.
        items: [T] int64 item numbers.
    """

    offsets: NDArray[np.int64]
    items: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Check that the offsets cut up the items."""
        steps = np.diff(self.offsets)
        if len(self.offsets) == 0 or self.offsets[0] != 0 or (steps < 0).any() or self.offsets[-1] != len(self.items):
            raise DataError(
                f"Offsets of item lists must rise from 0 to the number of items, {len(self.items):,}; make them so."
            )

    @classmethod
    def from_pairs(cls, rows: NDArray[np.int64], items: NDArray[np.int64], n_people: int) -> ItemLists:
        """Group pairs (person, item), both [T], into the lists of `n_people` people, in the order given."""
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=n_people)
        return cls(np.concatenate(([0], np.cumsum(counts))).astype(np.int64), np.asarray(items, np.int64)[order])

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """[b] how many items each person's list holds."""
        return np.diff(self.offsets)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """[T] the person of each item."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.counts)


Targets: TypeAlias = ItemLists
"""Held-out items per person."""
Known: TypeAlias = ItemLists | tuple[NDArray[np.int64], NDArray[np.int64]]
"""What people know: a list for each of them, or pairs (rows [K], items [K]) in any order; repeats do no harm."""


@dataclass(frozen=True, eq=False)
class RankedTargets:
    """The held-out items of b people in the order of their ranks.

    Attributes:
        targets: the held-out items that were not known, each once, best rank first.
        ranks: [T] int64 rank of each of them, 1 is the top.
        n_candidates: [b] int64, how many items were ranked for each person, targets included.
    """

    targets: Targets
    ranks: NDArray[np.int64]
    n_candidates: NDArray[np.int64]

    @property
    def places(self) -> NDArray[np.int64]:
        """[T] the place, from 1, of each target among the targets of its person."""
        return np.arange(len(self.ranks)) - self.targets.offsets[self.targets.rows] + 1


@dataclass(frozen=True, eq=False)
class Candidates:
    """The scores of the items that may be recommended.

    Attributes:
        scores: [b, n_items] float32; -inf where the person knows the item, and nowhere else; no NaN.
    """

    scores: NDArray[np.float32]

    @classmethod
    def of(cls, scores: NDArray[np.float32], known: Known, *, overwrite: bool = False) -> Candidates:
        """Mask what people know; a candidate's NaN or -inf becomes the smallest finite number.

        Args:
            scores: [b, n_items] float32; not changed unless that is allowed.
            known: items that each person knows.
            overwrite: the memory of the scores may be used for the candidates.

        Raises:
            DataError: the scores are no matrix, or `known` names a person or an item outside of it.
        """
        if scores.ndim != 2:
            raise DataError(f"Scores to rank must have the shape [people, items], not {list(scores.shape)}.")
        rows, items = (known.rows, known.items) if isinstance(known, ItemLists) else known
        _check_inside(scores, rows, items, "known")
        masked = np.array(scores, np.float32, order="C", copy=None if overwrite and scores.flags.writeable else True)
        # The smallest score is NaN where any is: looking costs a quarter of replacing.
        if masked.size and not masked.min() >= WORST:
            np.fmax(masked, WORST, out=masked)
        masked.reshape(-1)[rows * scores.shape[1] + items] = -np.inf
        return cls(masked)

    @property
    def n_candidates(self) -> NDArray[np.int64]:
        """[b] how many items each person may be recommended."""
        blocks = row_blocks(*self.scores.shape)
        counts = [self._flags.at_least(self.scores[block], WORST).sum() for block in blocks]
        return np.concatenate([np.zeros(0, np.int64), *counts])

    def unknown(self, targets: Targets) -> Targets:
        """Return the targets that are candidates, each once and in ascending order per person.

        Raises:
            DataError: the targets are not of as many people, or name an item that has no score.
        """
        b, n_items = self.scores.shape
        places = self._places(targets)
        kept = self.scores.reshape(-1)[places] > -np.inf
        if kept.all() and (places[1:] > places[:-1]).all():
            return targets
        rows, items = np.divmod(np.unique(places[kept]), max(n_items, 1))
        return ItemLists.from_pairs(rows, items, b)

    def rank(self, targets: Targets) -> RankedTargets:
        """Rank the targets; see `rank_targets`."""
        targets = self.unknown(targets)
        rows = targets.rows
        scores = self.scores[rows, targets.items]
        order = np.lexsort((targets.items, -scores, rows))
        targets, scores = ItemLists(targets.offsets, targets.items[order]), scores[order]
        starts = targets.offsets[rows]
        as_good, n_candidates = self._counts(rows, scores)
        above = as_good - (_run_ends(rows, scores) - starts)
        return RankedTargets(targets, np.arange(len(rows)) - starts + 1 + above, n_candidates)

    def top_k(self, k: int, targets: Targets) -> NDArray[np.int64]:
        """List the best candidates; see `top_k`."""
        b, n_items = self.scores.shape
        if k < 1:
            raise ConfigError(f"A list of the best {k} items is empty; ask for 1 or more.")
        lists = np.empty((b, k), np.int64)
        target_places = self._places(targets)
        for block in row_blocks(b, n_items):
            scores = self.scores[block]
            rows, items = self._flags.at_least(scores, bound_of_kth(scores, k)).where()
            keys = _falling(rows, scores[rows, items])
            order = np.argsort(keys)
            if (np.diff(keys[order]) == 0).any():
                is_target = np.isin((rows + block.start) * n_items + items, target_places)
                order = np.lexsort((items, is_target, keys))
            starts = np.searchsorted(rows, np.arange(len(scores) + 1))
            place = starts[:-1, None] + np.arange(k)
            lists[block] = np.append(items[order], -1)[np.where(place < starts[1:, None], place, -1)]
        return lists

    def _counts(
        self, rows: NDArray[np.int64], thresholds: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return how many candidates are at least as good as each of T thresholds, [T], and `n_candidates`."""
        if not len(rows) or len(rows) != len(self.scores) or (np.diff(rows) != 1).any():
            return n_at_least(self.scores, rows, thresholds, self._flags), self.n_candidates
        above, n = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for block in row_blocks(*self.scores.shape):  # one target each: both while the block is in the cache
            above[block] = self._flags.at_least(self.scores[block], thresholds[block, None]).sum()
            n[block] = self._flags.at_least(self.scores[block], WORST).sum()
        return above, n

    @cached_property
    def _flags(self) -> Flags:
        return Flags(self.scores.shape[1])

    def _places(self, targets: Targets) -> NDArray[np.int64]:
        """Return where the targets' scores lie in the flattened ones, [T], having checked that they do."""
        b, n_items = self.scores.shape
        if len(targets.offsets) - 1 != b:
            raise DataError(f"There are scores for {b:,} people and targets for {len(targets.offsets) - 1:,}.")
        _check_inside(self.scores, targets.rows, targets.items, "target")
        return np.asarray(targets.rows * n_items + targets.items, np.int64)


def rank_targets(scores: NDArray[np.float32], known: Known, targets: Targets) -> RankedTargets:
    r"""Rank each person's held-out items among all items that the person does not know.

    .. math:: rank_j = j + |\{i : i \text{ neither known nor a target}, s_i \ge s_{t_j}\}|

    for the targets :math:`t_1, t_2, ...` of one person in the order of falling scores. A target that the person already
    knows is dropped.

    Args:
        scores: [b, n_items] float32.
        known: items that each person knows; they are no candidates.
        targets: held-out items of the b people; repeats count once.

    Raises:
        DataError: shapes do not fit together, or a number is out of range.

    Source: ranking against the whole catalogue, as Krichene and Rendle, KDD 2020, ask for.
    """
    return Candidates.of(scores, known).rank(targets)


def top_k(scores: NDArray[np.float32], known: Known, k: int, targets: Targets) -> NDArray[np.int64]:
    """List the k best items that each person does not know; in a tie a target comes last, then the higher number.

    Args:
        scores: [b, n_items] float32.
        known: items that each person knows; they are no candidates.
        k: length of the lists.
        targets: held-out items of the b people, for deciding ties against them.

    Returns:
        [b, k] int64 item numbers, best first; -1 where there are fewer than k candidates.

    Raises:
        ConfigError: k is below 1.
        DataError: shapes do not fit together, or a number is out of range.
    """
    return Candidates.of(scores, known).top_k(k, targets)


def sampled_ranks(
    scores: NDArray[np.float32],
    known: Known,
    targets: Targets,
    clients: NDArray[np.int64],
    key: Key,
    *,
    n_sampled: int = 99,
) -> RankedTargets:
    """Rank each person's held-out items among them and a few items drawn at random: only to compare with old papers.

    The metrics of such ranks are biased, and they may put recommenders in another order than the true ones do. With one
    target per person and 99 others this is the protocol of the NCF paper.

    Args:
        scores: [b, n_items] float32.
        known: items that each person knows; they are no candidates.
        targets: held-out items of the b people.
        clients: [b] client numbers; a client draws the same items in whatever batch it is.
        key: the stream of the draws.
        n_sampled: how many items are drawn, without replacement, from those neither known nor held out; all of them
            where there are fewer.

    Raises:
        DataError: shapes do not fit together, or a number is out of range.

    Source: He et al., WWW 2017, section 4.1; the bias: Krichene and Rendle, KDD 2020.
    """
    candidates = Candidates.of(scores, known)
    b, n_items = scores.shape
    if len(clients) != b:
        raise DataError(f"There are scores for {b:,} people and {len(clients):,} client numbers.")
    held_out = candidates.unknown(targets)
    others = candidates.scores.copy()
    others[held_out.rows, held_out.items] = -np.inf
    few = np.full_like(others, -np.inf)
    few[held_out.rows, held_out.items] = candidates.scores[held_out.rows, held_out.items]
    n_drawn = min(n_sampled, n_items)
    for block in row_blocks(b, n_items):
        draws = np.where(others[block] > -np.inf, key.uniforms(clients[block], n_items), 1.0)
        items = np.argpartition(draws, n_drawn - 1, axis=1)[:, :n_drawn]
        rows = np.arange(block.start, block.stop)[:, None]
        few[rows, items] = np.maximum(few[rows, items], others[rows, items])
    return Candidates(few).rank(held_out)


def _check_inside(scores: NDArray[np.float32], rows: NDArray[np.int64], items: NDArray[np.int64], what: str) -> None:
    b, n_items = scores.shape
    for numbers, limit, noun in ((rows, b, "person"), (items, n_items, "item")):
        if len(numbers):
            low, high = numbers.min(), numbers.max()
            if low < 0 or high >= limit:
                entry = f"A {what} entry names {noun} {high if high >= limit else low}"
                raise DataError(f"{entry}, but the scores are of {b:,} people and {n_items:,} items.")


def _falling(rows: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return numbers, [T], in the order of (row, falling score), equal where both are: quicker to sort than pairs."""
    bits = (scores + np.float32(0)).view(np.int32)  # adding 0 turns -0 into it: they tie
    return (rows << 32) - np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def _run_ends(rows: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return for each target, [T] sorted by (row, falling score), where its run of equal scores ends."""
    last = np.ones(len(rows), np.bool_)
    last[:-1] = (rows[1:] != rows[:-1]) | (scores[1:] != scores[:-1])
    ends = np.flatnonzero(last)
    return ends[np.searchsorted(ends, np.arange(len(rows)))] + 1
