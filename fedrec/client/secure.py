"""What a node answers to the server of a secure sum, for all the parties that it hosts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from fedrec.client.party import PLAIN, STATE, Party, contribution
from fedrec.client.pool import ClientPool
from fedrec.errors import MaskingError
from fedrec.params import Array
from fedrec.privacy.discrete import extra_noise
from fedrec.privacy.masking import noise_key
from fedrec.privacy.noise import NoiseSource, SecureNoise, SeededNoise, Uniforms, system_uniforms
from fedrec.privacy.shares import SHARE_BYTES
from fedrec.privacy.terms import Terms
from fedrec.protocol import wire
from fedrec.protocol.identities import IDENTITY_BYTES, STRICT, SecurePolicy, signed, verify
from fedrec.protocol.link import Verb
from fedrec.protocol.parcels import Held, nothing
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.secure import (
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
    flatten,
)
from fedrec.protocol.signing import opened

REMEMBERED = 256
"""So many past sessions a node can tell from new ones; older ones fail for their keys are gone."""


class SecureNode:
    """The parties that one node hosts. What it must remember between messages is one document, `memory`.

    A node knows its clients' contributions, as it always does; the server sees only sums of masked ones. Contributions
    of one node go into one masked sum, in which the masks between them cancel, so those are not computed.
    """

    def __init__(
        self, pool: ClientPool, memory: bytes | None = None, policy: SecurePolicy = STRICT, held: Held = nothing
    ) -> None:
        """Go on from `memory`, or start; `held` gives the tensors that plans name."""
        self._pool, self._policy, self._held = pool, policy, held
        self._speakers, self._speaker_of = np.zeros((0, IDENTITY_BYTES), np.uint8), np.zeros(0, np.int64)
        self._sessions: list[str] = []
        self._terms: Terms | None = None
        self._parties: dict[int, Party] = {}
        if memory is not None:
            self._recall(memory)

    def answer(self, verb: Verb, document: bytes) -> bytes:
        """Return the answer to one question of the server.

        Raises:
            MaskingError: the question is out of turn, a replay, for another round, or asks for what must not be told.
            TensorsMissing: its plan names tensors that are not held; it can be asked again.
            ProtocolError: it is malformed.
        """
        answers: dict[str, Callable[[bytes], bytes]] = {
            "advertise": lambda document: self._advertise(AdvertiseRequest.from_bytes(document)).to_bytes(),
            "share": lambda document: self._share(ShareRequest.from_bytes(document)).to_bytes(),
            "mask": lambda document: self._mask(MaskRequest.from_bytes(document)).to_bytes(),
            "unmask": lambda document: self._unmask(UnmaskRequest.from_bytes(document)).to_bytes(),
        }
        return answers[verb](document)

    def _advertise(self, request: AdvertiseRequest) -> AdvertiseReply:
        seeded = request.terms.noise == "seed" and self._policy.seeded_noise  # a resumed trial asks the same again
        if request.session != request.terms.session or (request.session in self._sessions and not seeded):
            raise MaskingError("This session of a secure sum was held before; a new one needs a new name.")
        request.terms.check()
        if request.terms.noise == "seed" and not self._policy.seeded_noise:
            raise MaskingError("The server asks for noise from a seed, which protects nobody; this node refuses it.")
        numbers, slots = request.parties.tolist(), request.slots.tolist()
        if len(set(numbers)) != len(numbers) or len(set(slots)) != len(slots):
            raise MaskingError("The server names a client twice.")
        if not 0 <= min(numbers, default=0) <= max(numbers, default=0) < request.terms.n_asked:
            raise MaskingError("The server numbers clients that it did not ask.")
        self._sessions = [*self._sessions, request.session][-REMEMBERED:]
        self._terms = request.terms
        self._parties = {n: Party(request.terms, n, slot) for n, slot in zip(numbers, slots, strict=True)}
        adverts = np.stack([party.advert() for party in self._parties.values()])
        speaker, signature = signed(
            self._policy.identity, "advertise", request.session, request.parties, adverts.tobytes()
        )
        return AdvertiseReply(request.session, request.parties, adverts, speaker, signature)

    def _share(self, request: ShareRequest) -> ShareReply:
        parties = self._called(request.session, request.parties)
        if len(set(request.known.tolist())) != len(request.known):
            raise MaskingError("The server names a client twice.")
        place = {number: at for at, number in enumerate(request.known.tolist())}
        if not set(request.neighbours.ravel().tolist()) <= place.keys():
            raise MaskingError("The server names neighbours without their keys.")
        self._check_introduced(request)
        self._parties = {party.number: party for party in parties}
        shared = [
            party.share(
                request.n_parties, row, request.adverts[[place[int(other)] for other in row]], self._parties.keys()
            )
            for party, row in zip(parties, request.neighbours, strict=True)
        ]
        for party, (_, near) in zip(parties, shared, strict=True):
            for other, letter in near.items():
                self._parties[other].accept(party.number, letter)
        return ShareReply(request.session, request.parties, np.stack([letters for letters, _ in shared]))

    def _mask(self, request: MaskRequest) -> MaskReply:
        parties, terms = self._called(request.session, request.parties), self._known_terms
        plan = RoundPlan.from_bytes(opened(request.plan.tobytes()), self._held)
        if (plan.slice, plan.round) != (terms.slice, terms.round):
            raise MaskingError(
                f"The plan is for round {plan.round} of slice {plan.slice}, the keys for round {terms.round} of slice "
                f"{terms.slice}."
            )
        if sorted(plan.slots.tolist()) != sorted(party.slot for party in parties):
            raise MaskingError("The plan is for other clients than those that exchanged keys.")
        for party, present, letters in zip(parties, request.present, request.letters, strict=True):
            party.receive(present, letters)
        staying = self._pretend(parties, plan)
        together = frozenset(party.number for party in staying)
        total = np.zeros(terms.n_values, terms.grid.dtype)
        for party in staying:
            own = self._pool.run(replace(plan, slots=np.array([party.slot], np.int64)))
            noise = terms.client_noise(party.n_parties)
            units = contribution(terms, noise.base, flatten(terms, own.sums), *_randomness(terms, plan, party.number))
            if noise.extra:
                units += extra_noise(noise_key(party.root, terms.session, party.number), noise.extra, len(units))
            party.mask(total, units, together)
        self._parties = {party.number: party for party in staying}
        numbers = np.array([party.number for party in staying], np.int64)
        _, signature = signed(self._policy.identity, "mask", request.session, numbers)
        return MaskReply(request.session, numbers, total, signature)

    def _unmask(self, request: UnmaskRequest) -> UnmaskReply:
        parties = self._called(request.session, request.parties)
        self._check_arrived(request)
        told: list[tuple[int, Bytes, Bytes]] = []
        for party in parties:
            kinds, shares = party.unmask(request.arrived)
            if not party.silent:
                told.append((party.number, kinds, shares))
        self._parties = {}
        k = len(parties[0].neighbours)
        return UnmaskReply(
            request.session,
            np.array([number for number, _, _ in told], np.int64),
            np.array([kinds for _, kinds, _ in told], np.uint8).reshape(-1, k + 1),
            np.array([shares for _, _, shares in told], np.uint8).reshape(-1, k + 1, SHARE_BYTES),
        )

    def _check_introduced(self, request: ShareRequest) -> None:
        """Count who advertised: each must be spoken for by a node that is known, and for no more than its clients."""
        if self._policy.known is None:
            return
        spoken = request.speaker_of
        if len(request.known) != request.n_parties or not ((spoken >= 0) & (spoken < len(request.speakers))).all():
            raise MaskingError("The server does not show who vouches for each client; this node takes part with none.")
        if len({speaker.tobytes() for speaker in request.speakers}) != len(request.speakers):
            raise MaskingError("The server names a node twice.")
        for at, (speaker, signature) in enumerate(zip(request.speakers, request.signatures, strict=True)):
            own = np.flatnonzero(spoken == at)
            self._policy.known.check(speaker, len(own))
            said = request.adverts[own].tobytes()
            verify(speaker, signature, "advertise", request.session, request.known[own], said)
        self._speakers = request.speakers
        self._speaker_of = np.full(self._known_terms.n_asked, -1, np.int64)
        self._speaker_of[request.known] = spoken

    def _check_arrived(self, request: UnmaskRequest) -> None:
        """Count whose contributions arrived: each node must have signed exactly those of its clients."""
        if self._policy.known is None:
            return
        if len(request.signatures) != len(self._speakers) or len(request.arrived) != len(self._speaker_of):
            raise MaskingError("The server tells of other clients than it introduced.")
        if (self._speaker_of[request.arrived] < 0).any():
            raise MaskingError("The server claims contributions of clients that it did not introduce.")
        for at, (speaker, signature) in enumerate(zip(self._speakers, request.signatures, strict=True)):
            sent = np.flatnonzero(request.arrived & (self._speaker_of == at))
            if len(sent):
                verify(speaker, signature, "mask", request.session, sent)

    def _pretend(self, parties: list[Party], plan: RoundPlan) -> list[Party]:
        """Return who does not fall silent before contributing, where a simulation asks for that."""
        rate = self._known_terms.settings.simulated_dropouts
        if not rate:
            return parties
        numbers = np.array([party.number for party in parties], np.int64)
        drawn = plan.key.child("secure sum", self._known_terms.session, "dropouts").uniforms(numbers, 1)[:, 0]
        for party, u in zip(parties, drawn, strict=True):
            party.silent = bool(u < rate)
        return [party for party, u in zip(parties, drawn, strict=True) if u >= rate / 2]

    @property
    def _known_terms(self) -> Terms:
        if self._terms is None:
            raise MaskingError("The server speaks of a secure sum that was not begun.")
        return self._terms

    def _called(self, session: str, numbers: Ints) -> list[Party]:
        if session != self._known_terms.session:
            raise MaskingError("The server speaks of another session of a secure sum than it began last.")
        found = [self._parties.get(int(number)) for number in numbers]
        if len(set(numbers.tolist())) != len(numbers) or not found or None in found:
            raise MaskingError("The server names clients twice or such as are not in the session.")
        return [party for party in found if party is not None]

    @property
    def terms(self) -> Terms | None:
        """What was agreed on in the session that was begun last."""
        return self._terms

    @property
    def memory(self) -> bytes:
        """All that must be remembered until the next message. It holds secrets: it never leaves the node."""
        header: dict[str, Any] = {
            "sessions": self._sessions,
            "terms": None if self._terms is None else self._terms.model_dump(mode="json"),
        }
        parties = list(self._parties.values())
        tensors: dict[str, Array] = {
            name: np.array([getattr(party, name) for party in parties], np.int64) for name in PLAIN
        }
        tensors |= {"speakers": self._speakers, "speaker_of": self._speaker_of}
        if parties:
            tensors |= {name: np.stack([party.to_state()[name] for party in parties]) for name in STATE}
        return wire.pack("secure-memory", header, tensors)

    def _recall(self, memory: bytes) -> None:
        header, tensors = wire.unpack("secure-memory", memory)
        try:
            self._terms = None if header["terms"] is None else Terms.model_validate(header["terms"])
        except ValidationError as error:
            raise MaskingError(f"What the node remembers of a secure sum is damaged: {error}") from error
        self._sessions = list(header["sessions"])
        self._speakers, self._speaker_of = tensors["speakers"], tensors["speaker_of"]
        for at, numbers in enumerate(zip(*(tensors[name].tolist() for name in PLAIN), strict=True)):
            plain = dict(zip(PLAIN, numbers, strict=True)) | {"silent": bool(tensors["silent"][at])}
            arrays = {name: tensors[name][at] for name in STATE}
            self._parties[plain["number"]] = Party(self._known_terms, **plain, **arrays)


def _randomness(terms: Terms, plan: RoundPlan, party: int) -> tuple[NoiseSource, Uniforms]:
    if terms.noise == "system":
        return SecureNoise(), system_uniforms
    key = plan.key.child("secure sum", terms.session, "party", party)
    generator = key.child("rounding").numpy()
    return SeededNoise(key.child("noise")), lambda n: 1.0 - generator.random(n)
