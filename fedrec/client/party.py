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
from fedrec.privacy.masking import KEY_BYTES, KeyPair, Ring, add_mask, commitment, derive, seal, seed_of, unseal
from fedrec.privacy.noise import NoiseSource, Uniforms
from fedrec.privacy.shares import SHARE_BYTES, split
from fedrec.privacy.terms import Terms, degree
from fedrec.protocol.secure import LETTER, NOTHING, OF_ROOT, SEALED, Bytes, Flags, Ints, kinds_of

ADVERTISED, SHARED, OPENED, MASKED, DONE = range(5)
STATE = ("secrets", "neighbours", "near", "agreed", "publics", "present", "received", "own_shares")
PLAIN = ("number", "slot", "phase", "silent", "n_parties")
"""What a party keeps between phases, in arrays and in plain numbers."""


@dataclass
class Party:
    """One client in one session. Each method is one phase, and no phase can be repeated.

    From the party's root follow the seed of its own mask and the extra part of its noise. Whoever has the root can take
    both off; whoever has the seed alone cannot tell the noise.

    Attributes:
        terms: what was agreed on.
        number: the party's number in the session.
        slot: the client's place among the node's eligible ones.
        phase: how far it has come.
        silent: it pretends to be gone when shares are asked for.
        n_parties: how many advertised keys.
        secrets: private key for letters, private key for masks, root.
        neighbours: [k] with whom keys are exchanged.
        near: [k] who of them is on the same node, so that letters need no key.
        agreed: [k, 32] secret shared with each of the others, for letters.
        publics: [k, 32] public key of each, for masks.
        present: [k] who of them sent a letter.
        received: [k, LETTER] their letters: shares of root, seed and mask key.
        own_shares: [2, SHARE_BYTES] shares of the party's own root and seed.
    """

    terms: Terms
    number: int
    slot: int
    phase: int = ADVERTISED
    silent: bool = False
    n_parties: int = 0
    secrets: Bytes = field(default_factory=lambda: _bytes(os.urandom(3 * KEY_BYTES)), repr=False)
    neighbours: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    near: Flags = field(default_factory=lambda: np.zeros(0, np.bool_))
    agreed: Bytes = field(default_factory=lambda: np.zeros((0, KEY_BYTES), np.uint8), repr=False)
    publics: Bytes = field(default_factory=lambda: np.zeros((0, KEY_BYTES), np.uint8), repr=False)
    present: Flags = field(default_factory=lambda: np.zeros(0, np.bool_))
    received: Bytes = field(default_factory=lambda: np.zeros((0, LETTER), np.uint8), repr=False)
    own_shares: Bytes = field(default_factory=lambda: np.zeros((2, SHARE_BYTES), np.uint8), repr=False)

    @property
    def root(self) -> bytes:
        """What the seed and the extra noise grow from; in a simulation that is to be repeated, known to everybody."""
        if self.terms.noise == "seed":
            return derive(bytes(KEY_BYTES), "simulated root", self.terms.session, self.number)
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
        session = self.terms.session
        bound = commitment(session, self.number, seed_of(self.root, session, self.number))
        return _bytes(self.letter_key.public + self.mask_key.public + bound)

    def share(
        self, n_parties: int, neighbours: Ints, adverts: Bytes, near: Collection[int] = ()
    ) -> tuple[Bytes, dict[int, Bytes]]:
        """Return [k, SEALED] letters with shares of the party's secrets, one to each neighbour, and those that stay.

        Args:
            n_parties: how many take part in all.
            neighbours: [k] numbers of the neighbours.
            adverts: [k, 96] what they advertised.
            near: parties of the same node: their letters stay on it, and their rows are zeros.

        Raises:
            MaskingError: out of turn, too few parties, or a neighbour or key that is repeated or the party's own.
        """
        self._turn(ADVERTISED)
        session, settings = self.terms.session, self.terms.settings
        if not settings.minimum <= n_parties <= self.terms.n_asked:
            raise MaskingError(f"{n_parties} clients take part, not {settings.minimum} to {self.terms.n_asked}.")
        others = [int(other) for other in neighbours]
        if len({*others, self.number}) != len(others) + 1 or not 0 <= min(others, default=-1) <= max(others) < (
            self.terms.n_asked
        ):
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
        secrets = [self.root, seed_of(self.root, session, self.number), mask_key.private]
        shares = split(secrets, points, self.terms.shares_needed(len(points)))
        plain = np.ascontiguousarray(shares[:, :-1].transpose(1, 0, 2)).reshape(len(others), LETTER)
        letters = np.zeros((len(others), SEALED), np.uint8)
        self.agreed = np.zeros((len(others), KEY_BYTES), np.uint8)
        self.near = np.array([other in near for other in others], np.bool_)
        self.neighbours, self.n_parties = np.asarray(others, np.int64), n_parties
        self.publics = adverts[:, KEY_BYTES : 2 * KEY_BYTES].copy()
        self.own_shares = shares[:2, -1].copy()
        self.received = np.zeros((len(others), LETTER), np.uint8)
        for at, other in enumerate(others):
            if other not in near:
                secret = letter_key.agree(keys[at])
                self.agreed[at] = _bytes(secret)
                key = derive(secret, "letter", session, self.number, other)
                letters[at] = _bytes(seal(key, plain[at].tobytes(), session, self.number, other))
        self.phase = SHARED
        return letters, {other: plain[at] for at, other in enumerate(others) if other in near}

    def accept(self, sender: int, letter: Bytes) -> None:
        """Take the letter of a party of the same node, which needs no seal."""
        self.received[self.neighbours == sender] = letter

    def receive(self, present: Flags, letters: Bytes) -> None:
        """Open the letters of the neighbours that are present; the others count as never there.

        Raises:
            MaskingError: out of turn, too few present to put the party's secrets together, or a letter was changed.
        """
        self._turn(SHARED)
        if len(present) != len(self.neighbours):
            raise MaskingError("The server tells of other neighbours than before.")
        if int(present.sum()) < self.terms.shares_needed(len(present) + 1):
            raise MaskingError("Too few neighbours are left to put this client's secrets together.")
        received = np.where((present & self.near)[:, None], self.received, np.uint8(0))
        for at in np.flatnonzero(present & ~self.near):
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
        seed = seed_of(self.root, session, self.number)
        add_mask(total, derive(seed, "own mask", session, self.number), 1)
        for at in np.flatnonzero(self.present):
            other = int(self.neighbours[at])
            if other not in together:
                low, high = sorted((self.number, other))
                secret = key.agree(self.publics[at].tobytes())
                add_mask(total, derive(secret, "shared mask", session, low, high), 1 if self.number == low else -1)
        self.phase = MASKED

    def unmask(self, arrived: Flags) -> tuple[Bytes, Bytes]:
        """Return [k + 1] kinds and [k + 1, SHARE_BYTES] shares: of each neighbour and of itself at most one.

        Args:
            arrived: [n_asked] whose contributions the server holds, by number.

        Raises:
            MaskingError: out of turn, or too few arrived: then there is too little noise, and nothing is told.
        """
        self._turn(MASKED)
        if len(arrived) != self.terms.n_asked or not arrived[self.number]:
            raise MaskingError("The server tells of other clients than it asked.")
        theirs, n_arrived = arrived[self.neighbours], int(arrived.sum())
        if bool((theirs & ~self.present).any()):
            raise MaskingError("The server claims contributions of clients that were not there.")
        if not self.terms.needed(self.n_parties) <= n_arrived <= self.n_parties:
            raise MaskingError(
                f"{n_arrived} contributions arrived where {self.terms.needed(self.n_parties)} of {self.n_parties} are "
                "needed; nothing is opened."
            )
        if int(theirs.sum()) + 1 < self.terms.shares_needed(len(theirs) + 1):
            raise MaskingError("The server claims that most neighbours are gone; their keys are not told.")
        wanted = kinds_of(self.terms, self.n_parties, arrived)
        kinds = np.where(self.present, wanted[self.neighbours], np.uint8(NOTHING))
        letters = self.received.reshape(-1, 3, SHARE_BYTES)
        shares = letters[np.arange(len(kinds)), np.maximum(kinds, OF_ROOT) - OF_ROOT]
        shares = np.where((kinds == NOTHING)[:, None], np.uint8(0), shares)
        own = int(wanted[self.number])
        self.received, self.phase = np.zeros_like(self.received), DONE
        return np.append(kinds, np.uint8(own)), np.concatenate([shares, self.own_shares[None, own - OF_ROOT]])

    def to_state(self) -> dict[str, Array]:
        """Return all of the party's arrays, its secrets among them: for the client's own memory only."""
        return {name: getattr(self, name) for name in STATE}

    def _turn(self, phase: int) -> None:
        if self.phase != phase:
            raise MaskingError(f"Client {self.number} was asked out of turn or twice (phase {self.phase}).")


def contribution(
    terms: Terms, deviation: float, values: NDArray[np.float64], noise: NoiseSource, uniforms: Uniforms
) -> NDArray[np.int64]:
    """Return one client's contribution: clipped, rounded to whole units, the part of its noise added that stays.

    Args:
        terms: what was agreed on.
        deviation: parameter of that part.
        values: [d] numbers.
        noise: where noise comes from.
        uniforms: what decides about rounding.
    """
    units = terms.grid.encode(values, uniforms)
    return units if deviation == 0 else units + noise.discrete_gaussian(deviation, (len(units),))


def _bytes(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8).copy()
