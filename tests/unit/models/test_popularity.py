"""Popularity: counts are scores, and the loss is that of a smoothed unigram."""

from __future__ import annotations

import numpy as np

from fedrec.data.batches import histories_of
from fedrec.models.configs import PopularityConfig
from fedrec.models.popularity import Popularity
from fedrec.models.recommender import score_all, set_params
from fedrec.random import Key
from tests.contracts.recommender import drawn, everybody, uneven_log

COUNTS = np.array([5, 0, 9, 2], np.float32)


def model() -> Popularity:
    made = Popularity(PopularityConfig(), 4, Key.from_seed(0))
    set_params(made, {"counts": COUNTS})
    return made


def test_it_starts_from_nothing() -> None:
    assert Popularity(PopularityConfig(), 3, Key.from_seed(0)).counts.tolist() == [0, 0, 0]


def test_everybody_gets_the_counts_as_scores() -> None:
    scores = score_all(model(), histories_of([[], [2, 2], [1]], model().spec))
    assert scores.tolist() == [COUNTS.tolist()] * 3


def test_the_loss_is_the_mean_surprise_with_one_added_to_every_count() -> None:
    batch = drawn(model(), everybody(uneven_log((3, 1), 4, Key.from_seed(1))))
    p = (COUNTS + 1) / (COUNTS + 1).sum()
    expected = -np.log(p)[batch.targets.numpy()].mean(1)
    np.testing.assert_allclose(model().loss(batch).detach().numpy(), expected, rtol=1e-6)


def test_new_items_start_with_no_counts() -> None:
    assert model().grow(6, Key.from_seed(1)).counts.tolist() == [*COUNTS.tolist(), 0, 0]
