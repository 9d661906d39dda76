"""Batches in terms of the rows that each client touches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedrec.client.rows import _ranks_by_marking, _ranks_by_sorting, renumber, same_places
from fedrec.data.batches import START, Batch
from fedrec.random import Key

RANDOM = Key.from_seed(5).numpy()


def a_batch(n_items: int) -> Batch:
    inputs, targets, negatives = (RANDOM.integers(0, n_items, (6, width)) for width in (5, 5, 9))
    inputs[:, 0] = START
    anything = np.ones((6, 5), bool)
    return Batch(inputs, anything, targets, anything, negatives, negatives, np.arange(6))


@pytest.mark.parametrize("n_items", [3, 40, 100_000], ids=["dense", "mixed", "sparse"])
def test_renumbered_batches_name_the_same_items(n_items: int) -> None:
    batches = [a_batch(n_items), a_batch(n_items)]
    rows, local = renumber(batches)
    for before, after in zip(batches, local, strict=True):
        assert (after.inputs[:, 0] == START).all()
        for name in ("targets", "negatives"):
            named = np.take_along_axis(rows, getattr(after, name), axis=1)
            np.testing.assert_array_equal(named, getattr(before, name))
        np.testing.assert_array_equal(np.take_along_axis(rows, after.inputs[:, 1:], axis=1), before.inputs[:, 1:])
    for place, own in enumerate(rows):
        parts = [part[place] for batch in batches for part in (batch.inputs, batch.targets, batch.negatives)]
        touched = np.unique(np.maximum(np.concatenate(parts), 0))
        np.testing.assert_array_equal(own[: len(touched)], touched)
        assert (own[len(touched) :] == 0).all()


def test_marking_and_sorting_rank_alike() -> None:
    numbers = RANDOM.integers(0, 50, (7, 30))
    np.testing.assert_array_equal(_ranks_by_marking(numbers, 49), _ranks_by_sorting(numbers, 49))


@pytest.mark.parametrize("n_items", [5, 90, 100_000], ids=["few", "marked", "sorted"])
def test_look_ups_of_one_row_by_one_client_share_a_number_and_no_others_do(n_items: int) -> None:
    """70 clients are more than are marked at once."""
    s, c, k = 3, 70, 4
    rows = torch.from_numpy(RANDOM.integers(0, n_items, (s, c, k)))
    rows[1, :, 0] = rows[0, :, 0]  # every client repeats one
    places = same_places(rows)
    assert places.shape == rows.shape
    client = torch.arange(c)[:, None].expand(s, c, k)
    assert torch.equal(places // (s * k), client)
    pairs = {(int(who), int(row)) for who, row in zip(client.flatten(), rows.flatten(), strict=True)}
    named = set(zip(client.flatten().tolist(), rows.flatten().tolist(), places.flatten().tolist(), strict=True))
    assert len(named) == len(pairs) == len(places.unique())
