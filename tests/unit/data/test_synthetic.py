"""Synthetic data: the known answers hold."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.data.slices import leave_one_out, resolve, stream_slices
from fedrec.data.synthetic import checkerboard, sequential, successors
from fedrec.errors import DataError
from fedrec.random import Key

KEY = Key.from_seed(5)


def test_people_touch_only_items_of_their_group_and_miss_some() -> None:
    made = checkerboard(n_users=30, n_items=24, n_groups=3, per_user=6, key=KEY)
    assert made.log.n_users == 30
    assert len(made.catalog) == 24
    for user in range(30):
        history = made.log.history(user)
        assert set(history % 3) == {user % 3}
        assert len(set(history.tolist())) == len(history) == 6
    gaps = {tuple(sorted(made.log.history(user).tolist())) for user in range(0, 30, 3)}
    assert len(gaps) > 3


def test_item_numbers_are_ids_even_if_nobody_touches_them() -> None:
    made = checkerboard(n_users=1, n_items=12, n_groups=2, per_user=2, key=KEY)
    assert made.catalog.ids == tuple(map(str, range(12)))
    assert (made.catalog.first_seen <= made.log.time.min()).all()


def test_the_same_key_gives_the_same_data_and_another_key_other_data() -> None:
    sizes = {"n_users": 8, "n_items": 20, "n_groups": 2, "per_user": 4}
    assert checkerboard(**sizes, key=KEY).log.digest() == checkerboard(**sizes, key=KEY).log.digest()
    assert checkerboard(**sizes, key=KEY).log.digest() != checkerboard(**sizes, key=Key.from_seed(6)).log.digest()


def test_a_person_does_not_depend_on_how_many_others_there_are() -> None:
    few, many = (checkerboard(n, 20, 2, 4, KEY) for n in (2, 9))
    assert few.log.history(1).tolist() == many.log.history(1).tolist()


@pytest.mark.parametrize(("n_groups", "per_user"), [(3, 4), (3, 0), (0, 2), (13, 1)])
def test_a_checkerboard_without_gaps_is_refused(n_groups: int, per_user: int) -> None:
    with pytest.raises(DataError, match="leaves nothing to find"):
        checkerboard(10, 12, n_groups, per_user, KEY)


def test_successors_are_one_cycle_through_all_items() -> None:
    after = successors(17, KEY)
    item, seen = 0, set()
    while item not in seen:
        seen.add(item)
        item = int(after[item])
    assert item == 0
    assert seen == set(range(17))


def test_each_step_is_the_successor_of_the_last() -> None:
    made, after = sequential(n_users=40, n_items=11, length=9, key=KEY), successors(11, KEY)
    starts = set()
    for user in range(40):
        history = made.log.history(user)
        assert len(history) == 9
        assert after[history[:-1]].tolist() == history[1:].tolist()
        starts.add(int(history[0]))
    assert len(starts) > 5
    assert made.catalog.ids == tuple(map(str, range(11)))


@pytest.mark.parametrize("sizes", [(0, 5, 3), (4, 1, 3), (4, 5, 0)])
def test_sequences_need_somebody_something_and_a_step(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(DataError, match="Sequences need at least"):
        sequential(*sizes, KEY)


def test_synthetic_data_can_be_cut_in_every_way() -> None:
    made = sequential(20, 10, 8, KEY)
    (slice_,) = leave_one_out(made.catalog)
    low, high = resolve(made.log, slice_.test)
    assert (high - low).tolist() == [1] * 20
    slices = stream_slices(made.log, made.catalog, 0.5, 2, 0.2)
    assert len(slices) == 3
    low, high = resolve(made.log, slices[0].train)
    assert np.all(high - low == 4)
