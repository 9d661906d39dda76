r"""What an attack's scores prove: a lower bound on epsilon from one run, and how well members are detected.

The bound needs no assumption about the mechanism: of m canaries each was in the run with probability 1/2, and whoever
guesses too many of them right has shown that the run was not :math:`(\varepsilon, \delta)`-private.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import PrivacyError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
SHARES = (0.02, 0.1, 0.5)
"""How many of the canaries are guessed at; the others are abstained from. Every choice costs confidence."""
FALSE_ALARMS = 0.01
"""The rate of false alarms at which detection is told."""


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon.

    Attributes:
        epsilon: the run was not (epsilon, delta)-private for any smaller epsilon, up to the confidence.
        confidence: probability with which such a bound is right, whatever the mechanism.
        canaries: m, how many secrets of one bit there were.
        guesses: how many of them were guessed at.
        correct: how many guesses were right.
        ceiling: the bound that the best of all attacks would have reached with so many canaries.
    """

    epsilon: float
    confidence: float
    canaries: int
    guesses: int
    correct: int
    ceiling: float


@dataclass(frozen=True)
class Detection:
    """How well scores tell members from others.

    Attributes:
        auc: probability that a member scores above another; 1/2 is chance.
        auc_low: lower end of its interval.
        auc_high: upper end of its interval.
        detected: share of members above the threshold that `FALSE_ALARMS` of the others pass.
        detected_low: lower end of its interval, the threshold taken as given.
        detected_high: upper end of its interval.
        members: how many members were scored.
        others: how many others.
    """

    auc: float
    auc_low: float
    auc_high: float
    detected: float
    detected_low: float
    detected_high: float
    members: int
    others: int


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    r"""Return the most probable that so many right guesses can be under :math:`(\varepsilon, \delta)`-privacy.

    With :math:`W \sim Bin(r, e^\varepsilon / (1 + e^\varepsilon))`,

    .. math:: p = \Pr[W \ge v] + 2 m \delta \max_{1 \le i \le v} \tfrac1i \Pr[v > W \ge v - i] .

    Args:
        canaries: m, each in the run with probability 1/2, independently.
        guesses: r, how many of them are guessed at; the number is fixed before the outcome is seen.
        correct: v, how many of the guesses are right.
        epsilon: of the hypothesis.
        delta: of the hypothesis.

    Raises:
        PrivacyError: not ``0 <= correct <= guesses <= canaries``, or epsilon or delta is out of range.

    Source: Steinke, Nasr and Jagielski, NeurIPS 2023, theorem 5.2 and appendix D.
    """
    from scipy.special import expit
    from scipy.stats import binom

    if not 0 <= correct <= guesses <= canaries:
        raise PrivacyError(f"{correct} right guesses out of {guesses} at {canaries} canaries cannot be.")
    if epsilon < 0 or not 0 <= delta <= 1:
        raise PrivacyError(f"epsilon {epsilon:g} and delta {delta:g} are no hypothesis of privacy.")
    right = float(expit(epsilon))
    i = np.arange(1, correct + 1)
    below = np.cumsum(binom.pmf(correct - i, guesses, right))
    slack = float((below / i).max(initial=0.0))
    return min(1.0, float(binom.sf(correct - 1, guesses, right)) + 2.0 * canaries * delta * slack)


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """Return the largest epsilon that so many right guesses refute at this confidence; 0 if they refute none.

    Raises:
        PrivacyError: the confidence is not between 0 and 1, or as in `p_value`.
    """
    if not 0 < confidence < 1:
        raise PrivacyError(f"A confidence lies between 0 and 1, not {confidence:g}.")
    level = 1.0 - confidence

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < level

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2.0 * high
    while high - low > 1e-4:
        middle = (low + high) / 2.0
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def one_run_bound(scores: Floats, included: Bools, delta: float, confidence: float) -> Bound:
    """Return the best lower bound that guesses by score give: the highest are said to be in, the lowest to be out.

    How many are guessed is chosen among few possibilities after the scores are seen, and each is held to its part of
    the confidence (Bonferroni), so the bound is valid whichever is best.

    Args:
        scores: [m] higher where a canary looks included.
        included: [m] which canaries were in the run.
        delta: of the hypothesis.
        confidence: of the whole.
    """
    m = len(scores)
    order = np.argsort(scores, kind="stable")
    sizes = sorted({max(1, round(share * m / 2)) for share in SHARES}) if m else []
    options = [(k, out) for k in sizes for out in (0, min(k, m - k))]
    each = 1.0 - (1.0 - confidence) / max(1, len(options))
    best = Bound(0.0, confidence, m, 0, 0, 0.0)
    ceiling = 0.0
    for top, bottom in dict.fromkeys(options):
        correct = int(included[order[m - top :]].sum() + (~included[order[:bottom]]).sum())
        found = lower_bound(m, top + bottom, correct, delta, each)
        ceiling = max(ceiling, lower_bound(m, top + bottom, top + bottom, delta, each))
        if best.guesses == 0 or found > best.epsilon:
            best = Bound(found, confidence, m, top + bottom, correct, 0.0)
    return Bound(best.epsilon, confidence, m, best.guesses, best.correct, ceiling)


def share_interval(hits: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the exact interval of a binomial share.

    Source: Clopper and Pearson, Biometrika 1934.

    >>> [round(end, 4) for end in share_interval(0, 10, 0.95)]
    [0.0, 0.3085]
    """
    from scipy.stats import beta

    tail = (1.0 - confidence) / 2.0
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1.0 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


def detection(members: Floats, others: Floats, confidence: float = 0.95) -> Detection:
    """Return how well scores tell members from others, with intervals.

    Args:
        members: [a] scores of those who were in the run.
        others: [b] scores of those who were not.
        confidence: of each interval.

    Raises:
        PrivacyError: there are fewer than two of either.

    Source: DeLong et al., Biometrics 1988 (variance of the area); Carlini et al., S&P 2022 (detection at few false
    alarms is what counts).
    """
    from scipy.special import ndtri

    a, b = len(members), len(others)
    if min(a, b) < 2:
        raise PrivacyError(f"{a} members and {b} others are too few to attack; take a larger data set.")
    ordered = np.sort(others)
    above = (np.searchsorted(ordered, members, "left") + np.searchsorted(ordered, members, "right")) / (2.0 * b)
    inside = np.sort(members)
    below = 1.0 - (np.searchsorted(inside, others, "left") + np.searchsorted(inside, others, "right")) / (2.0 * a)
    auc = float(above.mean())
    width = float(ndtri(0.5 + confidence / 2.0)) * math.sqrt(above.var(ddof=1) / a + below.var(ddof=1) / b)
    threshold = ordered[b - 1 - math.floor(FALSE_ALARMS * b)]
    hits = int((members > threshold).sum())
    low, high = share_interval(hits, a, confidence)
    return Detection(auc, max(0.0, auc - width), min(1.0, auc + width), hits / a, low, high, a, b)
