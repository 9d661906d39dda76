"""From releases to epsilon: privacy loss distributions, and the RDP bound beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

from fedrec.errors import PrivacyError
from fedrec.privacy.events import AnyEvent, GaussianEvent

Accountant = Literal["pld", "rdp"]
INTERVAL = 5e-4
"""Grid of the privacy losses; a finer one changes epsilon in the fifth digit."""
LEAST = 0.05
"""Below so little noise there is no privacy to speak of, and losses too large for a grid: RDP answers."""
_ORDERS = (*(x / 4.0 for x in range(8, 44)), *range(11, 64), 80, 96, 128, 192, 256, 512, 1024)
_Key = tuple[float, float]


def epsilon(events: Sequence[AnyEvent], delta: float, accountant: Accountant = "pld") -> float:
    """Return the epsilon of all the events together.

    Args:
        events: releases about the same people; their order does not matter.
        delta: probability that the guarantee may fail with.
        accountant: "pld" composes privacy loss distributions (tight), "rdp" Renyi divergences (looser, quick).

    Raises:
        PrivacyError: delta is not between 0 and 1.

    Source: Doroshenko et al., PoPETs 2022 (PLD); Mironov et al., arXiv:1908.10530 (sampled Gaussian RDP).
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"delta must lie between 0 and 1, not {delta:g}.")
    counts = _merged(events)
    if not counts:
        return 0.0
    if accountant == "rdp":
        return _rdp(counts, delta)
    (noise, sampling), _ = counts[-1]
    if len(counts) == 1 and sampling == 1.0:
        return _analytic(noise, delta)
    return _pld(counts, delta) if min(noise for (noise, _), _ in counts) >= LEAST else _rdp(counts, delta)


def calibrate(events_at: Callable[[float], Sequence[AnyEvent]], target_epsilon: float, delta: float) -> float:
    """Return the smallest factor on the noise with which the events spend at most `target_epsilon`.

    Args:
        events_at: the events when all noise is multiplied by a factor.
        target_epsilon: the budget.
        delta: probability that the guarantee may fail with.

    Returns:
        The factor, too large by at most a thousandth; never one whose epsilon is above the target.

    Raises:
        PrivacyError: the budget is not above 0, or no noise below a factor of a million meets it.
    """
    check_epsilon(target_epsilon)
    if not events_at(1.0):
        return 1.0

    def fits(scale: float) -> bool:
        events = events_at(scale)
        # RDP is an upper bound and cheap: where it fits, nothing else need be computed.
        return epsilon(events, delta, "rdp") <= target_epsilon or epsilon(events, delta) <= target_epsilon

    low, high = 1.0, 1.0
    while not fits(high):
        low, high = high, high * 2
        if high > 1e6:
            raise PrivacyError(f"No noise meets epsilon {target_epsilon:g} at delta {delta:g} for this plan.")
    while high == low:  # it fits already: look for less noise
        low = low / 2
        if fits(low):
            high = low
            if low < 1e-6:
                return high
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def check_epsilon(target: float) -> None:
    """Raise `PrivacyError` for a budget that is no number above 0."""
    if not (target > 0 and math.isfinite(target)):
        raise PrivacyError(f"The privacy budget epsilon must be a number above 0, not {target:g}.")


def check_delta(delta: float, population: int) -> str | None:
    """Return a warning if delta is so large that a whole person may leak for it, else None."""
    if delta * population < 1:
        return None
    return (
        f"delta {delta:g} is not below 1 / {population:,} people: publishing one random person's whole history would "
        f"satisfy it; choose at most {0.1 / population:.1g}."
    )


def _merged(events: Sequence[AnyEvent]) -> tuple[tuple[_Key, int], ...]:
    counts: Counter[_Key] = Counter()
    for event in events:
        if isinstance(event, GaussianEvent):
            counts[event.noise_multiplier, event.sampling] += event.count
        else:
            counts[event.noise_multiplier, 1.0] += 1
    # Unsampled Gaussians compose into one exactly: 1 / z^2 adds up.
    whole = sum(n / z**2 for (z, q), n in counts.items() if q == 1.0)
    rest = {key: n for key, n in counts.items() if key[1] < 1.0}
    if whole:
        rest[1.0 / math.sqrt(whole), 1.0] = 1
    return tuple(sorted(rest.items()))


def _analytic(noise: float, delta: float) -> float:
    """Return the exact epsilon of one Gaussian release without sampling, rounded up in the last digits.

    Source: Balle and Wang, ICML 2018, theorem 8.
    """
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    def excess(eps: float) -> float:
        a, b = 0.5 / noise, eps * noise
        # The second term is 1 at most; with next to no noise the rounding of its exponent says otherwise.
        return float(math.exp(log_ndtr(a - b)) - math.exp(min(0.0, eps + log_ndtr(-a - b)))) - delta

    if excess(0.0) <= 0:
        return 0.0
    # The loss is normal with mean 1 / (2 z^2) and deviation 1 / z, so 40 deviations are beyond any delta.
    return float(brentq(excess, 0.0, 0.5 / noise**2 + 40.0 / noise, xtol=1e-12, rtol=1e-12)) * (1 + 1e-9)


@lru_cache(maxsize=4096)
def _pld(counts: tuple[tuple[_Key, int], ...], delta: float) -> float:
    composed: Any = None
    for key, n in counts:
        part = _composed(key, n)
        composed = part if composed is None else composed.compose(part)
    return float(composed.get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _composed(key: _Key, n: int) -> Any:
    distribution = _single(key)
    return distribution if n == 1 else distribution.self_compose(n)


@lru_cache(maxsize=64)
def _single(key: _Key) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    noise, sampling = key
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise, value_discretization_interval=INTERVAL, sampling_prob=sampling, use_connect_dots=True
    )


@lru_cache(maxsize=4096)
def _rdp(counts: tuple[tuple[_Key, int], ...], delta: float) -> float:
    from dp_accounting import NeighboringRelation, dp_event
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(list(_ORDERS), NeighboringRelation.ADD_OR_REMOVE_ONE)
    for (noise, sampling), n in counts:
        gaussian = dp_event.GaussianDpEvent(noise)
        accountant.compose(gaussian if sampling == 1.0 else dp_event.PoissonSampledDpEvent(sampling, gaussian), n)
    return float(accountant.get_epsilon(delta))
