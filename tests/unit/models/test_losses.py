"""Losses against torch's own and against hand-written sums."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fedrec.models.losses import lookahead, masked_mean, sampled_softmax


def test_the_mean_is_over_valid_values_and_zero_where_there_is_none() -> None:
    values = torch.tensor([[1.0, 3.0, 100.0], [5.0, 5.0, 5.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_mean(values, mask).tolist() == [2.0, 0.0]


def test_with_the_whole_catalogue_as_negatives_it_is_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 5, 7), torch.randint(7, (4, 5))
    positive = logits.gather(-1, targets[..., None])[..., 0]
    is_target = torch.arange(7) == targets[..., None]
    mask = torch.ones(4, 5, dtype=torch.bool)
    found = sampled_softmax(positive, positive, logits, is_target, mask, 1.0)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(4, 5).mean(1)
    torch.testing.assert_close(found, expected)


def test_few_negatives_stand_for_many_so_that_the_mean_estimate_of_the_sum_is_right() -> None:
    """log(e^p + r sum_j e^z_j) - w, by hand: p = w = 0, two negatives of logit log 3, r = 2: log(1 + 2 * 6)."""
    logit = torch.zeros(1, 1)
    negative = torch.full((1, 1, 2), math.log(3.0))
    none, mask = torch.zeros(1, 1, 2, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    torch.testing.assert_close(sampled_softmax(logit, logit, negative, none, mask, 2.0), torch.tensor([math.log(13.0)]))
    torch.testing.assert_close(
        sampled_softmax(logit, logit + 1, negative, none, mask, 2.0), torch.tensor([math.log(13.0) - 1])
    )


def test_excluded_negatives_and_masked_positions_are_not_seen() -> None:
    positive = torch.tensor([[0.5, 9.0]])
    negative = torch.tensor([[[1.0, 50.0], [7.0, 7.0]]])
    excluded = torch.tensor([[[False, True], [False, False]]])
    mask = torch.tensor([[True, False]])
    expected = math.log(math.exp(0.5) + math.exp(1.0)) - 0.5
    torch.testing.assert_close(
        sampled_softmax(positive, positive, negative, excluded, mask, 1.0), torch.tensor([expected])
    )


def test_all_negatives_excluded_leave_a_loss_of_zero_and_finite_gradients() -> None:
    positive = torch.tensor([[0.5]], requires_grad=True)
    negative = torch.tensor([[[1.0, 2.0]]], requires_grad=True)
    everything = torch.ones(1, 1, 2, dtype=torch.bool)
    loss = sampled_softmax(positive, positive, negative, everything, torch.ones(1, 1, dtype=torch.bool), 3.0)
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert positive.grad is not None
    assert negative.grad is not None
    assert torch.isfinite(positive.grad).all()
    assert negative.grad.tolist() == [[[0.0, 0.0]]]


def test_lookahead_weighs_later_targets_less_and_leaves_out_what_is_not_there() -> None:
    logits = torch.tensor([[[4.0, 2.0, 1.0], [4.0, 2.0, 1.0], [4.0, 2.0, 1.0]]])
    valid = torch.tensor([[[True, True, True], [True, True, False], [False, False, False]]])
    expected = [(4 + 0.5 * 2 + 0.25 * 1) / 1.75, (4 + 0.5 * 2) / 1.5, 0.0]
    torch.testing.assert_close(lookahead(logits, valid, 0.5), torch.tensor([expected]))


def test_one_target_ahead_is_the_target_itself() -> None:
    logits = torch.tensor([[[3.0], [-1.0]]])
    assert lookahead(logits, torch.ones(1, 2, 1, dtype=torch.bool), 0.5).tolist() == [[3.0, -1.0]]
