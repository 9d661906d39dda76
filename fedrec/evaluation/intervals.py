"""Means over people with their uncertainty, from sums alone: the federated Poisson bootstrap.

A bootstrap replicate weighs each person as if people had been drawn anew. In a large sample the number of times that a
person is drawn is Poisson(1), and independent of everybody else, so a client can draw its own weights and contribute
weight times metric and weight. What is added up over clients gives every replicate of the mean, and nobody sees a
person's metric. Two recommenders that are evaluated with one key share the weights, so they can be compared in pairs.

Source: Hanley and MacGibbon, Computer Methods and Programs in Biomedicine 2006; Chamandy et al., Estimating uncertainty
for massive data streams, 2012.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import DataError, nearest
from fedrec.evaluation.beyond import coverage, gini
from fedrec.evaluation.metrics import ALL, GROUPS, SAMPLED, PeopleMetrics
from fedrec.random import Key

Sums = Mapping[str, NDArray[Any]]
"""What `contributions` returns, added up over clients and nodes."""
_PERCENTILES = (2.5, 97.5)
# 1 - CDF is below the spacing of the uniform numbers from 18 on, so no draw lies beyond.
_POISSON_CDF = np.cumsum([math.exp(-1.0) / math.factorial(w) for w in range(19)])


@dataclass(frozen=True)
class Estimate:
    """A mean over people, or another number about all of them.

    Attributes:
        value: the point estimate, every person weighing 1.
        low: lower end of the 95 % interval; None where there is none to give.
        high: upper end of the 95 % interval; None where there is none to give.
        n: how many people it is about.
    """

    value: float
    low: float | None
    high: float | None
    n: int


def poisson_weights(key: Key, clients: NDArray[np.int64], replicates: int) -> NDArray[np.float64]:
    """Return how much each client weighs in the point estimate and in each bootstrap replicate.

    Args:
        key: the stream of the draws; the same key pairs two recommenders.
        clients: [b] client numbers; a client draws the same weights in whatever batch it is.
        replicates: R.

    Returns:
        [b, R + 1]: column 0 is 1, the others are Poisson(1), by inverting the distribution function.
    """
    uniforms = key.uniforms(clients, replicates)
    weights = np.ones((len(clients), replicates + 1))
    weights[:, 1:] = np.searchsorted(_POISSON_CDF, uniforms, side="right")
    return weights


def contributions(people: PeopleMetrics, weights: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    r"""Return the sums over people that are all a node says about how well its clients are served.

    .. math:: S_{gr} = \sum_{p \in g} w_{pr} \, m_p, \qquad W_{gr} = \sum_{p \in g} w_{pr}

    Args:
        people: metrics m of b people.
        weights: [b, R + 1] from `poisson_weights`, in the same order of people.

    Returns:
        For each group ``sum.<group>`` [R + 1, M] float64 and ``weight.<group>`` [R + 1] float64; and ``recommended``
        [n_items] int64, in how many lists of group ``all`` each item stands. The same names and shapes whoever is in
        the groups, so that they add up.

    Raises:
        DataError: the weights are of another number of people.
    """
    if len(weights) != people.n_people:
        raise DataError(f"There are metrics of {people.n_people:,} people and weights of {len(weights):,}.")
    sums: dict[str, NDArray[Any]] = {}
    for name, group in people.groups.items():
        own = weights[group.people].astype(np.float64, copy=False)
        sums[f"sum.{name}"] = own.T @ group.values
        sums[f"weight.{name}"] = own.sum(axis=0)
    listed = people.lists[people.lists >= 0]
    sums["recommended"] = np.bincount(listed, minlength=people.n_items).astype(np.int64)
    return sums


def summarise(sums: Sums, names: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    """Return the mean of each metric in each group with its 95 % percentile interval.

    A group without people is absent. Group ``all`` also has ``coverage`` and ``gini`` of the lists of the largest
    cut-off, without an interval: a mean over people they are not. There is no interval either for fewer than two people
    or without replicates.

    Args:
        sums: totals of `contributions`.
        names: [M] names of the metrics, ``PeopleMetrics.names``.

    Raises:
        DataError: the sums are not of these metrics.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for group in (*GROUPS, *([SAMPLED] if f"weight.{SAMPLED}" in sums else [])):
        n = _n_people(sums, group)
        if n > 0:
            means = _replicates(sums, names, group)
            found[group] = {name: _estimate(means[:, j], n) for j, name in enumerate(names)}
    if ALL in found:
        n, recommended = _n_people(sums, ALL), sums["recommended"]
        found[ALL]["coverage"] = Estimate(coverage(recommended), None, None, n)
        found[ALL]["gini"] = Estimate(gini(recommended), None, None, n)
    return found


def difference(sums_a: Sums, sums_b: Sums, names: Sequence[str], metric: str, group: str = ALL) -> Estimate:
    """Return how much better a is than b on the same people: a minus b, with its paired 95 % interval.

    Args:
        sums_a: totals of `contributions` of one recommender (the newer one).
        sums_b: totals of the other, on the same people and with the same key.
        names: [M] names of the metrics, the same for both.
        metric: one of them.
        group: whose mean.

    Raises:
        DataError: the metric is unknown, nobody is in the group, or people or key were not the same.
    """
    if metric not in names:
        raise DataError(f"There is no metric '{metric}' among those evaluated{nearest(metric, names)}.")
    n = _n_people(sums_a, group)
    if n == 0:
        raise DataError(f"Nobody is in the group '{group}', so there is no difference in '{metric}' to give.")
    weights_a, weights_b = sums_a[f"weight.{group}"], sums_b[f"weight.{group}"]
    if weights_a.shape != weights_b.shape or not np.allclose(weights_a, weights_b):
        raise DataError(
            f"The two evaluations weigh people of group '{group}' differently, so they cannot be compared in pairs; "
            "evaluate both on the same people with the same key."
        )
    j = list(names).index(metric)
    return _estimate(_replicates(sums_a, names, group)[:, j] - _replicates(sums_b, names, group)[:, j], n)


def _n_people(sums: Sums, group: str) -> int:
    name = f"weight.{group}"
    if name not in sums:
        known = [found.removeprefix("weight.") for found in sums if found.startswith("weight.")]
        raise DataError(f"The sums of this evaluation have no group '{group}'{nearest(group, known)}.")
    return max(0, round(float(sums[name][0])))


def _replicates(sums: Sums, names: Sequence[str], group: str) -> NDArray[np.float64]:
    """Return the mean of each metric in each replicate, [R + 1, M]; NaN where nobody was drawn."""
    total, weight = sums[f"sum.{group}"], sums[f"weight.{group}"]
    if total.shape != (len(weight), len(names)):
        raise DataError(
            f"The sums of group '{group}' have the shape {list(total.shape)}, but {len(weight) - 1:,} replicates of "
            f"{len(names)} metrics need {[len(weight), len(names)]}; name the metrics that were evaluated."
        )
    return np.asarray(total / np.where(weight > 0, weight, np.nan)[:, None], np.float64)


def _estimate(replicates: NDArray[np.float64], n: int) -> Estimate:
    """Return the estimate of [R + 1] replicates, the first of them the point estimate."""
    drawn = replicates[1:][~np.isnan(replicates[1:])]
    if n < 2 or len(drawn) == 0:
        return Estimate(float(replicates[0]), None, None, n)
    low, high = np.percentile(drawn, _PERCENTILES)
    return Estimate(float(replicates[0]), float(low), float(high), n)
