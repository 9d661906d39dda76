"""A mechanism that is broken in any of these ways is caught: every detector passes the real one, each bug trips one.

A "release" is what a private round publishes of the clients' vectors. The mutants are what people write by mistake.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from fedrec.privacy.accounting import epsilon
from fedrec.privacy.clip import clip_factors
from fedrec.privacy.ledger import Charge, PrivacyLedger
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.noise import SeededNoise
from fedrec.random import Key

Vectors = NDArray[np.float64]
DELTA, DIM, PEOPLE, RATE = 1e-5, 400, 200, 0.1
COHORT = PEOPLE * RATE
MECHANISM = GaussianMechanism(clip_norm=1.0, noise_multiplier=1.2)


@dataclass
class Round:
    """A private round as `private_gather` plays it, in one place, so that a bug can be planted at every step."""

    book: PrivacyLedger = field(default_factory=lambda: PrivacyLedger(None, epsilon=None, delta=DELTA))
    root: Key = field(default_factory=lambda: Key.from_seed(3))

    def charge(self, name: str) -> Charge:
        return self.book.charge(name, MECHANISM.event(RATE), clip_norm=MECHANISM.clip_norm)

    def secret(self, charge: Charge) -> Key:
        return charge.key(self.root)

    def rate(self) -> float:
        return RATE

    def cohort(self, people: Vectors, secret: Key) -> Vectors:
        who = secret.child("cohort").uniforms(np.arange(len(people)), 1)[:, 0] < self.rate()
        return people[who]

    def total(self, cohort: Vectors) -> Vectors:
        factors = clip_factors(np.linalg.norm(cohort, axis=1), MECHANISM.clip_norm).astype(np.float64)
        return (np.where(factors[:, None] > 0, cohort, 0.0) * factors[:, None]).sum(axis=0)

    def divisor(self, cohort: Vectors) -> float:
        return COHORT

    def noised(self, total: Vectors, divisor: float, charge: Charge, secret: Key) -> Vectors:
        noise = SeededNoise(secret.child("noise"))
        released: Vectors = MECHANISM.noised({"x": total}, divisor, charge, noise)["x"]
        return released

    def play(self, people: Vectors, name: str = "round") -> Vectors:
        charge = self.charge(name)
        secret = self.secret(charge)
        cohort = self.cohort(people, secret)
        return self.noised(self.total(cohort), self.divisor(cohort), charge, secret)


class NoNoise(Round):
    def noised(self, total: Vectors, divisor: float, charge: Charge, secret: Key) -> Vectors:
        return total / divisor


class NoiseOverRoot(Round):
    def noised(self, total: Vectors, divisor: float, charge: Charge, secret: Key) -> Vectors:
        right = super().noised(total, divisor, charge, secret)
        return total / divisor + (right - total / divisor) / math.sqrt(COHORT)


class NoBatchFactor(Round):
    """The sum is divided by the cohort twice, so the noise stands beside a mean that is too small."""

    def noised(self, total: Vectors, divisor: float, charge: Charge, secret: Key) -> Vectors:
        return super().noised(total / divisor, divisor, charge, secret) * 1.0


class ClipAfterSum(Round):
    def total(self, cohort: Vectors) -> Vectors:
        whole = cohort.sum(axis=0)
        bound = MECHANISM.clip_norm * COHORT
        return whole * min(1.0, bound / max(float(np.linalg.norm(whole)), 1e-12))


class NaNPastTheClip(Round):
    def total(self, cohort: Vectors) -> Vectors:
        norms = np.linalg.norm(cohort, axis=1)
        factors = np.where(norms > MECHANISM.clip_norm, MECHANISM.clip_norm / norms, 1.0)  # NaN > C is false
        return (cohort * factors[:, None]).sum(axis=0)


class WrongRate(Round):
    def rate(self) -> float:
        return 4 * RATE


class SeedReuse(Round):
    def secret(self, charge: Charge) -> Key:
        return self.root.child("round")


class UnpaidRetry(Round):
    """A retry finds the old entry and does not pay for another release."""

    def play(self, people: Vectors, name: str = "round") -> Vectors:
        if any(entry.name == name for entry in self.book.entries()):
            silent = PrivacyLedger(None, epsilon=None, delta=DELTA)
            charge = silent.charge(name + " again", MECHANISM.event(RATE), clip_norm=MECHANISM.clip_norm)
        else:
            charge = self.charge(name)
        secret = self.secret(charge)
        cohort = self.cohort(people, secret)
        return self.noised(self.total(cohort), self.divisor(cohort), charge, secret)


class DataDependentWeights(Round):
    def divisor(self, cohort: Vectors) -> float:
        return float(max(1, len(cohort)))


class TwoReleases(Round):
    """The sum is published twice, with noise each time, for one charge."""

    def noised(self, total: Vectors, divisor: float, charge: Charge, secret: Key) -> Vectors:
        first = super().noised(total, divisor, charge, secret)
        free = PrivacyLedger(None, epsilon=None, delta=DELTA)
        again = free.charge("another look", MECHANISM.event(RATE), clip_norm=MECHANISM.clip_norm)
        second = super().noised(total, divisor, again, secret.child("second"))
        return (first + second) / 2.0


MUTANTS = (
    NoNoise,
    NoiseOverRoot,
    NoBatchFactor,
    ClipAfterSum,
    NaNPastTheClip,
    WrongRate,
    SeedReuse,
    UnpaidRetry,
    DataDependentWeights,
    TwoReleases,
)
Maker = Callable[[], Round]


def deviation_is_as_claimed(make: Maker) -> bool:
    """Noise around the known sum of nobody has the deviation z C over the expected cohort."""
    world = make()
    drawn = np.concatenate([world.play(np.zeros((PEOPLE, DIM)), f"round {n}") for n in range(20)])
    claimed = MECHANISM.noise_multiplier * MECHANISM.clip_norm / COHORT
    return abs(float(drawn.std()) / claimed - 1.0) < 6 / math.sqrt(2 * len(drawn))


def releases_move_by_the_clip_at_most(make: Maker) -> bool:
    """With everybody's vector alike and huge, the mean release is q n C over the cohort: no more, whoever is huge."""
    direction = np.zeros(DIM)
    direction[0] = 1.0
    people = np.zeros((PEOPLE, DIM))
    people[0] = 1e6 * direction
    world = make()
    drawn = np.array([world.play(people, f"round {n}")[0] for n in range(300)])
    # The canary is there in a tenth of the rounds, with norm C over the cohort at most.
    most = MECHANISM.clip_norm / COHORT
    noise = MECHANISM.noise_multiplier * MECHANISM.clip_norm / COHORT
    return float(drawn.max()) < most + 6 * noise


