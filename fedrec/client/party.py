"""A `Party`: one client in one secure sum, from its keys to the shares that it gives of others' secrets.

Source: Bonawitz et al., CCS 2017, figure 4; with few neighbours as in Bell et al., CCS 2020, figure 2.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import MaskingError
from fedrec.params import Array
from fedrec.privacy.masking import (
    KEY_BYTES,
    SHARE_BYTES,
    KeyPair,
    Ring,
    add_mask,
    commitment,
    derive,
    seal,
    split,
    unseal,
)
from fedrec.privacy.noise import NoiseSource, Uniforms
from fedrec.privacy.terms import Terms, degree
from fedrec.protocol.secure import NOTHING, OF_KEY, OF_SEED, SEALED, Bytes, Flags, Ints

ADVERTISED, SHARED, OPENED, MASKED, DONE = range(5)
STATE = (
    "secrets",
    "neighbours",
    "agreed",
    "publics",
    "present",
    "received",
    "own_share",
)
"""What a party keeps in arrays between phases."""


@dataclass
class Party:
    """One client in one session. Each method is one phase, and no phase can be repeated.

    Attributes:
        terms: what was agreed on.
        number: the party's number in the session.
        slot: the client's place among the node's eligible ones.
        phase: how far it has come.
        silent: it pretends to be gone when shares are asked for.
        secrets: private key for letters, private key for masks, random seed of the mask of its own.
        neighbours: [k] with whom keys are exchanged.
        agreed: [k, 32] secret shared with each, for letters.
        publics: [k, 32] public key of each, for masks.
        present: [k] who of them sent a letter.
        received: [k, 66] their letters: a share of the seed, a share of the mask key.
        own_share: a share of the party's own seed.
    """

    terms: Terms
    number: int
    slot: int
    phase: int = ADVERTISED
    silent: bool = False
    secrets: Bytes = field(default_factory=lambda: _bytes(os.urandom(3 * KEY_BYTES)), repr=False)
    neighbours: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    agreed: Bytes = field(default_factory=lambda: np.zeros((0, KEY_BYTES), np.uint8), repr=False)
    publics: Bytes = field(default_factory=lambda: np.zeros((0, KEY_BYTES), np.uint8), repr=False)
    present: Flags = field(default_factory=lambda: np.zeros(0, np.bool_))
    received: Bytes = field(default_factory=lambda: np.zeros((0, 2 * SHARE_BYTES), np.uint8), repr=False)
    own_share: Bytes = field(default_factory=lambda: np.zeros(SHARE_BYTES, np.uint8), repr=False)

    @property
    def seed(self) -> bytes:
        """What the mask of its own grows from."""
        return self.secrets[2 * KEY_BYTES :].tobytes()

    @property
    def letter_key(self) -> KeyPair:
        """Keys for letters."""
        return KeyPair.from_private(self.secrets[:KEY_BYTES].tobytes())

    @property
    def mask_key(self) -> KeyPair:
        """Keys for the masks shared with neighbours."""
        return KeyPair.from_private(self.secrets[KEY_BYTES : 2 * KEY_BYTES].tobytes())

    def advert(self) -> Bytes:
        """Return what everybody may know: [96] two public keys and the commitment to the seed."""
        bound = commitment(self.terms.session, self.number, self.seed)
        return _bytes(self.letter_key.public + self.mask_key.public + bound)

    def share(self, n_parties: int, neighbours: Ints, adverts: Bytes) -> Bytes:
        """Return [k, SEALED] letters with shares of the party's seed and mask key, one to each neighbour.

        Args:
            n_parties: how many take part in all.
            neighbours: [k] numbers of the neighbours.
            adverts: [k, 96] what they advertised.

        Raises:
            MaskingError: out of turn, too few parties, or a neighbour or key that is repeated or the party's own.
        """
        self._turn(ADVERTISED)
        session, settings = self.terms.session, self.terms.settings
        if not settings.minimum <= n_parties <= self.terms.n_asked:
            raise MaskingError(f"{n_parties} clients take part, not {settings.minimum} to {self.terms.n_asked}.")
        others = [int(other) for other in neighbours]
        if len({*others, self.number}) != len(others) + 1 or min(others, default=-1) < 0:
            raise MaskingError("Neighbours are repeated, missing, or the client itself.")
        if len(others) != degree(n_parties, settings):
            raise MaskingError(f"{len(others)} neighbours are not the {degree(n_parties, settings)} of the terms.")
        letter_key, mask_key = self.letter_key, self.mask_key
        keys = [row[:KEY_BYTES].tobytes() for row in adverts] + [
            row[KEY_BYTES : 2 * KEY_BYTES].tobytes() for row in adverts
        ]
        if len({*keys, letter_key.public, mask_key.public}) != len(keys) + 2:
            raise MaskingError("Two clients advertised the same key, so one of them is not what it says.")
        points = [number + 1 for number in (*others, self.number)]
        threshold = self.terms.shares_needed(len(points))
        seeds, of_key = split(self.seed, points, threshold), split(mask_key.private, points[:-1], threshold)
        letters = np.zeros((len(others), SEALED), np.uint8)
        self.agreed = np.zeros((len(others), KEY_BYTES), np.uint8)
        for at, other in enumerate(others):
            secret = letter_key.agree(keys[at])
            self.agreed[at] = _bytes(secret)
            key = derive(secret, "letter", session, self.number, other)
            letters[at] = _bytes(seal(key, seeds[at] + of_key[at], session, self.number, other))
        self.neighbours = np.asarray(others, np.int64)
        self.publics = adverts[:, KEY_BYTES : 2 * KEY_BYTES].copy()
        self.own_share = _bytes(seeds[-1])
        self.phase = SHARED
        return letters

    def receive(self, n_sharing: int, present: Flags, letters: Bytes) -> None:
        """Open the letters of the neighbours that are present; the others count as never there.

        Raises:
            MaskingError: out of turn, too few present to put the party's secrets together, or a letter was changed.
        """
        self._turn(SHARED)
        if len(present) != len(self.neighbours) or n_sharing > self.terms.n_asked:
            raise MaskingError("The server tells of other neighbours than before.")
        if n_sharing < self.terms.settings.minimum or int(present.sum()) + 1 > n_sharing:
            raise MaskingError(f"{n_sharing} clients are too few for a secure sum.")
        if int(present.sum()) < self.terms.shares_needed(len(present) + 1):
            raise MaskingError("Too few neighbours are left to put this client's secrets together.")
        received = np.zeros((len(present), 2 * SHARE_BYTES), np.uint8)
        for at in np.flatnonzero(present):
            other, session = int(self.neighbours[at]), self.terms.session
            key = derive(self.agreed[at].tobytes(), "letter", session, other, self.number)
            received[at] = _bytes(unseal(key, letters[at].tobytes(), session, other, self.number))
        self.present, self.received, self.phase = present.copy(), received, OPENED

    def mask(self, total: Ring, units: NDArray[np.int64], together: Collection[int] = ()) -> None:
        """Add the party's masked contribution to `total`, in place.

        Args:
            total: [d] numbers of the ring; zeros if the party sends for itself.
            units: [d] rounded and noised contribution.
            together: parties whose contributions go into the same `total`, so that masks shared with them cancel there
                and need not be computed.

        Raises:
            MaskingError: out of turn.
        """
        self._turn(OPENED)
        session, key = self.terms.session, self.mask_key
        total += self.terms.grid.to_ring(units)
        add_mask(total, derive(self.seed, "own mask", session, self.number), 1)
        for at in np.flatnonzero(self.present):
            other = int(self.neighbours[at])
            if other not in together:
                low, high = sorted((self.number, other))
                secret = key.agree(self.publics[at].tobytes())
                add_mask(total, derive(secret, "shared mask", session, low, high), 1 if self.number == low else -1)
        self.phase = MASKED

    def unmask(self, n_sharing: int, n_arrived: int, arrived: Flags) -> tuple[Bytes, Bytes]:
        """Return [k + 1] kinds and [k + 1, 33] shares: of each neighbour one, of its seed or of its key, never both.

        Args:
            n_sharing: how many exchanged keys, as told when contributions were asked for.
            n_arrived: how many contributions the server holds.
            arrived: [k] whose of the neighbours.

        Raises:
            MaskingError: out of turn, or too few arrived: then there is too little noise, and nothing is told.
        """
        self._turn(MASKED)
        if len(arrived) != len(self.present) or bool((arrived & ~self.present).any()):
            raise MaskingError("The server claims contributions of clients that were not there.")
        if not self.terms.needed(n_sharing) <= n_arrived <= n_sharing or int(arrived.sum()) + 1 > n_arrived:
            raise MaskingError(
                f"{n_arrived} contributions arrived where {self.terms.needed(n_sharing)} of {n_sharing} are needed; "
                "nothing is opened."
            )
        if int(arrived.sum()) + 1 < self.terms.shares_needed(len(arrived) + 1):
            raise MaskingError("The server claims that most neighbours are gone; their keys are not told.")
        kinds = np.where(arrived, OF_SEED, np.where(self.present, OF_KEY, NOTHING)).astype(np.uint8)
        halves = self.received.reshape(-1, 2, SHARE_BYTES)
        shares = np.where(arrived[:, None], halves[:, 0], halves[:, 1])
        self.received, self.phase = np.zeros_like(self.received), DONE
        return np.append(kinds, np.uint8(OF_SEED)), np.concatenate([shares, self.own_share[None]])

    def to_state(self) -> dict[str, Array]:
        """Return all of the party's arrays, its secrets among them: for the client's own memory only."""
        return {name: getattr(self, name) for name in STATE}

    def _turn(self, phase: int) -> None:
        if self.phase != phase:
            raise MaskingError(f"Client {self.number} was asked out of turn or twice (phase {self.phase}).")


def contribution(
    terms: Terms, deviation: float, values: NDArray[np.float64], noise: NoiseSource, uniforms: Uniforms
) -> NDArray[np.int64]:
    """Return one client's contribution as it is masked: clipped, rounded to whole units, its share of noise added.

    Args:
        terms: what was agreed on.
        deviation: parameter of the client's noise, ``terms.deviation``.
        values: [d] numbers.
        noise: where noise comes from.
        uniforms: what decides about rounding.
    """
    units = terms.grid.encode(values, uniforms)
    return units if deviation == 0 else units + noise.discrete_gaussian(deviation, (len(units),))


def _bytes(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8).copy()
