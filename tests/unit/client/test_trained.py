"""What clients learnt: the forms in which it is kept say the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedrec.client.closed import ByClosedForm
from fedrec.client.trained import Products, Trained
from fedrec.client.trainer import step_batches
from fedrec.models.build import build
from fedrec.models.configs import FactorisationConfig
from fedrec.models.factorisation import Factorisation
from fedrec.models.recommender import to_torch
from fedrec.protocol.task import LocalTraining
from tests.contracts.recommender import KEY, everybody, uneven_log

GENERATOR = torch.Generator().manual_seed(4)
S, C, K, D = 3, 4, 6, 5


def made(n_rows: int) -> Trained:
    rows = torch.randint(n_rows, (S, C, K), generator=GENERATOR)
    weights, vectors = torch.randn(S, C, K, generator=GENERATOR), torch.randn(S, C, D, generator=GENERATOR)
    products = Products(rows, weights, vectors, torch.zeros(C, dtype=torch.float64))
    squares = products.whole(n_rows).double().square().sum((1, 2))
    products = Products(rows, weights, vectors, squares)
    return Trained({}, torch.zeros(C, 0, dtype=torch.int64), {}, torch.zeros(C), {"item": products})


def by_hand(trained: Trained, n_rows: int) -> torch.Tensor:
    found, own = torch.zeros(C, n_rows, D), trained.products["item"]
    for s, c, k in np.ndindex(S, C, K):
        found[c, own.rows[s, c, k]] += own.weights[s, c, k] * own.vectors[s, c]
    return found


@pytest.mark.parametrize("n_rows", [7, 500], ids=["by a sparse product", "row by row"])
def test_products_written_out_added_up_and_measured_are_the_same(n_rows: int) -> None:
    trained = made(n_rows)
    expected, shared = by_hand(trained, n_rows), {"item": torch.ones(n_rows, D)}
    torch.testing.assert_close(trained.whole(shared)["item"], expected)
    torch.testing.assert_close(trained.client_params(shared, 2)["item"], 1.0 + expected[2])
    np.testing.assert_allclose(trained.norms(), expected.flatten(1).norm(dim=1), rtol=1e-6)
    factors = np.array([1.0, 0.5, 0.0, 2.0], np.float32)
    totals = {"item": torch.ones(n_rows, D)}
    trained.add_to(totals, factors)
    torch.testing.assert_close(totals["item"], 1.0 + torch.einsum("c,cnd->nd", torch.from_numpy(factors), expected))


@pytest.mark.parametrize("n_rows", [7, 500], ids=["by a sparse product", "row by row"])
def test_a_client_that_is_left_out_may_hold_nan(n_rows: int) -> None:
    trained = made(n_rows)
    others = {"item": torch.zeros(n_rows, D)}
    trained.add_to(others, np.array([1.0, 0.0, 1.0, 1.0], np.float32))
    trained.products["item"].weights[:, 1] = torch.nan
    trained.products["item"].vectors[:, 1] = torch.inf
    totals = {"item": torch.zeros(n_rows, D)}
    trained.add_to(totals, np.array([1.0, 0.0, 1.0, 1.0], np.float32))
    assert torch.equal(totals["item"], others["item"])


def test_a_norm_is_right_where_steps_cancel() -> None:
    """Steps that overshoot go to and fro: 7 of them at a rate at which the loss neither falls nor grows much."""
    config = FactorisationConfig(dim=6, length=12, targets=4, negatives=6)
    model, people = build(config, 20, KEY), everybody(uneven_log((3, 9, 12), 20, KEY))
    assert isinstance(model, Factorisation)
    local = LocalTraining(steps=7, learning_rate=1.5)
    batches = step_batches(people, model, local, KEY)
    clients = ByClosedForm(model, model.local_start(to_torch(batches[0])), batches, local)
    first = clients.step()
    for _ in range(6):
        clients.step()
    trained = clients.trained(first)
    exact = trained.whole(dict(model.named_parameters()))["item"].double().flatten(1).norm(dim=1)
    np.testing.assert_allclose(trained.norms(), exact, rtol=1e-5)


def test_a_client_whose_numbers_overflow_has_no_finite_norm() -> None:
    config = FactorisationConfig(dim=6, length=12, targets=4, negatives=6)
    model, people = build(config, 20, KEY), everybody(uneven_log((3, 9, 12), 20, KEY))
    assert isinstance(model, Factorisation)
    local = LocalTraining(steps=7, learning_rate=1e9)
    batches = step_batches(people, model, local, KEY)
    clients = ByClosedForm(model, model.local_start(to_torch(batches[0])), batches, local)
    first = clients.step()
    for _ in range(6):
        clients.step()
    assert not np.isfinite(clients.trained(first).norms()).any()
