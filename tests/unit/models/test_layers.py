"""Initial values and dropout: right in distribution, and functions of the key and the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import vmap

from fedrec.models.layers import Moving, linear, normal, normal_rows, seeded_dropout
from fedrec.random import Key

KEY = Key.from_seed(4)
RATE = 0.3


def test_rows_do_not_depend_on_how_many_there_are() -> None:
    whole = normal_rows(KEY, 0, 20, 6, 0.5)
    assert torch.equal(whole[7:12], normal_rows(KEY, 7, 12, 6, 0.5))
    assert whole.dtype == torch.float32
    assert normal_rows(KEY, 3, 3, 6, 0.5).shape == (0, 6)
    assert not torch.equal(whole, normal_rows(KEY.child("other"), 0, 20, 6, 0.5))


@pytest.mark.parametrize("drawn", [normal_rows(KEY, 0, 2000, 50, 0.5), normal(KEY, (2000, 50), 0.5)])
def test_initial_values_are_normal(drawn: torch.Tensor) -> None:
    """100,000 numbers: standard errors of mean, variance and kurtosis of N(0, 1) are (1, 2, 24) ** .5 / 316."""
    z = drawn.numpy().astype(np.float64).ravel() / 0.5
    assert abs(z.mean()) < 4 / 316
    assert abs(z.var() - 1) < 4 * 2**0.5 / 316
    assert abs((z**4).mean() - 3) < 4 * 96**0.5 / 316  # of the fourth moment: E z^8 - 9 = 96
    assert np.abs(np.corrcoef(drawn.numpy()[:, :10].T) - np.eye(10)).max() < 4.5 / 2000**0.5


def ones(people: int) -> torch.Tensor:
    return torch.ones(people, 40, 50)


def test_dropout_is_off_without_seeds_or_rate() -> None:
    x = ones(2)
    assert seeded_dropout(x, RATE, None, 0) is x
    assert seeded_dropout(x, 0.0, torch.tensor([1, 2]), 0) is x


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    """400,000 places, by person too: 4.5 standard errors."""
    seeds = torch.from_numpy((KEY.bits(np.arange(200), 1)[:, 0] >> np.uint64(33)).astype(np.int64))
    out = seeded_dropout(ones(200), RATE, seeds, 0)
    assert np.unique(out.numpy()).tolist() == pytest.approx([0.0, 1 / (1 - RATE)])
    dropped = (out == 0).float()
    assert abs(float(dropped.mean()) - RATE) < 4.5 * (RATE * (1 - RATE) / dropped.numel()) ** 0.5
    assert float(out.mean()) == pytest.approx(1.0, abs=0.01)
    assert float((dropped.mean((1, 2)) - RATE).abs().max()) < 0.06
    assert float((dropped.mean(0) - RATE).abs().max()) < 0.2  # 6 standard errors of 200 people


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_any_rate_is_kept(rate: float) -> None:
    out = seeded_dropout(ones(50), rate, torch.arange(50) * 7919, 2)
    assert float((out == 0).float().mean()) == pytest.approx(rate, abs=0.01)


def agreement(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one == 0) == (other == 0)).float().mean())


def test_people_sites_and_steps_drop_independently() -> None:
    """Two independent masks of rate r agree with probability r^2 + (1 - r)^2."""
    chance = RATE**2 + (1 - RATE) ** 2
    one, other = seeded_dropout(ones(2), RATE, torch.tensor([11, 12]), 0)
    elsewhere = seeded_dropout(ones(1), RATE, torch.tensor([11]), 1)[0]
    for mask in (other, elsewhere):
        assert agreement(one, mask) == pytest.approx(chance, abs=0.06)
    assert agreement(one[1:], one[:-1]) == pytest.approx(chance, abs=0.06)
    assert agreement(one[:, 1:], one[:, :-1]) == pytest.approx(chance, abs=0.06)


def test_a_person_drops_the_same_alone_in_a_batch_under_vmap_and_beside_padding() -> None:
    seeds = torch.tensor([5, 2**31 - 1, 77])
    x = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    together = seeded_dropout(x, RATE, seeds, 3)
    alone = torch.cat([seeded_dropout(x[i : i + 1], RATE, seeds[i : i + 1], 3) for i in range(3)])
    mapped = vmap(lambda row, seed: seeded_dropout(row[None], RATE, seed[None], 3)[0])(x, seeds)
    padded = seeded_dropout(torch.nn.functional.pad(x, (0, 0, 0, 5)), RATE, seeds, 3)[:, :6]
    assert torch.equal(together, alone)
    assert torch.equal(together, mapped)
    assert torch.equal(together, padded)


def test_the_mask_of_a_seed_never_changes() -> None:
    """Written down from this code when the package began: a resumed run must drop what it would have dropped."""
    kept = seeded_dropout(torch.ones(1, 3, 8), 0.5, torch.tensor([123456]), 2)[0] > 0
    assert ["".join("01"[int(cell)] for cell in row) for row in kept] == ["10111101", "00110010", "11010000"]


def test_a_moving_layer_moves_by_its_gradient_unless_another_place_reads_the_same_weights() -> None:
    x, weight, bias = torch.randn(3, 5, 4), torch.randn(3, 6, 4), torch.randn(3, 6)
    leaves = [part.clone().requires_grad_() for part in (x, weight, bias)]
    expected = torch.autograd.grad((linear(*leaves) ** 2).sum(), leaves)
    own, inputs = [Moving(weight.clone()), Moving(bias.clone())], x.clone().requires_grad_()
    found = torch.autograd.grad((linear(inputs, *own) ** 2).sum(), [inputs, *own], allow_unused=True)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1:] == (None, None)
    torch.testing.assert_close(own[0].detach() - weight, expected[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own[1].detach() - bias, expected[2], rtol=1e-4, atol=1e-4)
    twice = torch.autograd.grad((linear(linear(leaves[0], *leaves[1:])[..., :4], *leaves[1:]) ** 2).sum(), leaves)
    own, inputs = [Moving(weight.clone()), Moving(bias.clone())], x.clone().requires_grad_()
    found = torch.autograd.grad((linear(linear(inputs, *own)[..., :4], *own) ** 2).sum(), [inputs, *own])
    for one, other in zip(found, twice, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(own[0].detach(), weight)
