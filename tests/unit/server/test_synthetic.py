"""Histories that nobody lived: of the right shape and law, from the key alone."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.models.configs import SpectralConfig
from fedrec.models.recommender import Recommender, set_params
from fedrec.models.spectral import Spectral
from fedrec.random import Key
from fedrec.server.synthetic import Source, draw_one, first_shares, sample_histories

KEY = Key.from_seed(5)
N = 12


def two_tastes() -> Recommender:
    """Return a model that scores items of the parity of the newest item one higher than the others."""
    config = SpectralConfig(item_rank=2, feature_rank=0, popularity_weight=0.0, decay=0.01)
    model = Spectral(config, N, KEY)
    rows = np.zeros((N, 2), np.float32)
    rows[np.arange(N), np.arange(N) % 2] = 1.0
    zero = np.zeros((N, 0), np.float32)
    set_params(
        model,
        {
            "items": rows, "features": zero, "popularity": np.zeros(N, np.float32),
            "item_spread": np.eye(2, dtype=np.float32), "feature_spread": np.zeros((0, 0), np.float32),
        },
    )  # fmt: skip
    return model.eval()


def test_no_item_twice_and_length_is_what_the_catalogue_allows() -> None:
    found = sample_histories(Source(two_tastes()), np.full(N, 1 / N), 40, 30, KEY)
    assert found.shape == (40, N)
    assert (np.sort(found, axis=1) == np.arange(N)).all()


def test_a_cold_source_stays_with_its_taste_and_a_hot_one_does_not() -> None:
    first = np.full(N, 1 / N)
    cold = sample_histories(Source(two_tastes(), temperature=0.01), first, 200, 5, KEY)
    assert (cold % 2 == cold[:, :1] % 2).all()
    hot = sample_histories(Source(two_tastes(), temperature=1e6), first, 200, 5, KEY)
    # After one of 12, 6 of the other 11 have the other parity.
    assert (hot[:, 1] % 2 != hot[:, 0] % 2).mean() == pytest.approx(6 / 11, abs=0.1)


def test_first_items_follow_their_shares() -> None:
    counts = np.array([6.0, 3.0, 1.0, -2.0, *np.zeros(N - 4)])
    found = sample_histories(Source(None), first_shares(counts), 4000, 1, KEY)[:, 0]
    assert np.bincount(found, minlength=4)[:4] / 4000 == pytest.approx([0.6, 0.3, 0.1, 0.0], abs=0.03)


def test_items_that_a_source_does_not_know_are_not_drawn_while_others_are_left() -> None:
    known = (np.arange(N) < 8).astype(np.float32)
    first = first_shares(known)
    found = sample_histories(Source(two_tastes(), known=known), first, 50, 8, KEY)
    assert (found < 8).all()


def test_a_history_depends_on_the_key_and_its_number_alone() -> None:
    source, first = Source(two_tastes()), np.full(N, 1 / N)
    many = sample_histories(source, first, 300, 6, KEY)
    assert (sample_histories(source, first, 7, 6, KEY) == many[:7]).all()
    assert (sample_histories(source, first, 7, 6, KEY.child("other")) != many[:7]).any()
    assert len(np.unique(many, axis=0)) > 250


def test_draw_one_never_takes_what_is_had() -> None:
    had = np.array([[True, True, False, False]] * 2)
    shares = np.where(had, 0.0, 0.0)
    assert draw_one(shares, had, np.array([0.0, 0.99])).tolist() == [2, 2]
    assert draw_one(np.array([[0.0, 1.0, 0.0, 1.0]] * 2), had[:, ::-1], np.array([0.0, 0.99])).tolist() == [1, 3]
