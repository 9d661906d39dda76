"""The federated Poisson bootstrap against normal theory, and against the truth in repeated experiments."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.evaluation.intervals import Estimate, contributions, difference, poisson_weights, summarise
from fedrec.evaluation.metrics import Group, PeopleMetrics
from fedrec.random import Key


def people(values: np.ndarray) -> PeopleMetrics:
    everybody, nobody = Group(np.arange(len(values)), values), Group(np.array([], np.int64), values[:0])
    names = tuple(f"m{j}" for j in range(values.shape[1]))
    groups = {"all": everybody, "returning": nobody, "new": nobody, "new_items": nobody}
    return PeopleMetrics(names, groups, np.zeros((len(values), 1), np.int64), len(values), 1)


def width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


def test_weights_have_the_moments_of_poisson_one() -> None:
    weights = poisson_weights(Key.from_seed(1), np.arange(2_000), 200)[:, 1:]
    # 400,000 draws: standard errors 0.0016 of the mean, 0.0027 of the variance (sqrt((mu4 - 1) / n), mu4 = 4).
    assert weights.mean() == pytest.approx(1.0, abs=0.008)
    assert weights.var() == pytest.approx(1.0, abs=0.014)
    # A binomial count of W = 0 has standard error 0.00076.
    assert (weights == 0).mean() == pytest.approx(np.exp(-1), abs=0.004)
    # Independent between replicates and between people: correlations have standard errors 0.022 and 0.071.
    assert abs(np.corrcoef(weights[:, 0], weights[:, 1])[0, 1]) < 0.11
    assert abs(np.corrcoef(weights[0], weights[1])[0, 1]) < 0.35


def test_the_interval_agrees_with_normal_theory_on_a_large_sample() -> None:
    values = (np.random.default_rng(1).random((5_000, 3)) < [0.1, 0.3, 0.5]).astype(np.float64)
    found = people(values)
    summary = summarise(contributions(found, poisson_weights(Key.from_seed(2), np.arange(5_000), 1_000)), found.names)
    for j, name in enumerate(found.names):
        error = values[:, j].std() / np.sqrt(len(values))
        estimate = summary["all"][name]
        assert estimate.value == pytest.approx(values[:, j].mean())
        # A 2.5 % quantile of 1,000 normal replicates has standard error 0.085 of their deviation; 4 of these.
        assert estimate.low == pytest.approx(estimate.value - 1.96 * error, abs=0.34 * error)
        assert estimate.high == pytest.approx(estimate.value + 1.96 * error, abs=0.34 * error)


def test_95_percent_of_the_intervals_hold_the_truth() -> None:
    generator, truth, experiments = np.random.default_rng(2), 0.3, 600
    held = 0
    for experiment in range(experiments):
        # Metrics of one and the same people would share their weights, so each experiment has its own.
        found = people((generator.random((200, 1)) < truth).astype(np.float64))
        weights = poisson_weights(Key.from_seed(3).child(experiment), np.arange(200), 200)
        estimate = summarise(contributions(found, weights), found.names)["all"]["m0"]
        assert estimate.low is not None
        assert estimate.high is not None
        held += estimate.low <= truth <= estimate.high
    # Standard error of the share is 0.009; percentiles of 200 replicates on 200 people cost about half a percent.
    assert 0.92 <= held / experiments <= 0.975


def test_the_paired_interval_is_narrower_where_two_recommenders_err_alike() -> None:
    generator = np.random.default_rng(4)
    shared = generator.random((2_000, 1))
    a, b = (people(shared + 0.1 * generator.random((2_000, 1))) for _ in range(2))
    clients = np.arange(2_000)
    weights, other = (poisson_weights(Key.from_seed(seed), clients, 500) for seed in (5, 6))
    paired = difference(contributions(a, weights), contributions(b, weights), a.names, "m0")
    ends = [summarise(contributions(p, w), p.names)["all"]["m0"] for p, w in ((a, weights), (b, other))]
    unpaired = float(np.hypot(*(width(estimate) for estimate in ends)))
    # Var(a - b) = 2 * 0.01 / 12 against 2 * 1.01 / 12: a tenth of the width.
    assert width(paired) == pytest.approx(unpaired / np.sqrt(101), rel=0.25)
