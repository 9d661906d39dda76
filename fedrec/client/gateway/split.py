"""A masked sum's questions to a node, cut into one for each device, and the devices' answers put together again.

The gateway reads numbers of parties, public keys and sealed letters, as the server does; what devices contribute it
sees only masked, and adds up as it came.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedrec.errors import FedrecError, MaskingError
from fedrec.privacy.shares import SHARE_BYTES
from fedrec.privacy.terms import Terms
from fedrec.protocol.identities import signed
from fedrec.protocol.link import Verb
from fedrec.protocol.secure import (
    ADVERT,
    SEALED,
    AdvertiseReply,
    AdvertiseRequest,
    MaskReply,
    MaskRequest,
    ShareReply,
    ShareRequest,
    UnmaskReply,
    UnmaskRequest,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SLACK_BYTES = 64 << 10
"""What headers of a document may take."""
Read = Callable[[], bytes]
Refuse = Callable[[int, str], None]


@dataclass(frozen=True)
class Parts:
    """One phase, cut up.

    Attributes:
        session: of the masked sum.
        documents: party -> what its device is asked.
        plan: the signed plan that goes to all of them, in "mask".
        most_bytes: longest answer of one device.
        terms: of the session, in "advertise".
        slots: party -> its place in the roster, in "advertise".
    """

    session: str
    documents: Mapping[int, bytes]
    plan: bytes | None
    most_bytes: int
    terms: Terms | None = None
    slots: Mapping[int, int] | None = None


def cut(verb: Verb, document: bytes, terms: Terms | None) -> Parts:
    """Return what each party's device is asked.

    Args:
        verb: the phase.
        document: the server's question to the node.
        terms: of the session, known since "advertise".

    Raises:
        MaskingError: the question is malformed or out of turn.
    """
    if verb == "advertise":
        return _cut_advertise(AdvertiseRequest.from_bytes(document))
    if terms is None:
        raise MaskingError("The server speaks of a masked sum that was not begun here.")
    if verb == "share":
        return _cut_share(ShareRequest.from_bytes(document))
    if verb == "mask":
        return _cut_mask(MaskRequest.from_bytes(document), terms)
    return _cut_unmask(UnmaskRequest.from_bytes(document))


def _cut_advertise(asked: AdvertiseRequest) -> Parts:
    numbers = _numbers(asked.parties)
    slot = np.zeros(1, np.int64)  # a device is alone, so its person is the first of its own pool
    documents = {
        n: AdvertiseRequest(asked.session, asked.terms, asked.parties[at : at + 1], slot).to_bytes()
        for at, n in enumerate(numbers)
    }
    slots = dict(zip(numbers, (int(one) for one in asked.slots), strict=True))
    return Parts(asked.session, documents, None, ADVERT + SLACK_BYTES, asked.terms, slots)


def _cut_share(asked: ShareRequest) -> Parts:
    place = {int(number): at for at, number in enumerate(asked.known)}
    documents = {}
    for at, number in enumerate(_numbers(asked.parties)):
        row = asked.neighbours[at : at + 1]
        if not set(row[0].tolist()) <= place.keys():
            raise MaskingError("The server names neighbours without their keys.")
        # Who has a roster checks everybody's keys and who vouches for them; else the neighbours' will do.
        shown = np.arange(len(asked.known)) if len(asked.speakers) else np.array([place[int(n)] for n in row[0]])
        one = ShareRequest(
            asked.session, asked.n_parties, asked.parties[at : at + 1], row, asked.known[shown], asked.adverts[shown],
            asked.speaker_of[shown], asked.speakers, asked.signatures,
        )  # fmt: skip
        documents[number] = one.to_bytes()
    return Parts(asked.session, documents, None, asked.neighbours.shape[1] * SEALED + SLACK_BYTES)


def _cut_mask(asked: MaskRequest, terms: Terms) -> Parts:
    nothing = np.zeros(0, np.uint8)
    documents = {
        n: MaskRequest(
            asked.session, asked.parties[at : at + 1], asked.present[at : at + 1], asked.letters[at : at + 1], nothing
        ).to_bytes()
        for at, n in enumerate(_numbers(asked.parties))
    }  # fmt: skip
    most = terms.n_values * np.dtype(terms.grid.dtype).itemsize + SLACK_BYTES
    return Parts(asked.session, documents, asked.plan.tobytes(), most)


def _cut_unmask(asked: UnmaskRequest) -> Parts:
    documents = {
        n: UnmaskRequest(asked.session, asked.parties[at : at + 1], asked.arrived, asked.signatures).to_bytes()
        for at, n in enumerate(_numbers(asked.parties))
    }
    return Parts(asked.session, documents, None, (len(asked.arrived) + 1) * (SHARE_BYTES + 1) + SLACK_BYTES)


def joined(
    verb: Verb,
    session: str,
    terms: Terms,
    answers: Mapping[int, Read],
    refuse: Refuse,
    identity: Ed25519PrivateKey | None = None,
) -> bytes:
    """Return the node's answer; a device whose own is not what was asked is left out.

    Args:
        verb: the phase.
        session: of the masked sum.
        terms: of the session.
        answers: party -> how to read its device's answer; one is in memory at a time.
        refuse: is told whose answer was wrong, and why.
        identity: what the gateway signs with for its devices; None: it signs nothing.

    Raises:
        MaskingError: there is no answer that could be used.
    """
    kinds: dict[str, Any] = {"advertise": AdvertiseReply, "share": ShareReply, "mask": MaskReply, "unmask": UnmaskReply}
    found: dict[int, Any] = {}
    total = np.zeros(terms.n_values if verb == "mask" else 0, terms.grid.dtype)
    width: int | None = None
    for party in sorted(answers):
        try:
            one = kinds[verb].from_bytes(answers[party]())
            if one.session != session or one.parties.tolist() != [party]:
                raise MaskingError("It answers for another client or in another session.")
            if verb == "mask":
                if one.total.dtype != total.dtype or one.total.shape != total.shape:
                    raise MaskingError(f"Its masked vector is {one.total.dtype}{one.total.shape}.")
                total += one.total
                found[party] = None
                continue
            rows = {"advertise": "adverts", "share": "letters", "unmask": "kinds"}[verb]
            own = getattr(one, rows).shape[1]
            if width is not None and own != width:
                raise MaskingError("Its answer is of another length than the others'.")
            width, found[party] = own, one
        except FedrecError as error:
            refuse(party, str(error))
    if not found:
        raise MaskingError("No device of this gateway answered.")
    return _reply(verb, session, found, total, identity)


def _reply(verb: Verb, session: str, found: Mapping[int, Any], total: Any, identity: Ed25519PrivateKey | None) -> bytes:
    parties = np.array(list(found), np.int64)

    def column(name: str) -> Any:
        return np.concatenate([getattr(one, name) for one in found.values()])

    if verb == "advertise":
        adverts = column("adverts")
        said = signed(identity, "advertise", session, parties, adverts.tobytes())
        return AdvertiseReply(session, parties, adverts, *said).to_bytes()
    if verb == "share":
        return ShareReply(session, parties, column("letters")).to_bytes()
    if verb == "mask":
        return MaskReply(session, parties, total, signed(identity, "mask", session, parties)[1]).to_bytes()
    return UnmaskReply(session, parties, column("kinds"), column("shares")).to_bytes()


def _numbers(parties: Any) -> list[int]:
    numbers = [int(number) for number in parties]
    if len(set(numbers)) != len(numbers) or not numbers:
        raise MaskingError("The server names a client twice, or nobody.")
    return numbers
