from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrec.errors import ConfigError, DataError
from fedrec.evaluation import passes
from fedrec.evaluation.ranking import Candidates, ItemLists, RankedTargets, Targets, rank_targets, sampled_ranks, top_k
from fedrec.random import Key

NAN, INF = float("nan"), float("inf")
NOBODY_KNOWS = (np.array([], np.int64), np.array([], np.int64))


def lists(*people: list[int]) -> ItemLists:
    offsets = np.cumsum([0, *(len(items) for items in people)])
    return ItemLists(offsets, np.array([item for items in people for item in items], np.int64))


def as_lists(flat: np.ndarray, targets: ItemLists) -> list[list[int]]:
    return [flat[a:b].tolist() for a, b in zip(targets.offsets, targets.offsets[1:], strict=False)]


def row(*scores: float) -> np.ndarray:
    return np.array([scores], np.float32)


def slow_ranking(scores: list[float], known: list[int], targets: list[int]) -> list[tuple[int, bool]]:
    """The slow twin: all candidates of one person as (item, is it a target), in the order of the definition."""
    wanted = set(targets) - set(known)

    def value(item: int) -> float:
        return -INF if np.isnan(scores[item]) else scores[item]

    candidates = [item for item in range(len(scores)) if item not in known]
    candidates.sort(key=lambda item: (-value(item), item in wanted, item))
    return [(item, item in wanted) for item in candidates]


@st.composite
def people(draw: st.DrawFn) -> tuple[np.ndarray, ItemLists, ItemLists]:
    b, n = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    # Few different values, so that ties are the rule.
    value = st.sampled_from([NAN, -INF, -1.0, -0.0, 0.0, 0.5, 2.0, INF])
    scores = np.array([[draw(value) for _ in range(n)] for _ in range(b)], np.float32)
    item_list = st.lists(st.integers(0, n - 1), max_size=n)
    return scores, lists(*(draw(item_list) for _ in range(b))), lists(*(draw(item_list) for _ in range(b)))


@settings(max_examples=150, deadline=None)
@given(people(), st.integers(1, 11))
def test_ranks_and_lists_agree_with_the_slow_twin(case: tuple[np.ndarray, ItemLists, ItemLists], k: int) -> None:
    scores, known, targets = case
    before = scores.copy()
    ranked = rank_targets(scores, known, targets)
    best = top_k(scores, known, k, targets)
    np.testing.assert_array_equal(scores, before)
    by_person = zip(scores.tolist(), as_lists(known.items, known), as_lists(targets.items, targets), strict=True)
    for person, (s, own, wanted) in enumerate(by_person):
        order = slow_ranking(s, own, wanted)
        expected = [(item, rank) for rank, (item, hit) in enumerate(order, 1) if hit]
        start, stop = ranked.targets.offsets[person : person + 2]
        pairs = zip(ranked.targets.items[start:stop].tolist(), ranked.ranks[start:stop].tolist(), strict=True)
        assert list(pairs) == expected
        assert ranked.n_candidates[person] == len(order)
        listed = [item for item, _ in order][:k]
        assert best[person].tolist() == listed + [-1] * (k - len(listed))


@settings(max_examples=60, deadline=None)
@given(people())
def test_counting_by_sorting_agrees_with_counting_by_comparing(case: tuple[np.ndarray, ItemLists, ItemLists]) -> None:
    scores, known, targets = case
    candidates = Candidates.of(scores, known)
    wanted = candidates.unknown(targets)
    thresholds = candidates.scores[wanted.rows, wanted.items]
    expected = [int((candidates.scores[r] >= t).sum()) for r, t in zip(wanted.rows, thresholds, strict=True)]
    assert passes.n_at_least(candidates.scores, wanted.rows, thresholds).tolist() == expected
    assert passes._n_at_least_sorting(candidates.scores, wanted.rows, thresholds).tolist() == expected


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    scores = generator.integers(0, 40, (50, 60)).astype(np.float32)
    known = (generator.integers(0, 50, 400), generator.integers(0, 60, 400))
    for per_person in (2, 12):
        targets = ItemLists(np.arange(51) * per_person, generator.integers(0, 60, 50 * per_person))
        outcomes = []
        for values in (1, 7 * 60, 1 << 18):
            monkeypatch.setattr(passes, "_BLOCK_VALUES", values)
            outcomes.append(
                (
                    rank_targets(scores, known, targets).ranks.tolist(),
                    top_k(scores, known, 10, targets).tolist(),
                    sampled_ranks(scores, known, targets, np.arange(50), Key.from_seed(1), n_sampled=9).ranks.tolist(),
                )
            )
        assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize("n_values", [7, 500, 1 << 20])
