"""Replay on the server: what a synthetic history teaches is what a client with that history would send."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedrec import params as named
from fedrec.client.trainer import train_each
from fedrec.models.build import restore
from fedrec.models.configs import SampledSoftmax, TransformerConfig
from fedrec.models.recommender import get_params
from fedrec.models.transfer import RehearsalConfig
from fedrec.protocol.task import LocalTraining
from fedrec.random import Key
from fedrec.server.rehearsal import cohort_of, rehearsed, remembered
from tests.contracts.recommender import lively
from tests.support import same_bytes, small_experiment
from tests.unit.server.test_teach import live

N = 30
CONFIG = TransformerConfig(dim=8, heads=2, expand=1, length=6, dropout=0.0, softmax=SampledSoftmax(negatives=4))
SETTINGS = RehearsalConfig(share=0.25, histories=20, batch=5)
KEY = Key.from_seed(2)


def test_it_is_the_mean_update_of_clients_with_those_histories() -> None:
    params = get_params(lively(CONFIG, N))
    memories = remembered(CONFIG, params, N, np.ones(N), SETTINGS, KEY)
    assert memories["items"].shape == (20, 6)
    zero = named.scale(params, 0.0)
    local = LocalTraining(learning_rate=0.5, clip_norm=1e9)
    found = rehearsed(zero, params, memories, CONFIG, SETTINGS, local, KEY)
    chosen = (KEY.child("rehearsed").uniforms(np.arange(5), 1)[:, 0] * 20).astype(np.int64)
    cohort = cohort_of(memories["items"], chosen)
    # The server draws under one key what a client's first step draws under a child of its round's key.
    slow = train_each(restore(CONFIG, N, params), cohort, local, _unstepped(KEY.child("rehearsal")))
    for name, part in slow.dense.items():
        np.testing.assert_allclose(found[name], 0.25 * part.mean(0).numpy(), atol=1e-6)


class _Unstepped(Key):
    def child(self, *names: str | int) -> Key:
        return Key(self.data) if names == ("step", 0) else super().child(*names)


def _unstepped(key: Key) -> Key:
    return _Unstepped(key.data)


def test_its_share_is_clipped_as_a_client_is() -> None:
    params = get_params(lively(CONFIG, N))
    memories = remembered(CONFIG, params, N, np.ones(N), SETTINGS, KEY)
    local = LocalTraining(learning_rate=100.0, clip_norm=0.01)
    found = rehearsed(named.scale(params, 0.0), params, memories, CONFIG, SETTINGS, local, KEY)
    assert named.norm(found) == pytest.approx(0.25 * 0.01, rel=1e-4)


def test_the_first_slice_has_nothing_to_rehearse_and_later_ones_do(tmp_path: Path) -> None:
    plain, _ = live(tmp_path / "plain", small_experiment())
    states, _ = live(tmp_path / "replay", small_experiment(training__rehearsal=SETTINGS.model_dump()))
    first = [next(s for s in found if s.slice == 1) for found in (plain, states)]
    assert same_bytes(first[0].params, first[1].params)
    assert not same_bytes(plain[-1].params, states[-1].params)
    kept = [state.memories["items"] for state in states if state.memories]
    assert kept
    assert all(items.max() < state.releases[-1]["n_items"] for items, state in zip(kept[:1], states[-1:], strict=True))
