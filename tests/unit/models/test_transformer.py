"""The transformer: what a position may see, what the loss excludes, and what dropout and growth leave alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from fedrec.data.batches import NEVER, START, Batch
from fedrec.errors import ConfigError
from fedrec.models.configs import FullSoftmax, SampledSoftmax, TransformerConfig
from fedrec.models.recommender import Recommender
from fedrec.models.transformer import Transformer
from fedrec.random import Key
from tests.contracts.recommender import close, drawn, everybody, lively, uneven_log

KEY = Key.from_seed(13)
N_ITEMS = 40
CONFIG = TransformerConfig(dim=8, heads=2, blocks=2, length=10, dropout=0.0, softmax=SampledSoftmax(negatives=6))
FULL = CONFIG.model_copy(update={"softmax": FullSoftmax()})


def model(config: TransformerConfig = CONFIG) -> Transformer:
    made: Recommender = lively(config, N_ITEMS)
    assert isinstance(made, Transformer)
    return made


def sequence(*items: int) -> torch.Tensor:
    return torch.tensor([items])


def one_step(made: Transformer, negatives: list[int], since: list[int], targets: list[int]) -> Batch:
    """Return the batch of one person with these targets, inputs shifted by one."""
    true = torch.ones(1, len(targets), dtype=torch.bool)
    return Batch(
        torch.tensor([[START, *targets[:-1]]]), true, torch.tensor([targets]), true,
        torch.tensor([negatives]), torch.tensor([since]), torch.tensor([1]),
    )  # fmt: skip


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match=r"model.heads = 3 does not divide model.dim = 8; choose one that does"):
        Transformer(TransformerConfig(dim=8, heads=3), N_ITEMS, KEY)


def test_a_position_sees_the_past_and_itself_and_nothing_later() -> None:
    made = model()
    states, changed = made.hidden(sequence(START, 1, 2, 3, 4)), made.hidden(sequence(START, 1, 7, 3, 4))
    close(states[:, :2], changed[:, :2], 1e-6)
    assert all(not torch.allclose(states[:, t], changed[:, t], atol=1e-4) for t in (2, 3, 4))


def test_order_counts() -> None:
    made = model()
    one, other = made.hidden(sequence(1, 2, 3, 9))[0, -1], made.hidden(sequence(3, 2, 1, 9))[0, -1]
    assert not torch.allclose(one, other, atol=1e-3)


def test_the_vector_before_the_first_interaction_is_no_items() -> None:
    made = model()
    assert not torch.allclose(made.hidden(sequence(START)), made.hidden(sequence(0)), atol=1e-3)
    with torch.no_grad():
        made.item[0] += 1.0  # START is looked up as row 0 and then replaced
    fresh = model()
    close(made.hidden(sequence(START, 5)), fresh.hidden(sequence(START, 5)), 1e-6)


def test_the_user_vector_is_the_state_after_the_newest_interaction() -> None:
    made = model()
    items = torch.tensor([[START, 4, 5, 0], [6, 7, 8, 9]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    users = made.encode(items, mask)
    close(users[:1], made.hidden(sequence(START, 4, 5))[:, -1])
    close(users[1:], made.hidden(sequence(6, 7, 8, 9))[:, -1])


def test_recency_is_learnt_by_distance_and_moves_attention() -> None:
    made = model()
    before = made.hidden(sequence(1, 2, 3))
    with torch.no_grad():
        made.blocks[0].recency[:, 2] += 5.0
    after = made.hidden(sequence(1, 2, 3))
    close(after[:, :2], before[:, :2], 1e-6)  # only the third position has something at distance 2
    assert not torch.allclose(after[:, 2], before[:, 2], atol=1e-3)


# Loss


def test_the_full_loss_is_cross_entropy_over_what_the_person_does_not_have() -> None:
    made = model(FULL.model_copy(update={"horizon": 1}))
    targets = [4, 9, 30]
    since = [NEVER] * N_ITEMS
    for place, item in enumerate(targets):
        since[item] = place
    batch = one_step(made, list(range(N_ITEMS)), since, targets)
    logits = made.score(made.hidden(batch.inputs)[0]).detach().clone()
    for place in range(3):
        logits[place, targets[:place]] = -torch.inf  # they have these by now
    expected = F.cross_entropy(logits, torch.tensor(targets))
    close(made.loss(batch)[0], expected)


def test_the_sampled_loss_with_every_other_item_as_negative_is_the_full_loss() -> None:
    """One target; the 39 others stand for 39 items, so r = 1 and nothing is estimated."""
    sampled, full = model(), model(FULL)
    target = 12
    others = [item for item in range(N_ITEMS) if item != target]
    batch = one_step(sampled, others, [NEVER] * 39, [target])
    whole = one_step(full, list(range(N_ITEMS)), [NEVER if i != target else 0 for i in range(N_ITEMS)], [target])
    close(sampled.loss(batch), full.loss(whole))


def test_a_negative_counts_until_the_person_has_it() -> None:
    made = model()
    losses = [made.loss(one_step(made, [20], [since], [4, 9, 30])).item() for since in (-3, 0, 1, 2, 3, NEVER)]
    assert losses[0] == losses[1]
    assert losses[4] == losses[5]
    assert all(earlier < later for earlier, later in pairwise(losses[1:5]))


def test_a_target_is_no_negative_of_itself() -> None:
    made = model()
    alone, beside = (made.loss(one_step(made, n, [NEVER] * len(n), [4])).item() for n in ([20, 4], [20, 20]))
    assert alone != beside
    only = one_step(made, [4, 4], [NEVER] * 2, [4])
    assert made.loss(only).item() == pytest.approx(0.0, abs=1e-6)


def test_the_horizon_pulls_the_next_targets_up_too() -> None:
    """Gradient on the score of the target after next: at the first position, under a horizon of 2 only."""
    for horizon, pulled in ((1, False), (2, True)):
        made = model(CONFIG.model_copy(update={"horizon": horizon}))
        batch = one_step(made, [20], [NEVER], [4, 9])
        batch = batch._replace(target_mask=torch.tensor([[True, False]]), inputs=sequence(START, 5))
        made.loss(batch).sum().backward()
        assert made.item.grad is not None
        assert bool(made.item.grad[9].abs().max() > 0) is pulled


# Dropout and growth


def test_dropout_is_in_the_loss_and_never_in_scores() -> None:
    made = model(CONFIG.model_copy(update={"dropout": 0.5}))
    batch = drawn(made, everybody(uneven_log((5, 8), N_ITEMS, KEY)))
    other = batch._replace(seeds=batch.seeds + 1)
    assert torch.equal(made.loss(batch), made.loss(batch))
    assert not torch.allclose(made.loss(batch), made.loss(other))
    made.train()
    items, mask = sequence(1, 2, 3), torch.ones(1, 3, dtype=torch.bool)
    close(made.encode(items, mask), model().encode(items, mask))


def test_a_row_of_the_item_table_depends_on_its_number_and_the_key_alone() -> None:
    small, large = Transformer(CONFIG, 10, KEY), Transformer(CONFIG, 25, KEY)
    assert torch.equal(small.item, large.item[:10])
    assert torch.equal(small.grow(25, KEY).item, large.item)
    assert large.item.std().item() == pytest.approx(0.02, rel=0.3)


def test_fresh_scores_are_small_and_alike() -> None:
    made = Transformer(CONFIG, N_ITEMS, KEY)
    scores = made.score(made.encode(sequence(START, 3), torch.ones(1, 2, dtype=torch.bool)))
    assert scores.abs().max().item() < 0.5
