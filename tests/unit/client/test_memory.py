"""Rehearsal and history-aware negatives: what a client draws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedrec.client.memory import rehearsing, replay_shares
from fedrec.data.batches import NEVER, BatchSpec, draw
from fedrec.models.configs import SampledSoftmax, TransformerConfig
from fedrec.protocol.task import LocalTraining
from fedrec.random import Key
from tests.contracts.recommender import everybody, lively, uneven_log

KEY = Key.from_seed(5)
LENGTHS, LOW = tuple([40] * 300), tuple([30] * 150 + [0] * 150)


def test_the_share_of_clients_that_rehearse_is_as_asked_and_only_old_interactions_are_seen() -> None:
    people = everybody(uneven_log(LENGTHS, 90, KEY), LOW)
    found = rehearsing(people, LocalTraining(replay=0.4, replay_budget=12), KEY)
    back = found.high == 30
    assert 0.25 < back[:150].mean() < 0.55
    assert not back[150:].any()
    assert (found.low[back] == 18).all()
    np.testing.assert_array_equal(found.low[~back], people.low[~back])
    np.testing.assert_array_equal(found.high[~back], people.high[~back])
    alone = rehearsing(people.take(slice(7, 8)), LocalTraining(replay=0.4, replay_budget=12), KEY)
    assert (alone.low[0], alone.high[0]) == (found.low[7], found.high[7])
    assert rehearsing(people, LocalTraining(), KEY) is people


def test_whose_taste_has_moved_rehearses_less_and_alone_draws_the_same() -> None:
    model = lively(TransformerConfig(dim=8, length=20, softmax=SampledSoftmax(negatives=8)), 90)
    people = everybody(uneven_log(LENGTHS, 90, KEY), LOW)
    local = LocalTraining(replay=0.8, replay_by_shift=True)
    shares = replay_shares(people, model, local)
    assert shares is not None
    assert (shares >= 0).all()
    assert (shares <= 0.8 + 1e-9).all()
    assert shares[:150].std() > 0.01
    one = replay_shares(people.take(slice(7, 8)), model, local)
    assert one is not None
    np.testing.assert_allclose(one, shares[7:8], rtol=1e-5, atol=1e-6)
    still = replace(people, high=people.low)  # nothing new: nothing moved
    unmoved = replay_shares(still, model, local)
    assert unmoved is not None
    np.testing.assert_allclose(unmoved, 0.8, rtol=1e-5)
    assert replay_shares(people, model, LocalTraining(replay=0.8)) is None


def test_without_the_whole_history_old_likes_become_negatives_and_new_ones_do_not() -> None:
    people = everybody(uneven_log(LENGTHS, 90, KEY), LOW)
    spec = BatchSpec("causal", 40, "last", negatives=None)
    whole, window = (draw(people, spec, 90, KEY, keep) for keep in (True, False))
    place = people.log.first_place(people.users, whole.negatives)
    old = place < people.low[:, None]
    assert old.any()
    assert (whole.negative_since[old] != NEVER).all()
    assert (window.negative_since[old] == NEVER).all()
    np.testing.assert_array_equal(window.negative_since[~old], whole.negative_since[~old])
