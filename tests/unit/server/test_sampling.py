"""Who takes part: the distribution promised, and the same people whatever is asked before or after."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.learning import FixedCohort, PoissonCohort
from fedrec.random import Key
from fedrec.server.sampling import sample

ROOT = Key.from_seed(5)
N_ROUNDS, N_CLIENTS = 3000, 40


def cohorts(cohort: PoissonCohort | FixedCohort) -> np.ndarray:
    """Return [N_ROUNDS, N_CLIENTS] who took part in which round."""
    taken = np.zeros((N_ROUNDS, N_CLIENTS), bool)
    for number in range(N_ROUNDS):
        taken[number, sample(cohort, N_CLIENTS, ROOT.child("round", number))] = True
    return taken


def test_poisson_takes_each_client_independently_with_the_same_probability() -> None:
    taken = cohorts(PoissonCohort(expected=10))
    q = 10 / N_CLIENTS
    sizes = taken.sum(1)
    # Binomial(40, 1/4): mean 10, variance 7.5; the bounds are five standard errors over 3,000 rounds.
    assert abs(sizes.mean() - 10) < 5 * (7.5 / N_ROUNDS) ** 0.5
    fourth = 3 * 7.5**2 + 7.5 * (1 - 6 * q * (1 - q))  # fourth central moment of the binomial
    assert abs(sizes.var() - 7.5) < 5 * ((fourth - 7.5**2) / N_ROUNDS) ** 0.5
    assert np.abs(taken.mean(0) - q).max() < 5 * (q * (1 - q) / N_ROUNDS) ** 0.5
    correlation = np.corrcoef(taken.T.astype(float)) - np.eye(N_CLIENTS)
    assert np.abs(correlation).max() < 6 / N_ROUNDS**0.5  # pairs of clients
    ahead = np.mean((taken[1:] - q) * (taken[:-1] - q), 0) / (q * (1 - q))
    assert np.abs(ahead).max() < 5 / N_ROUNDS**0.5  # one client over the rounds


def test_poisson_cohorts_may_be_empty_and_everybody_comes_when_fewer_are_there() -> None:
    rare = PoissonCohort(expected=0.5)
    assert min(len(sample(rare, N_CLIENTS, ROOT.child(i))) for i in range(20)) == 0
    for n in (1, 9, 10):
        assert sample(PoissonCohort(expected=10), n, ROOT).tolist() == list(range(n))


def test_fixed_takes_exactly_so_many_and_every_pair_alike() -> None:
    taken = cohorts(FixedCohort(size=10))
    assert (taken.sum(1) == 10).all()
    assert np.abs(taken.mean(0) - 0.25).max() < 5 * (0.25 * 0.75 / N_ROUNDS) ** 0.5
    together = (taken[:, :, None] & taken[:, None, :]).mean(0)[~np.eye(N_CLIENTS, dtype=bool)]
    p = (10 / 40) * (9 / 39)  # without replacement
    assert np.abs(together - p).max() < 5 * (p * (1 - p) / N_ROUNDS) ** 0.5


@pytest.mark.parametrize("cohort", [PoissonCohort(expected=7), FixedCohort(size=7)])
def test_a_cohort_depends_on_its_key_alone(cohort: PoissonCohort | FixedCohort) -> None:
    forwards = [sample(cohort, 30, ROOT.child(i)).tolist() for i in range(5)]
    backwards = [sample(cohort, 30, ROOT.child(i)).tolist() for i in reversed(range(5))]
    assert forwards == backwards[::-1]
    assert len({tuple(one) for one in forwards}) == 5
    assert all(one == sorted(set(one)) for one in forwards)


def test_whether_a_client_comes_does_not_depend_on_who_else_is_there_at_the_same_rate() -> None:
    few = sample(PoissonCohort(expected=10), 40, ROOT)
    many = sample(PoissonCohort(expected=20), 80, ROOT)
    assert many[many < 40].tolist() == few.tolist()


@pytest.mark.parametrize("cohort", [PoissonCohort(expected=7), FixedCohort(size=7)])
def test_nobody_eligible_gives_nobody(cohort: PoissonCohort | FixedCohort) -> None:
    assert sample(cohort, 0, ROOT).tolist() == []


def test_fixed_takes_everybody_when_fewer_are_there() -> None:
    assert sample(FixedCohort(size=10), 4, ROOT).tolist() == [0, 1, 2, 3]
