"""Gathering with a charge and noise: what comes back may be released."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedrec import params as named
from fedrec.params import Array, Params
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.settings import DistributedPrivacy
from fedrec.protocol.codec import Shapes
from fedrec.random import Key
from fedrec.server.gather import Ask, Gathered, Roster, gather
from fedrec.server.guard import Guard
from fedrec.server.secure import secure_gather

Prepare = Callable[[Params, int], Params]
"""Turns the sum of so many clients into what noise is added to."""


def private_gather(
    guard: Guard,
    name: str,
    mechanism: GaussianMechanism,
    rate: float,
    expected_cohort: float,
    ask: Ask,
    prepare: Prepare | None = None,
) -> Gathered:
    """Charge the ledger, draw the cohort, gather, add noise: what comes back is ``(sum + noise) / expected_cohort``.

    The charge is on disk before anybody is asked, and it pays for exactly one result. Where the server is trusted, a
    cohort without anybody is noised like any other, for that nobody took part is somebody's secret too; a masked sum of
    too few is never opened. Whatever statistics came along are dropped: they carry no noise.

    Args:
        guard: ledger and noise.
        name: what the charge is for; a second charge of the same name is a retry, which pays again, but for one that
            computes the same bytes from a seed.
        mechanism: clip norm and noise.
        rate: probability with which each eligible client takes part.
        expected_cohort: what the noised sum is divided by: public, never the number that came.
        ask: what is asked of whom.
        prepare: turns the sum of so many clients into what noise is added to; it then also checks their bound. Not in a
            masked sum, which nobody sees without its noise.

    Raises:
        BudgetExhausted: the charge would pass the budget; nothing was sent.
        RunError: every node that was asked failed; the charge stands.
        MaskingError: too few clients for a masked sum; the charge stands, nothing was opened.
    """
    event = mechanism.event(guard.charged(rate))
    charge = guard.ledger.charge(name, event, mechanism.clip_norm, guard.source(ask, rate))
    secret = guard.secret(charge)
    places = drawn(secret, ask.roster, rate)
    if isinstance(guard.settings, DistributedPrivacy):
        seed = None if guard.root is None else secret
        got: Gathered = secure_gather(ask, places, mechanism, charge, guard.settings.secure_sum, seed)
        released = named.scale(got.sums, 1.0 / expected_cohort)
        guard.told(charge, rate, expected_cohort, released)
        return replace(got, sums=released)
    bound = mechanism.clip_norm if prepare is None else None
    got = gather(ask, places, bound)
    total = got.sums or zeros(ask.shapes)
    total = total if prepare is None else prepare(total, got.n_clients)
    released = mechanism.noised(total, expected_cohort, charge, guard.noise(secret))
    guard.told(charge, rate, expected_cohort, released)
    return replace(got, sums=released, stats={})


def drawn(secret: Key, roster: Roster, rate: float) -> NDArray[np.int64]:
    """Return the places of a Poisson sample of all eligible clients; everybody from rate 1 on."""
    everyone = np.arange(roster.n_clients, dtype=np.int64)
    return everyone if rate >= 1.0 else everyone[secret.child("cohort").uniforms(everyone, 1)[:, 0] < rate]


def zeros(shapes: Shapes) -> dict[str, Array]:
    """Return the sum of nobody."""
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
