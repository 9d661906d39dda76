"""Factorisation: the closed form is the minimum, and the loss estimates the objective of implicit ALS."""

from __future__ import annotations

import numpy as np
import torch

from fedrec.data.batches import NEVER, Batch
from fedrec.models.configs import FactorisationConfig
from fedrec.models.factorisation import Factorisation
from fedrec.random import Key
from tests.contracts.recommender import drawn, everybody, uneven_log

KEY = Key.from_seed(6)
N_ITEMS = 30
CONFIG = FactorisationConfig(dim=5, unobserved_weight=0.1, regularisation=0.2)


def model(config: FactorisationConfig = CONFIG) -> Factorisation:
    return Factorisation(config, N_ITEMS, KEY)


def objective(user: torch.Tensor, items: torch.Tensor, history: list[int]) -> torch.Tensor:
    """Hu, Koren and Volinsky, with alpha_0 = 0.1 and lambda = 0.2 per interaction, written out."""
    observed = ((1 - items[history] @ user) ** 2).sum()
    return observed + 0.1 * ((items @ user) ** 2).sum() + 0.2 * len(history) * (user**2).sum()


def test_the_user_vector_is_the_minimum_of_the_objective() -> None:
    made, history = model(), [3, 9, 9, 21]
    mask = torch.ones(1, 4, dtype=torch.bool)
    user = made.encode(torch.tensor([history]), mask)[0].detach().requires_grad_()
    objective(user, made.item.detach(), history).backward()
    assert user.grad is not None
    assert user.grad.abs().max() < 1e-5
    assert user.abs().max() > 0.05


def test_an_empty_history_has_the_zero_vector() -> None:
    assert model().encode(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.bool)).abs().max() == 0


def test_the_loss_is_the_objective_per_interaction_when_it_sees_everything() -> None:
    """Targets are the whole history and negatives the whole catalogue, so nothing is estimated."""
    made, history = model(), [3, 9, 14, 21]
    row, true = torch.tensor([history]), torch.ones(1, 4, dtype=torch.bool)
    everything = torch.arange(N_ITEMS)[None]
    batch = Batch(row, true, row, true, everything, torch.full_like(everything, NEVER), torch.zeros(1))
    user = made.encode(row, true)[0].detach()
    expected = objective(user, made.item, history) / len(history)
    torch.testing.assert_close(made.loss(batch)[0], expected)


def test_sampled_negatives_and_targets_are_right_on_average() -> None:
    """1,000 draws of 5 targets and 20 negatives; the tolerance is 4 standard errors."""
    made = model(CONFIG.model_copy(update={"targets": 5, "negatives": 20}))
    people = everybody(uneven_log((12,), N_ITEMS, KEY))
    history = people.log.history(0).tolist()
    batches = [drawn(made, people, KEY.child(i)) for i in range(1000)]
    losses = np.array([made.loss(batch).item() for batch in batches])
    exact = objective(made.local_start(batches[0])["user"][0], made.item, history).item() / len(history)
    assert abs(losses.mean() - exact) < 4 * losses.std() / 1000**0.5
    assert losses.std() > 0


def test_the_user_vector_is_local_and_the_loss_takes_the_one_it_is_given() -> None:
    made = model()
    batch = drawn(made, everybody(uneven_log((3, 8), N_ITEMS, KEY)))
    local = made.local_start(batch)
    assert local.keys() == {"user"} == made.local_names
    assert local["user"].shape == (2, 5)
    torch.testing.assert_close(made.loss(batch, local), made.loss(batch))
    assert not torch.allclose(made.loss(batch, {"user": local["user"] + 1}), made.loss(batch))


def test_new_items_get_zero_vectors_so_that_nobodys_vector_moves() -> None:
    made = model()
    grown = made.grow(40, Key.from_seed(9))
    assert grown.item[N_ITEMS:].abs().max() == 0
    items, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(grown.encode(items, mask), made.encode(items, mask))