@pytest.mark.parametrize("k", [1, 10, 90])
def test_lists_from_wide_catalogues_agree_with_the_slow_twin(n_values: int, k: int) -> None:
    generator = np.random.default_rng(k)
    scores = generator.integers(-n_values, n_values, (5, 2_111)).astype(np.float32)
    scores[generator.random(scores.shape) < 0.02] = NAN
    scores[1] = np.sort(scores[1])
    scores[2, 40:] = NAN
    known = lists(*(generator.integers(0, 2_111, 300).tolist() for _ in range(5)))
    targets = lists(*(generator.integers(0, 2_111, 9).tolist() for _ in range(5)))
    best, ranked = top_k(scores, known, k, targets), rank_targets(scores, known, targets)
    for person, own in enumerate(as_lists(known.items, known)):
        wanted = as_lists(targets.items, targets)[person]
        order = slow_ranking(scores[person].tolist(), own, wanted)
        assert best[person].tolist() == [item for item, _ in order[:k]]
        expected = [rank for rank, (_, hit) in enumerate(order, 1) if hit]
        assert as_lists(ranked.ranks, ranked.targets)[person] == expected


def test_bytes_are_counted_beyond_what_one_byte_holds() -> None:
    # 70,001 candidates that all tie: every flag is set, and the target is last.
    ranked = rank_targets(np.zeros((2, 70_001), np.float32), NOBODY_KNOWS, lists([3], [70_000]))
    assert (ranked.ranks.tolist(), ranked.n_candidates.tolist()) == ([70_001] * 2, [70_001] * 2)


def test_scores_may_be_overwritten_only_if_that_is_allowed() -> None:
    known = (np.array([0]), np.array([1]))
    kept, given_up, frozen = row(1, NAN, NAN), row(1, NAN, NAN), row(1, NAN, NAN)
    frozen.flags.writeable = False
    expected = Candidates.of(kept, known).scores
    np.testing.assert_array_equal(kept, row(1, NAN, NAN))
    for scores in (given_up, frozen):
        np.testing.assert_array_equal(Candidates.of(scores, known, overwrite=True).scores, expected)
    np.testing.assert_array_equal(given_up, expected)


def test_rank_of_one_target_by_hand() -> None:
    assert rank_targets(row(0.1, 0.9, 0.5, 0.7), NOBODY_KNOWS, lists([2])).ranks.tolist() == [3]


def test_known_items_are_no_candidates() -> None:
    known = (np.array([0, 0]), np.array([1, 1]))
    ranked = rank_targets(row(0.1, 0.9, 0.5, 0.7), known, lists([2]))
    assert (ranked.ranks.tolist(), ranked.n_candidates.tolist()) == ([2], [3])


def test_a_tie_counts_against_us() -> None:
    assert rank_targets(row(0.5, 0.5, 0.5), NOBODY_KNOWS, lists([0])).ranks.tolist() == [3]


def test_targets_tied_with_each_other_share_what_is_above_them() -> None:
    ranked = rank_targets(row(0.5, 0.5, 0.5, 0.9), NOBODY_KNOWS, lists([2, 0]))
    assert (ranked.targets.items.tolist(), ranked.ranks.tolist()) == ([0, 2], [3, 4])
    assert top_k(row(0.5, 0.5, 0.5, 0.9), NOBODY_KNOWS, 4, lists([2, 0])).tolist() == [[3, 1, 0, 2]]


def test_a_target_without_a_score_is_last_and_an_item_without_one_is_below_us() -> None:
    assert rank_targets(row(NAN, -INF, 3.0), NOBODY_KNOWS, lists([0])).ranks.tolist() == [3]
    assert rank_targets(row(NAN, NAN, -3.0), NOBODY_KNOWS, lists([2])).ranks.tolist() == [1]


def test_a_target_that_is_known_already_is_dropped() -> None:
    ranked = rank_targets(row(0.1, 0.9, 0.5), (np.array([0]), np.array([1])), lists([1, 2, 2]))
    assert (ranked.targets.items.tolist(), ranked.ranks.tolist()) == ([2], [1])


def test_people_without_targets_keep_their_place() -> None:
    scores = np.array([[1, 2], [2, 1], [1, 2]], np.float32)
    ranked = rank_targets(scores, NOBODY_KNOWS, lists([0], [], [1]))
    assert ranked.targets.counts.tolist() == [1, 0, 1]
    assert ranked.ranks.tolist() == [2, 1]


