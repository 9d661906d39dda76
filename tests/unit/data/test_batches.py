"""Batches: what a client looks at, that nothing of the future is in it, and that it depends on nobody else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedrec.data.batches import NEVER, START, Batch, BatchSpec, Cohort, draw, draw_steps, histories, histories_of
from fedrec.data.log import InteractionLog
from fedrec.random import Key

KEY = Key.from_seed(21)
N_ITEMS = 50
LENGTHS = np.array([1, 4, 30, 12, 7, 60])
CAUSAL = BatchSpec("causal", 10, negatives=20)
RANDOM = BatchSpec("causal", 10, "random", negatives=20)
FULL = BatchSpec("causal", 10, "random", negatives=None)
PAIRS = BatchSpec("pairs", 10, targets=15, negatives=20)
SPECS = {"causal, last": CAUSAL, "causal, random": RANDOM, "causal, full": FULL, "pairs": PAIRS}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
causal_specs = pytest.mark.parametrize("spec", [CAUSAL, RANDOM, FULL], ids=["last", "random", "full"])


def log() -> InteractionLog:
    """People with these histories; an item may come again."""
    user = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    item = KEY.child("items").numpy().integers(0, N_ITEMS, len(user))
    return InteractionLog.from_rows(user, item, np.arange(len(user)), tuple(map(str, range(len(LENGTHS)))))


def cohort(low: list[int] | None = None, high: list[int] | None = None) -> Cohort:
    users = np.arange(len(LENGTHS))
    return Cohort(
        log(),
        users,
        users + 1000,
        np.zeros_like(users) if low is None else np.array(low),
        LENGTHS.copy() if high is None else np.array(high),
    )


LOW, HIGH = [0, 1, 14, 3, 6, 20], [1, 3, 25, 12, 7, 45]


def keys(n: int) -> list[Key]:
    return [KEY.child("draw", i) for i in range(n)]


def where(history: np.ndarray, part: np.ndarray) -> list[int]:
    """Return the places at which the sequence `part` stands in the history."""
    n = len(part)
    return [start for start in range(len(history) - n + 1) if np.array_equal(history[start : start + n], part)]


# Causal batches


@causal_specs
def test_inputs_are_the_targets_shifted_by_one(spec: BatchSpec) -> None:
    people = cohort(LOW, HIGH)
    for key in keys(5):
        batch = draw(people, spec, N_ITEMS, key)
        for c in range(len(people)):
            n = int(batch.input_mask[c].sum())
            assert batch.input_mask[c, :n].all()  # left-aligned
            assert np.array_equal(batch.inputs[c, 1:n], batch.targets[c, : n - 1])
            starts = where(people.log.history(c), batch.targets[c, :n])
            before = [START if start == 0 else int(people.log.history(c)[start - 1]) for start in starts]
            assert int(batch.inputs[c, 0]) in before
            assert (batch.inputs[c, n:] == 0).all()
            assert (batch.targets[c, n:] == 0).all()
            assert not batch.target_mask[c, n:].any()


@causal_specs
def test_start_stands_before_the_very_first_interaction_only(spec: BatchSpec) -> None:
    people = cohort(LOW, HIGH)
    for key in keys(10):
        batch = draw(people, spec, N_ITEMS, key)
        assert not (batch.inputs[:, 1:] == START).any()
        has_start = batch.inputs[:, 0] == START
        assert has_start[LENGTHS[: len(people)] < 10].all()  # a short history is seen from its beginning
        assert not has_start[np.array(LOW) > 10].any()
        assert not (batch.targets == START).any()


def test_the_last_window_is_the_newest_stretch_and_only_its_part_in_the_window_counts() -> None:
    people = cohort(LOW, HIGH)
    batch = draw(people, CAUSAL, N_ITEMS, KEY)
    for c, (low, high) in enumerate(zip(LOW, HIGH, strict=True)):
        start = max(high - 10, 0)
        n = high - start
        assert batch.targets[c, :n].tolist() == people.log.history(c)[start:high].tolist()
        assert batch.target_mask[c, :n].tolist() == [place >= low for place in range(start, high)]
        assert batch.input_mask[c].sum() == n


def test_random_windows_reach_all_of_a_long_history_and_each_has_a_target() -> None:
    """User 5: 60 interactions, 20 to 44 in the window, so stretches of 10 may end at 30 to 45."""
    people = cohort(LOW, HIGH).take([5])
    history = people.log.history(5)
    ends = []
    for key in keys(400):
        batch = draw(people, RANDOM, N_ITEMS, key)
        starts = where(history, batch.targets[0])
        assert len(starts) == 1
        ends.append(starts[0] + 10)
        assert batch.target_mask.all()
    values, counts = np.unique(ends, return_counts=True)
    assert values.tolist() == list(range(30, 46))
    assert counts.min() > 8  # 25 expected; 3.4 standard deviations


def test_a_history_that_fits_is_seen_whole_by_random_windows_too() -> None:
    people = cohort()
    batch = draw(people, RANDOM, N_ITEMS, KEY)
    for c in np.flatnonzero(LENGTHS <= 10):
        assert batch.targets[c, : LENGTHS[c]].tolist() == people.log.history(c).tolist()


@causal_specs
def test_context_before_the_window_is_an_input_and_never_a_target(spec: BatchSpec) -> None:
    people = cohort([0, 3, 28, 11, 6, 58], [1, 4, 30, 12, 7, 60])
    for key in keys(5):
        batch = draw(people, spec, N_ITEMS, key)
        assert batch.target_mask.sum(1).tolist() == [1, 1, 2, 1, 1, 2]
        assert batch.input_mask.sum(1).tolist() == [1, 4, 10, 10, 7, 10]


# Pairs


def test_pairs_hold_the_newest_history_and_targets_from_the_window() -> None:
    people = cohort(LOW, HIGH)
    seen: list[set[int]] = [set() for _ in LOW]
    for key in keys(60):
        batch = draw(people, PAIRS, N_ITEMS, key)
        assert batch.targets.shape == (6, 15)
        assert batch.target_mask.all()
        for c, high in enumerate(HIGH):
            n = min(high, 10)
            assert batch.inputs[c, :n].tolist() == people.log.history(c)[high - n : high].tolist()
            assert batch.input_mask[c].sum() == n
            seen[c] |= set(batch.targets[c].tolist())
            assert (batch.negative_since == NEVER).all()
        assert not (batch.inputs == START).any()
    for c, (low, high) in enumerate(zip(LOW, HIGH, strict=True)):
        assert seen[c] == set(people.log.history(c)[low:high].tolist())


# What a draw depends on


@specs
def test_no_leak_what_comes_after_the_window_changes_nothing(spec: BatchSpec) -> None:
    """Every interaction at place `high` or later becomes another item; no number of the batch may move."""
    people = cohort(LOW, HIGH)
    row = np.arange(len(people.log)) - people.log.offsets[people.log.user]
    later = row >= np.array(HIGH)[people.log.user]
    assert later.any()
    for shift, key in enumerate(keys(20), start=1):
        item = np.where(later, (people.log.item + shift) % N_ITEMS, people.log.item).astype(np.int32)
        changed = replace(people, log=replace(people.log, item=item))
        for name, one, other in zip(
            Batch._fields, draw(people, spec, N_ITEMS, key), draw(changed, spec, N_ITEMS, key), strict=True
        ):
            assert np.array_equal(one, other), name


@specs
def test_no_leak_cutting_the_log_at_the_window_changes_nothing(spec: BatchSpec) -> None:
    people = cohort(LOW, HIGH)
    row = np.arange(len(people.log)) - people.log.offsets[people.log.user]
    kept = row < np.array(HIGH)[people.log.user]
    full = people.log
    cut = InteractionLog.from_rows(full.user[kept], full.item[kept], full.time[kept], full.user_ids)
    for key in keys(5):
        for one, other in zip(
            draw(people, spec, N_ITEMS, key), draw(replace(people, log=cut), spec, N_ITEMS, key), strict=True
        ):
            assert np.array_equal(one, other)


@specs
def test_a_client_draws_the_same_alone_and_in_any_company(spec: BatchSpec) -> None:
    people = cohort(LOW, HIGH)
    together = draw(people, spec, N_ITEMS, KEY)
    for c in range(len(people)):
        alone = draw(people.take([c]), spec, N_ITEMS, KEY)
        for name, one, other in zip(Batch._fields, alone, together, strict=True):
            width = one.shape[1] if one.ndim > 1 else None
            assert np.array_equal(one[0], other[c, :width] if width else other[c]), name
    backwards = draw(people.take(np.arange(5, -1, -1)), spec, N_ITEMS, KEY)
    assert all(np.array_equal(one[::-1], other) for one, other in zip(backwards, together, strict=True))


@specs
def test_a_draw_depends_on_the_clients_number_and_the_key_and_not_on_the_node(spec: BatchSpec) -> None:
    people = cohort(LOW, HIGH)
    chosen = np.array([4, 2])
    moved = replace(people.take(chosen), log=people.log.take_users(chosen), users=np.array([0, 1]))
    here, there = draw(people.take(chosen), spec, N_ITEMS, KEY), draw(moved, spec, N_ITEMS, KEY)
    assert all(np.array_equal(one, other) for one, other in zip(here, there, strict=True))
    renamed = draw(replace(people, ids=people.ids + 1), spec, N_ITEMS, KEY)
    again = draw(people, spec, N_ITEMS, KEY.child("again"))
    for other in (renamed, again):
        assert not np.array_equal(other.seeds, draw(people, spec, N_ITEMS, KEY).seeds)
    if spec.negatives is not None:
        assert not np.array_equal(renamed.negatives, again.negatives)


# Negatives


def test_negatives_are_uniform_over_the_catalogue_whatever_anybody_took() -> None:
    """Chi-square over 50 items of 120,000 draws; 85.4 is the 99.9 % quantile at 49 degrees of freedom (scipy)."""
    spec = replace(CAUSAL, negatives=200)
    people = cohort()
    lopsided = replace(people, log=replace(people.log, item=np.zeros_like(people.log.item)))
    counts = np.zeros(N_ITEMS)
    for key in keys(100):
        drawn = draw(people, spec, N_ITEMS, key).negatives
        assert np.array_equal(drawn, draw(lopsided, spec, N_ITEMS, key).negatives)
        counts += np.bincount(drawn.ravel(), minlength=N_ITEMS)
    expected = counts.sum() / N_ITEMS
    assert expected == 2400
    assert ((counts - expected) ** 2 / expected).sum() < 85.4


def test_negatives_stay_inside_the_catalogue_of_the_time() -> None:
    assert draw(cohort(), CAUSAL, 7, KEY).negatives.max() == 6
    assert draw(cohort(), FULL, 7, KEY).negatives.tolist() == [list(range(7))] * 6


@causal_specs
def test_a_negative_ends_where_the_person_first_has_it_within_the_stretch(spec: BatchSpec) -> None:
    people = cohort(LOW, HIGH)
    kinds = set()
    for key in keys(10):
        batch = draw(people, spec, N_ITEMS, key)
        for c in range(len(people)):
            history = people.log.history(c).tolist()
            n = int(batch.input_mask[c].sum())
            starts = where(people.log.history(c), batch.targets[c, :n])
            if len(starts) > 1:
                continue
            for negative, since in zip(batch.negatives[c], batch.negative_since[c], strict=True):
                had = history[: starts[0] + n]
                expected = had.index(negative) - starts[0] if negative in had else NEVER
                assert since == expected
                kinds.add("never" if since == NEVER else "before" if since < 0 else "inside")
    assert kinds == {"never", "before", "inside"}


def test_seeds_fit_the_dropout_hash_and_differ_between_people() -> None:
    seeds = draw(cohort(), CAUSAL, N_ITEMS, KEY).seeds
    assert len(set(seeds.tolist())) == 6
    assert seeds.min() >= 0
    assert seeds.max() < 2**31


# Histories


def test_histories_end_where_asked_and_begin_with_start_if_they_fit() -> None:
    people = cohort()
    found = histories(people, np.array([0, 4, 9, 10, 3, 60]), CAUSAL)
    assert found.items.shape == found.mask.shape == (6, 10)
    assert found.mask.sum(1).tolist() == [1, 5, 10, 10, 4, 10]
    assert found.items[0, 0] == START
    assert found.items[1, :5].tolist() == [START, *people.log.history(1)[:4]]
    assert found.items[2].tolist() == [START, *people.log.history(2)[:9]]
    assert found.items[3].tolist() == people.log.history(3)[:10].tolist()
    assert found.items[5].tolist() == people.log.history(5)[50:].tolist()
    assert (found.items[~found.mask] == 0).all()


def test_histories_for_pairs_have_no_start() -> None:
    found = histories(cohort(), np.array([0, 4, 9, 10, 3, 60]), PAIRS)
    assert found.mask.sum(1).tolist() == [0, 4, 9, 10, 3, 10]
    assert not (found.items == START).any()


@specs
def test_plain_lists_give_the_same_histories_as_a_log(spec: BatchSpec) -> None:
    people = cohort()
    lists = [people.log.history(c).tolist() for c in range(6)]
    one, other = histories_of(lists, spec), histories(people, LENGTHS, spec)
    assert np.array_equal(one.items, other.items)
    assert np.array_equal(one.mask, other.mask)


@specs
def test_nobody_has_to_have_a_history(spec: BatchSpec) -> None:
    found = histories_of([[], []], spec)
    assert found.items.shape == (2, 1)
    assert found.mask.all() == (spec.kind == "causal")
    assert histories_of([], spec).items.shape == (0, 1)


def test_training_and_serving_show_a_causal_model_the_same_inputs() -> None:
    """The state that is trained to predict place p is the state that is asked for place p."""
    people = cohort().take([1, 4])
    batch = draw(people, CAUSAL, N_ITEMS, KEY)
    for c, place in ((0, 3), (1, 5)):
        asked = histories(people, np.array([place, place]), CAUSAL)
        assert batch.inputs[c, : place + 1].tolist() == asked.items[c, : place + 1].tolist()


@specs
@pytest.mark.parametrize("same", [True, False], ids=["one window", "a window each"])
def test_steps_drawn_together_are_the_steps_drawn_one_by_one(spec: BatchSpec, same: bool) -> None:
    whole = cohort()
    cohorts = [whole, whole if same else replace(whole, high=np.maximum(whole.high - 1, whole.low)), whole]
    together = draw_steps(cohorts, spec, 50, keys(3))
    for one, key, batch in zip(cohorts, keys(3), together, strict=True):
        for part, alone in zip(batch, draw(one, spec, 50, key), strict=True):
            assert part.dtype == alone.dtype
            np.testing.assert_array_equal(part, alone)
