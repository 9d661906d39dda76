"""Heads beside the next item learn what they are asked, together with the trunk, through federated rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedrec.config import Experiment
from fedrec.data.batches import BatchSpec, draw, histories_of
from fedrec.data.cleaning import Dataset
from fedrec.data.log import InteractionLog
from fedrec.data.synthetic import checkerboard
from fedrec.errors import ConfigError
from fedrec.models.configs import TasksConfig, TransformerConfig
from fedrec.models.recommender import to_torch
from fedrec.models.transformer import Transformer
from tests.contracts.recommender import KEY, SEQUENCE, Entry, everybody, federate, uneven_log
from tests.support import merged, small_document

TASKS = TasksConfig(value_weight=3.0, event_weight=1.0, events=("click", "buy"))


def told(made: Dataset) -> Dataset:
    """Return the data set with a rating that depends on the item, and a kind that depends on the person's taste."""
    user = np.repeat(np.arange(made.log.n_users), made.log.counts)
    value = np.where(made.log.item % 2 == 0, 5.0, 2.0).astype(np.float32)
    event = (user % 3 == 0).astype(np.int8)
    log = InteractionLog.from_rows(
        user, made.log.item.astype(np.int64), made.log.time, tuple(made.log.user_ids), event, value, ("click", "buy")
    )
    return replace(made, log=log)


@pytest.mark.parametrize("weights", ["fixed", "learned"])
def test_trained_together_it_tells_values_and_kinds_and_still_recommends(weights: str) -> None:
    made = told(checkerboard(n_users=60, n_items=36, n_groups=3, per_user=8, key=KEY))
    tasks = TASKS.model_copy(update={"weights": weights})
    config = TransformerConfig(**SEQUENCE, heads=2, expand=2, tasks=tasks)
    model = federate(Entry(config, rounds=150), made)
    assert isinstance(model, Transformer)
    lists = [made.log.history(user)[:-1].tolist() for user in range(60)]
    items, mask = (torch.from_numpy(part) for part in histories_of(lists, model.spec))
    state = model.encode(items, mask)[:, None].expand(-1, 36, -1)
    vectors = model.table().expand(60, -1, -1)
    with torch.no_grad():
        own = torch.arange(36) % 3 == torch.arange(60)[:, None] % 3  # items of their own taste
        values = model.heads.values(state, vectors)
        right = torch.where(torch.arange(36) % 2 == 0, 5.0, 2.0).expand(60, -1)
        assert float((values - right).abs()[own].mean()) < 0.6
        assert 1.0 <= float(values.min()) <= float(values.max()) <= 5.0
        kinds = model.heads.kinds(state, vectors).argmax(-1)
        truth = (torch.arange(60) % 3 == 0).long()[:, None].expand(-1, 36)
        assert float((kinds == truth)[own].float().mean()) > 0.9
        scores = model.score(state[:, 0])
        assert float(scores[own].mean()) > float(scores[~own].mean()) + 1.0


def test_targets_come_with_their_kinds_and_values_and_others_do_not_count() -> None:
    log = uneven_log((3, 1), 9, KEY)
    batch = draw(everybody(log), BatchSpec("causal", 8, kinds=("buy", "click")), 9, KEY)
    assert batch.events.shape == batch.values.shape == batch.targets.shape
    names = [log.event_kinds[kind] for kind in log.event[:3]]
    assert batch.events[0].tolist() == [{"buy": 0, "click": 1}.get(name, -1) for name in names]
    np.testing.assert_array_equal(batch.values[0], log.value[:3])
    assert batch.events[1, 1:].tolist() == [-1, -1]  # padding
    assert np.isnan(batch.values[1, 1:]).all()
    assert draw(everybody(log), BatchSpec("causal", 8), 9, KEY).events.shape == (2, 0)


def test_somebody_without_values_or_known_kinds_still_learns_the_next_item() -> None:
    config = TransformerConfig(**SEQUENCE, tasks=TASKS)
    model, alone = Transformer(config, 9, KEY), Transformer(TransformerConfig(**SEQUENCE), 9, KEY)
    log = uneven_log((5, 4), 9, KEY)
    bare = replace(log, value=np.full_like(log.value, np.nan), event_kinds=("a", "b", "c"))
    batch = to_torch(draw(everybody(bare), model.spec, 9, KEY))
    torch.testing.assert_close(model.loss(batch), alone.loss(batch))


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ({}, "no task"),
        ({"event_weight": 1.0, "events": ["click"]}, "at least two"),
        ({"value_weight": 1.0, "value_range": [5, 1]}, "rise"),
    ],
)
def test_impossible_tasks_are_refused(tasks: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Experiment.parse(merged(small_document(), {"model": {"tasks": tasks}}))