def a_nan_does_not_get_in(make: Maker) -> bool:
    people = np.full((PEOPLE, DIM), 0.01)
    people[::3] = np.nan
    try:
        return bool(np.isfinite(make().play(people)).all())
    except Exception:
        return False


def people_take_part_at_the_rate_that_is_charged(make: Maker) -> bool:
    world = make()
    ones = np.zeros((PEOPLE, DIM))
    ones[:, 0] = 1.0
    drawn = [world.play(ones, f"round {n}")[0] for n in range(200)]
    charged = {entry.event.sampling for entry in world.book.entries() if hasattr(entry.event, "sampling")}
    # sum / (q n) has mean 1; its deviation is that of a binomial share and of the noise.
    spread = math.sqrt(PEOPLE * RATE * (1 - RATE) + MECHANISM.noise_multiplier**2) / COHORT / math.sqrt(200)
    return charged == {RATE} and abs(float(np.mean(drawn)) - 1.0) < 6 * spread


def noise_is_never_used_twice(make: Maker) -> bool:
    world = make()
    same = np.zeros((PEOPLE, DIM))
    a, b, c = world.play(same, "round 1"), world.play(same, "round 2"), world.play(same, "round 1")
    if min(float(np.abs(x).max()) for x in (a, b, c)) == 0.0:
        return True  # there is no noise: another detector's business
    return not (np.allclose(a, b) or np.allclose(a, c) or np.allclose(b, c))


def every_release_is_paid_for(make: Maker) -> bool:
    world = make()
    for name in ("round 1", "round 1", "round 2"):
        world.play(np.zeros((PEOPLE, DIM)), name)
    paid = epsilon([entry.event for entry in world.book.entries()], DELTA)
    return paid >= epsilon([MECHANISM.event(RATE)] * 3, DELTA) - 1e-9


def weights_do_not_depend_on_who_came(make: Maker) -> bool:
    """A released mean of ones varies with the size of the cohort; a data-dependent divisor hides that size."""
    world = make()
    ones = np.zeros((PEOPLE, DIM))
    ones[:, 0] = 1.0
    drawn = np.array([world.play(ones, f"round {n}")[0] for n in range(300)])
    claimed = math.sqrt(PEOPLE * RATE * (1 - RATE) + MECHANISM.noise_multiplier**2) / COHORT
    return float(drawn.std()) > claimed * (1 - 4 / math.sqrt(2 * 300))


DETECTORS = (
    deviation_is_as_claimed,
    releases_move_by_the_clip_at_most,
    a_nan_does_not_get_in,
    people_take_part_at_the_rate_that_is_charged,
    noise_is_never_used_twice,
    every_release_is_paid_for,
    weights_do_not_depend_on_who_came,
)
CAUGHT_BY = {
    NoNoise: deviation_is_as_claimed,
    NoiseOverRoot: deviation_is_as_claimed,
    NoBatchFactor: people_take_part_at_the_rate_that_is_charged,
    ClipAfterSum: releases_move_by_the_clip_at_most,
    NaNPastTheClip: a_nan_does_not_get_in,
    WrongRate: people_take_part_at_the_rate_that_is_charged,
    SeedReuse: noise_is_never_used_twice,
    UnpaidRetry: every_release_is_paid_for,
    DataDependentWeights: weights_do_not_depend_on_who_came,
    TwoReleases: deviation_is_as_claimed,
}


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda detector: detector.__name__)
def test_the_real_mechanism_passes(detector: Callable[[Maker], bool]) -> None:
    assert detector(Round)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_planted_bug_is_caught(mutant: type[Round]) -> None:
    assert not CAUGHT_BY[mutant](mutant)


def test_every_detector_has_something_to_catch() -> None:
    assert set(CAUGHT_BY) == set(MUTANTS)
    assert set(CAUGHT_BY.values()) == set(DETECTORS)