def test_a_list_is_padded_where_candidates_run_out() -> None:
    assert top_k(row(0.1, NAN, 0.5), (np.array([0]), np.array([2])), 4, lists([])).tolist() == [[0, 1, -1, -1]]


def full_and_sampled(n_sampled: int, n_items: int = 300) -> tuple[RankedTargets, RankedTargets, Targets]:
    generator = np.random.default_rng(2)
    scores = generator.normal(size=(200, n_items)).astype(np.float32)
    targets = ItemLists(np.arange(201), generator.integers(0, n_items, 200))
    known = (generator.integers(0, 200, 900), generator.integers(0, n_items, 900))
    drawn = sampled_ranks(scores, known, targets, np.arange(200), Key.from_seed(3), n_sampled=n_sampled)
    return rank_targets(scores, known, targets), drawn, targets


def test_sampled_ranks_of_all_items_are_the_true_ranks() -> None:
    full, drawn, _ = full_and_sampled(1_000)
    assert drawn.ranks.tolist() == full.ranks.tolist()
    assert drawn.n_candidates.tolist() == full.n_candidates.tolist()


def test_sampled_ranks_are_uniform_draws_of_what_is_above() -> None:
    full, drawn, _ = full_and_sampled(99)
    has = drawn.targets.counts > 0
    assert set(drawn.n_candidates[has].tolist()) == {100}
    # A draw without replacement is hypergeometric: rank - 1 has mean 99 (rank_full - 1) / (n_candidates - 1).
    expected = 99 * (full.ranks - 1) / (full.n_candidates[has] - 1)
    # Standard deviation below 0.5 sqrt(99) = 5 for one person, 0.36 for the mean of nearly 200.
    assert abs(np.mean(drawn.ranks - 1 - expected)) < 1.2
    assert np.abs(drawn.ranks - 1 - expected).max() < 25
    assert np.abs(drawn.ranks - 1 - expected).max() > 2


def test_a_client_draws_the_same_items_in_any_batch() -> None:
    generator = np.random.default_rng(4)
    scores = generator.normal(size=(6, 400)).astype(np.float32)
    targets = lists([0], [1], [2], [3, 9], [4], [5])
    clients, key = np.array([12, 7, 99, 3, 5, 8]), Key.from_seed(5)
    together = sampled_ranks(scores, NOBODY_KNOWS, targets, clients, key)
    alone = sampled_ranks(scores[3:4], NOBODY_KNOWS, lists([3, 9]), clients[3:4], key)
    assert together.ranks[3:5].tolist() == alone.ranks.tolist()
    other = sampled_ranks(scores, NOBODY_KNOWS, targets, clients, Key.from_seed(6))
    assert together.ranks.tolist() != other.ranks.tolist()


def test_pairs_become_lists_in_the_order_given() -> None:
    made = ItemLists.from_pairs(np.array([2, 0, 2]), np.array([5, 4, 3]), 4)
    assert as_lists(made.items, made) == [[4], [], [5, 3], []]


@pytest.mark.parametrize("offsets", [[], [1, 2], [0, 2, 1, 2], [0, 1]])
def test_offsets_that_do_not_cut_up_the_items_are_refused(offsets: list[int]) -> None:
    with pytest.raises(DataError, match=r"must rise from 0 to the number of items, 2;"):
        ItemLists(np.array(offsets, np.int64), np.array([1, 2]))


def test_mistakes_are_named() -> None:
    scores = row(1.0, 2.0)
    with pytest.raises(DataError, match=r"scores for 1 people and targets for 2"):
        rank_targets(scores, NOBODY_KNOWS, lists([0], [1]))
    with pytest.raises(DataError, match=r"A target entry names item 2, but the scores are of 1 people and 2 items"):
        rank_targets(scores, NOBODY_KNOWS, lists([2]))
    with pytest.raises(DataError, match=r"A known entry names item -1"):
        rank_targets(scores, (np.array([0]), np.array([-1])), lists([0]))
    with pytest.raises(DataError, match=r"A known entry names person 1"):
        rank_targets(scores, (np.array([1]), np.array([0])), lists([0]))
    with pytest.raises(DataError, match=r"\[people, items\], not \[2\]"):
        rank_targets(scores[0], NOBODY_KNOWS, lists([0]))
    with pytest.raises(ConfigError, match=r"the best 0 items"):
        top_k(scores, NOBODY_KNOWS, 0, lists([0]))
    with pytest.raises(DataError, match=r"1 people and 3 client numbers"):
        sampled_ranks(scores, NOBODY_KNOWS, lists([0]), np.arange(3), Key.from_seed(0))
