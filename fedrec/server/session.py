"""The server of a secure sum: it introduces clients to each other, adds up what it cannot read, and opens the sum.

Source: Bonawitz et al., CCS 2017, figure 4; with few neighbours as in Bell et al., CCS 2020, figure 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import SystemRandom
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import MaskingError
from fedrec.privacy.discrete import extra_noise
from fedrec.privacy.masking import KEY_BYTES, KeyPair, Ring, add_mask, commitment, derive, noise_key, seed_of
from fedrec.privacy.shares import join
from fedrec.privacy.terms import Terms, degree, ring_neighbours
from fedrec.protocol.identities import IDENTITY_BYTES, SIGNATURE_BYTES, verify
from fedrec.protocol.parcels import Freight
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.secure import (
    ADVERT,
    NOTHING,
    OF_ROOT,
    SEALED,
    AdvertiseReply,
    AdvertiseRequest,
    Bytes,
    Ints,
    MaskReply,
    MaskRequest,
    ShareReply,
    ShareRequest,
    UnmaskReply,
    UnmaskRequest,
    kinds_of,
)


class SecureSumServer:
    """One session. Methods come in pairs: what to ask each node in a phase, and an answer to it.

    Asking closes the phase before: who has not answered by then is gone. No method can be called out of turn. What the
    server holds of contributions is one masked total; it is opened once, and only if enough of them arrived.
    """

    def __init__(self, terms: Terms, hosts: Mapping[int, tuple[Ints, Ints]]) -> None:
        """Start a session.

        Args:
            terms: what all agree on.
            hosts: node -> ([m] numbers of its parties, [m] their slots on the node).

        Raises:
            MaskingError: the terms cannot keep their promise, or a party is on two nodes.
        """
        terms.check()
        numbers = [int(number) for parties, _ in hosts.values() for number in parties]
        if len(set(numbers)) != len(numbers) or len(numbers) > terms.n_asked:
            raise MaskingError("A party of a secure sum is on two nodes, or there are more than the terms say.")
        self.terms = terms
        self.slots = {
            int(n): int(slot) for parties, slots in hosts.values() for n, slot in zip(parties, slots, strict=True)
        }
        self.node_of = {int(n): node for node, (parties, _) in hosts.items() for n in parties}
        self._phase = 0
        self._answered: set[int] = set()
        self._adverts: dict[int, bytes] = {}
        self._keys: set[bytes] = set()
        self.neighbours: dict[int, list[int]] = {}
        self._letters: dict[int, Bytes] = {}
        self.arrived: set[int] = set()
        self._total: Ring = np.zeros(terms.n_values, terms.grid.dtype)
        self._signed: dict[int, tuple[Bytes, Bytes]] = {}
        self._sent: dict[int, Bytes] = {}
        self._kinds: Bytes = np.zeros(0, np.uint8)
        self._shares: dict[int, dict[int, bytes]] = {}

    @property
    def n_parties(self) -> int:
        """How many advertised keys."""
        return len(self._adverts)

    def advertise_requests(self) -> dict[int, AdvertiseRequest]:
        """Return what to ask each node first: for its clients' keys."""
        self._close(0)
        session, terms = self.terms.session, self.terms
        return {
            node: AdvertiseRequest(session, terms, own, _ints(self.slots[int(n)] for n in own))
            for node, own in self._by_node(self.slots).items()
        }

    def advertised(self, node: int, reply: AdvertiseReply) -> None:
        """Take a node's keys.

        Raises:
            MaskingError: out of turn, of another session, not the node's clients, or a key that is known already.
        """
        numbers = self._check(1, node, reply.session, reply.parties)
        keys = [row.tobytes()[at : at + KEY_BYTES] for row in reply.adverts for at in (0, KEY_BYTES)]
        if len(set(keys)) != len(keys) or self._keys & set(keys):
            raise MaskingError("it advertises a key twice, or one that another client has")
        if len(reply.signature):
            verify(reply.speaker, reply.signature, "advertise", reply.session, reply.parties, reply.adverts.tobytes())
            if any(speaker.tobytes() == reply.speaker.tobytes() for speaker, _ in self._signed.values()):
                raise MaskingError("it signs with the key of another node")
            self._signed[node] = reply.speaker, reply.signature
        self._keys.update(keys)
        self._adverts.update(zip(numbers, (row.tobytes() for row in reply.adverts), strict=True))

    def share_requests(self) -> dict[int, ShareRequest]:
        """Return what to ask each node next: for shares of its clients' secrets, sealed for their neighbours.

        Raises:
            MaskingError: too few clients advertised keys.
        """
        self._close(1)
        self._leave_out_unsigned()
        self._require(len(self._adverts), self.terms.settings.minimum, "advertised keys")
        order = sorted(self._adverts)
        SystemRandom().shuffle(order)
        self.neighbours = ring_neighbours(order, degree(len(order), self.terms.settings))
        found, speakers = {}, list(self._signed)
        for node, own in self._by_node(self._adverts).items():
            rows = np.array([self.neighbours[int(n)] for n in own], np.int64)
            known = _ints(sorted(self._adverts)) if self._signed else np.unique(rows)
            adverts = np.frombuffer(b"".join(self._adverts[int(n)] for n in known), np.uint8).reshape(-1, ADVERT)
            spoken = _ints(speakers.index(self.node_of[int(n)]) if self._signed else -1 for n in known)
            found[node] = ShareRequest(
                self.terms.session, len(order), own, rows, known, adverts, spoken,
                _rows([self._signed[speaker][0] for speaker in speakers], IDENTITY_BYTES),
                _rows([self._signed[speaker][1] for speaker in speakers], SIGNATURE_BYTES),
            )  # fmt: skip
        return found

    def shared(self, node: int, reply: ShareReply) -> None:
        """Take a node's sealed letters.

        Raises:
            MaskingError: out of turn, of another session, or not one for each neighbour.
        """
        numbers = self._check(2, node, reply.session, reply.parties)
        if not set(numbers) <= self._adverts.keys() or reply.letters.shape[1] != len(
            next(iter(self.neighbours.values()))
        ):
            raise MaskingError("it sends letters of clients that advertised no keys, or not one to each neighbour")
        self._letters.update(zip(numbers, reply.letters, strict=True))

    def mask_requests(
        self, plan_for: Callable[[NDArray[np.int64]], RoundPlan], freight: Freight | None = None
    ) -> dict[int, MaskRequest]:
        """Return what to ask each node next: for masked contributions to the plan.

        Args:
            plan_for: the plan for a node's slots.
            freight: takes along what plans only name; None: they carry everything.

        Raises:
            MaskingError: too few clients exchanged keys.
        """
        self._close(2)
        self._require(len(self._letters), self.terms.settings.minimum, "exchanged keys")
        places = {own: {other: at for at, other in enumerate(row)} for own, row in self.neighbours.items()}
        empty = np.zeros(SEALED, np.uint8)
        found = {}
        for node, own in self._by_node(self._letters).items():
            rows = [self.neighbours[int(n)] for n in own]
            present = np.array([[other in self._letters for other in row] for row in rows], np.bool_)
            letters = np.stack(
                [
                    np.stack([self._letters[o][places[o][int(n)]] if o in self._letters else empty for o in row])
                    for n, row in zip(own, rows, strict=True)
                ]
            )
            plan = plan_for(_ints(self.slots[int(n)] for n in own)).to_bytes(freight)
            found[node] = MaskRequest(self.terms.session, own, present, letters, np.frombuffer(plan, np.uint8))
        return found

    def masked(self, node: int, reply: MaskReply) -> None:
        """Add a node's masked sum to the total.

        Raises:
            MaskingError: out of turn, of another session, of clients that did not exchange keys, or no such vector.
        """
        numbers = self._check(3, node, reply.session, reply.parties)
        if not set(numbers) <= self._letters.keys():
            raise MaskingError("it sends contributions of clients that exchanged no keys")
        if reply.total.dtype != self._total.dtype or reply.total.shape != self._total.shape:
            raise MaskingError(
                f"its sum is {reply.total.dtype}{reply.total.shape}, not {self._total.dtype}{self._total.shape}"
            )
        if node in self._signed:
            verify(self._signed[node][0], reply.signature, "mask", reply.session, reply.parties)
            self._sent[node] = reply.signature
        if numbers:
            self._total += reply.total
            self.arrived.update(numbers)

    def unmask_requests(self) -> dict[int, UnmaskRequest]:
        """Return what to ask each node last: for shares of the secrets that open the sum.

        Raises:
            MaskingError: too few contributions arrived, so there is too little noise or nobody to hide among.
        """
        self._close(3)
        self._require(len(self.arrived), self.terms.needed(self.n_parties), "contributed")
        arrived = np.zeros(self.terms.n_asked, np.bool_)
        arrived[list(self.arrived)] = True
        self._kinds = kinds_of(self.terms, self.n_parties, arrived)
        nothing = np.zeros(SIGNATURE_BYTES, np.uint8)
        signatures = _rows([self._sent.get(node, nothing) for node in self._signed], SIGNATURE_BYTES)
        return {
            node: UnmaskRequest(self.terms.session, own, arrived, signatures)
            for node, own in self._by_node(self.arrived).items()
        }

    def unmasked(self, node: int, reply: UnmaskReply) -> None:
        """Take a node's shares.

        Raises:
            MaskingError: out of turn, of another session, or other shares than were asked for.
        """
        numbers = self._check(4, node, reply.session, reply.parties)
        if not set(numbers) <= self.arrived:
            raise MaskingError("it gives shares of clients whose contributions did not arrive")
        for number, kinds in zip(numbers, reply.kinds, strict=True):
            wanted = [self._kind(other) for other in (*self.neighbours[number], number)]
            if kinds.tolist() != wanted:
                raise MaskingError("it gives other shares than were asked for")
        for number, shares in zip(numbers, reply.shares, strict=True):
            for other, share in zip([*self.neighbours[number], number], shares, strict=True):
                if other in self._letters:
                    self._shares.setdefault(other, {})[number + 1] = share.tobytes()

    def result(self) -> NDArray[np.int64]:
        """Open the sum: [d] whole units, noise included.

        Raises:
            MaskingError: shares are missing or wrong; nothing is opened.
        """
        self._close(4)
        session = self.terms.session
        # All secrets are put together and checked before the first mask comes off.
        secrets = {number: self._joined(number) for number in sorted(self.arrived)}
        roots = {number: secret for number, secret in secrets.items() if self._kinds[number] == OF_ROOT}
        seeds = secrets | {number: seed_of(root, session, number) for number, root in roots.items()}
        for number, seed in seeds.items():
            if commitment(session, number, seed) != self._adverts[number][2 * KEY_BYTES :]:
                raise MaskingError(
                    f"The shares of client {number}'s seed give another one; a holder gave a wrong share."
                )
        keys = {number: KeyPair.from_private(self._joined(number)) for number in sorted(self._gone())}
        for number, pair in keys.items():
            if pair.public != self._adverts[number][KEY_BYTES : 2 * KEY_BYTES]:
                raise MaskingError(
                    f"The shares of client {number}'s key give another one; a holder gave a wrong share."
                )
        for number, seed in seeds.items():
            add_mask(self._total, derive(seed, "own mask", session, number), -1)
        extra = self.terms.client_noise(self.n_parties).extra
        for number, root in roots.items():
            noise = extra_noise(noise_key(root, session, number), extra, self.terms.n_values)
            self._total -= self.terms.grid.to_ring(noise)
        for number, pair in keys.items():
            for other in self.neighbours[number]:
                if other in self.arrived:
                    low, high = sorted((number, other))
                    secret = pair.agree(self._adverts[other][KEY_BYTES : 2 * KEY_BYTES])
                    add_mask(self._total, derive(secret, "shared mask", session, low, high), -1 if other == low else 1)
        return self.terms.grid.from_ring(self._total)

    def _kind(self, other: int) -> int:
        return int(self._kinds[other]) if other in self._letters else NOTHING

    def _gone(self) -> set[int]:
        """Return who exchanged keys and then fell silent, but still hides in masks of others."""
        return {n for n in self._letters if n not in self.arrived and self.arrived & set(self.neighbours[n])}

    def _joined(self, number: int) -> bytes:
        shares, needed = self._shares.get(number, {}), self.terms.shares_needed(len(self.neighbours[number]) + 1)
        if len(shares) < needed:
            raise MaskingError(
                f"{len(shares)} of the {needed} shares that open client {number}'s masks came; the sum stays closed."
            )
        return join(dict(sorted(shares.items())[:needed]))

    def _leave_out_unsigned(self) -> None:
        """Where most clients come signed, go on with them alone; where most do not, without signatures."""
        vouched = [number for number in self._adverts if self.node_of[number] in self._signed]
        if 2 * len(vouched) > len(self._adverts):
            self._adverts = {number: self._adverts[number] for number in vouched}
        else:
            self._signed = {}

    def _require(self, found: int, needed: int, did: str) -> None:
        if found < needed:
            raise MaskingError(f"Only {found} clients {did} where {needed} must; the secure sum ends here, unopened.")

    def _close(self, phase: int) -> None:
        if self._phase != phase:
            raise MaskingError("The phases of a secure sum have an order, and each happens once.")
        self._phase, self._answered = phase + 1, set()

    def _check(self, phase: int, node: int, session: str, parties: Ints) -> list[int]:
        """Return the numbers of the parties that answer, after what every answer must pass; each node answers once."""
        numbers: list[int] = parties.tolist()
        if self._phase != phase or node in self._answered:
            raise MaskingError("it answers out of turn or twice")
        if session != self.terms.session:
            raise MaskingError("it answers in another session")
        if len(set(numbers)) != len(numbers) or any(self.node_of.get(number) != node for number in numbers):
            raise MaskingError("it answers for clients that are not its own, or twice for one")
        self._answered.add(node)
        return numbers

    def _by_node(self, numbers: Any) -> dict[int, Ints]:
        found: dict[int, list[int]] = {}
        for number in sorted(numbers):
            found.setdefault(self.node_of[number], []).append(number)
        return {node: np.array(own, np.int64) for node, own in found.items()}


def _rows(values: list[Bytes], width: int) -> Bytes:
    return np.array(values, np.uint8).reshape(-1, width)


def _ints(values: Any) -> Ints:
    return np.fromiter(values, np.int64)
