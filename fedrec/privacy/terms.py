"""What a secure sum promises, known to server and clients alike, and checked by both before anything is sent."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fedrec.errors import MaskingError
from fedrec.privacy.discrete import ClientNoise, Grid, client_noise, finest
from fedrec.privacy.settings import LEAST_CLIENTS, SecureSum
from fedrec.privacy.shares import PRIME

LIKELY_FAILURE, UNLIKELY = 1e-6, 2.0**-40
"""How often a session may fail for want of shares, and how often colluding clients may find the shares they need."""


class _Settings(BaseModel):
    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Terms(_Settings):
    """One session: which round it is for, and all that decides about noise and masks."""

    session: str = Field(pattern="^[0-9a-f]{32}$")
    """Names the session; random, never used twice."""
    slice: int = Field(ge=0)
    """Time slice of the plan."""
    round: int = Field(ge=0)
    """Round of the plan."""
    settings: SecureSum
    """How the sum is protected."""
    n_asked: int = Field(ge=LEAST_CLIENTS, lt=PRIME)
    """How many clients are asked; more are never added up."""
    layout: tuple[tuple[str, tuple[int, ...]], ...]
    """Names and shapes of the contribution's tensors, sorted by name."""
    clip_norm: float = Field(gt=0)
    """L2 bound of one client's contribution."""
    noise_multiplier: float = Field(ge=0)
    """Least noise of the sum over the sensitivity, rounding included; 0: a sum without noise."""
    noise: Literal["system", "seed"] = "system"
    """Where clients take their noise from; "seed" only in simulations, for it protects nobody."""
    exponent: int = Field(ge=-2000, le=2000)
    """Contributions are rounded to multiples of two to the minus this."""

    @property
    def n_values(self) -> int:
        """How many numbers a contribution has."""
        return sum(math.prod(shape) for _, shape in self.layout)

    @property
    def grid(self) -> Grid:
        """What contributions are rounded to."""
        return Grid(self.clip_norm, self.n_values, self.exponent, self.settings.ring_bits)

    @property
    def excess(self) -> float:
        """How often its least variance the sum's noise may have."""
        return 1 / (self.settings.survivors - self.settings.colluding)

    def needed(self, n_parties: int) -> int:
        """Return of how many clients contributions must arrive, when so many advertised keys."""
        return max(self.settings.minimum, math.ceil(self.settings.survivors * n_parties - 1e-9))

    def colluding(self, n_parties: int) -> int:
        """Return of how many clients the noise is not counted, for they may tell it."""
        return math.floor(self.settings.colluding * n_parties)

    def honest(self, n_parties: int) -> int:
        """Return how many clients' noise is in every sum that is opened and known to nobody else."""
        return self.needed(n_parties) - self.colluding(n_parties)

    def shares_needed(self, n_holders: int) -> int:
        """Return how many of so many holders it takes to put a secret together: always more than half."""
        return math.floor(self.settings.threshold * n_holders) + 1

    def client_noise(self, n_parties: int) -> ClientNoise:
        """Return the discrete Gaussian noise that each client adds."""
        fewest = self.honest(n_parties)
        most = n_parties - self.colluding(n_parties) if self.settings.remove_excess else fewest
        return client_noise(self.grid, self.noise_multiplier, fewest, max(fewest, most))

    def keepers(self, n_parties: int, n_arrived: int) -> int:
        r"""Return how many of those whose contributions arrived must keep the extra part of their noise.

        With M clients and m of the fewest, those that collude not counted, a + c of which arrived, of which c collude,
        :math:`r = c + \lceil m (M - a) / (M - m) \rceil`: then `a` bases and `r - c` extra parts are the charged noise,
        even if all that collude are among those who keep it. At most all who arrived; none where all arrived.
        """
        colluding, fewest = self.colluding(n_parties), self.honest(n_parties)
        missing, range_ = n_parties - n_arrived, n_parties - colluding - fewest
        if not self.settings.remove_excess or range_ == 0:
            return n_arrived
        return min(n_arrived, colluding - (-fewest * missing // range_)) if missing else 0

    def noise_excess(self, n_parties: int, n_arrived: int) -> float:
        """Return the variance of the noise in an opened sum over what was charged; that of all clients is counted."""
        fewest = self.honest(n_parties)
        if not self.settings.remove_excess:
            return n_arrived / fewest
        most, kept = max(fewest, n_parties - self.colluding(n_parties)), self.keepers(n_parties, n_arrived)
        return n_arrived / most + kept * (1 / fewest - 1 / most)

    def check(self) -> None:
        """Refuse what cannot keep its promise.

        Raises:
            MaskingError: with the first thing that is wrong.
        """
        if self.n_asked < self.settings.minimum:
            raise MaskingError(
                f"{self.n_asked} clients are fewer than the {self.settings.minimum} that a secure sum needs at least; "
                "take a larger cohort."
            )
        if not self.n_values or list(self.layout) != sorted(set(self.layout)):
            raise MaskingError("A secure sum needs named tensors, sorted, each once.")
        if self.grid.reach(self.n_asked, self.noise_multiplier, self.excess) >= 2.0 ** (self.settings.ring_bits - 1):
            raise MaskingError(f"The sum of {self.n_asked:,} clients would leave a ring of its bits.")
        self.client_noise(self.n_asked)


def agree_on(
    session: str,
    slice_index: int,
    round_number: int,
    settings: SecureSum,
    n_asked: int,
    layout: tuple[tuple[str, tuple[int, ...]], ...],
    clip_norm: float,
    noise_multiplier: float,
    noise: Literal["system", "seed"],
) -> Terms:
    """Return the terms of a session, with the finest grid that fits the ring.

    Raises:
        MaskingError: too few clients, or no grid fits.
    """
    draft = Terms(
        session=session, slice=slice_index, round=round_number, settings=settings,
        n_asked=max(n_asked, LEAST_CLIENTS), layout=layout, clip_norm=clip_norm, noise_multiplier=noise_multiplier,
        noise=noise, exponent=0,
    )  # fmt: skip
    if n_asked < settings.minimum:
        raise MaskingError(
            f"{n_asked} clients are fewer than the {settings.minimum} that a secure sum needs at least; take a larger "
            "cohort."
        )
    terms = draft.model_copy(update={"exponent": finest(draft.grid, n_asked, noise_multiplier, draft.excess).exponent})
    terms.check()
    return terms


@lru_cache(maxsize=256)
def degree(n_clients: int, settings: SecureSum) -> int:
    """Return with how many others each of n clients exchanges keys: an even number, or all others.

    The smallest with which, in a ring of randomly ordered clients where each knows those next to it, a session fails
    with probability 1e-6 at most for want of shares when `dropouts` of all fall silent, and with 2^-40 at most some
    client's secrets lie with enough `colluding` ones, or silent and colluding clients part the ring.

    Source: Bell et al., CCS 2020, section 3.4 (the same three conditions).
    """
    others = n_clients - 1
    if settings.neighbours is not None:
        return others if settings.neighbours >= others - 1 else settings.neighbours + settings.neighbours % 2
    silent, colluding = math.floor(settings.dropouts * n_clients), math.floor(settings.colluding * n_clients)
    lost = settings.dropouts + settings.colluding
    for k in range(2, others, 2):
        t = math.floor(settings.threshold * (k + 1)) + 1
        if n_clients * _more_than(k - t, k, silent, others) > LIKELY_FAILURE:
            continue
        if n_clients * _more_than(t - 2, k, colluding, others) > UNLIKELY:
            continue
        if n_clients * lost ** (k // 2) <= UNLIKELY:
            return k
    return others


def ring_neighbours(order: list[int], k: int) -> dict[int, list[int]]:
    """Return the neighbours of each client in a ring: the k / 2 on either side, or everybody else if k says so.

    >>> ring_neighbours([5, 3, 8, 1], 2)
    {5: [1, 3], 3: [5, 8], 8: [3, 1], 1: [8, 5]}
    """
    n = len(order)
    if k >= n - 1:
        return {own: [other for other in order if other != own] for own in order}
    steps = [*range(-(k // 2), 0), *range(1, k // 2 + 1)]
    return {own: [order[(at + step) % n] for step in steps] for at, own in enumerate(order)}


def _more_than(bound: int, drawn: int, marked: int, population: int) -> float:
    """Return the probability that of so many drawn without putting back more than `bound` are marked."""

    def choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    whole = choose(population, drawn)
    low, high = max(bound + 1, 0, drawn - (population - marked)), min(drawn, marked)
    return math.fsum(
        math.exp(choose(marked, x) + choose(population - marked, drawn - x) - whole) for x in range(low, high + 1)
    )
