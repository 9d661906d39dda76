"""Gathering a sum that the server never sees the parts of; `fedrec.server.gather` is its plain twin."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import FedrecError, TallyRefused
from fedrec.privacy.ledger import Charge
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.settings import SecureSum
from fedrec.privacy.shares import SHARE_BYTES
from fedrec.privacy.terms import Terms, agree_on
from fedrec.protocol.identities import IDENTITY_BYTES, SIGNATURE_BYTES
from fedrec.protocol.link import Link, Verb
from fedrec.protocol.parcels import Freight
from fedrec.protocol.secure import (
    ADVERT,
    SEALED,
    AdvertiseReply,
    AdvertiseRequest,
    Ints,
    MaskReply,
    MaskRequest,
    ShareReply,
    ShareRequest,
    UnmaskReply,
    UnmaskRequest,
    layout_of,
    unflatten,
)
from fedrec.random import Key
from fedrec.server.gather import Ask, Gathered, Roster
from fedrec.server.session import SecureSumServer

Request = AdvertiseRequest | ShareRequest | MaskRequest | UnmaskRequest


@dataclass(frozen=True, kw_only=True)
class SecureGathered(Gathered):
    """What a secure sum brought in: `sums` carry the clients' noise, and `stats` are empty.

    Attributes:
        n_parties: how many clients advertised keys; of `n_clients` the contribution arrived.
        neighbours: with how many others each exchanged keys.
        noise_excess: variance of the noise in the sum over what was charged.
        resolution: the unit to which contributions were rounded.
        upload_per_client: bytes that a client sends which is alone on its node, over all four answers.
    """

    n_parties: int
    neighbours: int
    noise_excess: float
    resolution: float
    upload_per_client: int


def secure_gather(
    ask: Ask,
    places: NDArray[np.int64],
    mechanism: GaussianMechanism,
    charge: Charge,
    settings: SecureSum,
    seed: Key | None = None,
) -> SecureGathered:
    """Ask the chosen clients for a masked sum to which each adds its share of the noise.

    A node that fails or answers wrongly is from then on treated as gone with all its clients.

    Args:
        ask: what is asked of whom; the timeout is that of each of the four phases.
        places: chosen clients among all eligible ones.
        mechanism: clip norm and noise multiplier; the noise is added by the clients.
        charge: the ledger's receipt for exactly this release; it is used up before anybody is asked.
        settings: how the sum is protected.
        seed: names the session, from which clients then derive their noise, in a simulation; None: all of it comes
            from operating systems.

    Returns:
        The noised sum, not divided by anything.

    Raises:
        MaskingError: too few clients were chosen (nothing was sent, the charge is unused), or too few stayed to the end
            (nothing was opened, the charge stands).
        PrivacyError: the charge is for another release or was used before.
    """
    probe = ask.plan_for(places[:0])
    layout = layout_of({name: tuple(shape) for name, (shape, _) in ask.shapes.items()})
    session = (os.urandom(16) if seed is None else bytes.fromhex(seed.child("session").hex())[:16]).hex()
    terms = agree_on(
        session, probe.slice, probe.round, settings, len(places), layout,
        mechanism.clip_norm, mechanism.noise_multiplier, "system" if seed is None else "seed",
    )  # fmt: skip
    charge.use(mechanism.noise_multiplier, mechanism.clip_norm)
    server = SecureSumServer(terms, _hosts(ask.roster, places))
    talk = _Talk(ask.link, ask.roster, ask.timeout_seconds)
    talk.phase(
        "advertise", server.advertise_requests(), lambda n, d: server.advertised(n, AdvertiseReply.from_bytes(d))
    )
    talk.phase("share", server.share_requests(), lambda n, d: server.shared(n, ShareReply.from_bytes(d)))
    freight = Freight()
    requests = server.mask_requests(ask.plan_for, freight)
    talk.phase("mask", requests, lambda n, d: server.masked(n, MaskReply.from_bytes(d)), freight)
    talk.phase("unmask", server.unmask_requests(), lambda n, d: server.unmasked(n, UnmaskReply.from_bytes(d)))
    found = unflatten(terms, terms.grid.decode(server.result()))
    k = len(next(iter(server.neighbours.values())))
    return SecureGathered(
        {name: found[name].astype(dtype) for name, (_, dtype) in sorted(ask.shapes.items())},
        len(server.arrived), {}, len(places), tuple(talk.refused), talk.bytes_down, talk.bytes_up,
        tuple(sorted(talk.offenders)),
        n_parties=server.n_parties,
        neighbours=k,
        noise_excess=terms.noise_excess(server.n_parties, len(server.arrived)),
        resolution=2.0**-terms.exponent,
        upload_per_client=upload_bytes(terms, k),
    )  # fmt: skip


def upload_bytes(terms: Terms, k: int) -> int:
    """Return what a client sends that is alone on its node and has k neighbours, in bytes: documents as they travel."""
    one, session, signature = np.zeros(1, np.int64), terms.session, np.zeros(SIGNATURE_BYTES, np.uint8)
    answers = (
        AdvertiseReply(session, one, np.zeros((1, ADVERT), np.uint8), np.zeros(IDENTITY_BYTES, np.uint8), signature),
        ShareReply(session, one, np.zeros((1, k, SEALED), np.uint8)),
        MaskReply(session, one, np.zeros(terms.n_values, terms.grid.dtype), signature),
        UnmaskReply(session, one, np.zeros((1, k + 1), np.uint8), np.zeros((1, k + 1, SHARE_BYTES), np.uint8)),
    )
    return sum(len(answer.to_bytes()) for answer in answers)


class _Talk:
    """Exchanges one phase after the other, and keeps count."""

    def __init__(self, link: Link, roster: Roster, timeout_seconds: float | None) -> None:
        self._link, self._roster, self._timeout = link, roster, timeout_seconds
        self.refused: list[dict[str, str]] = []
        self.offenders: list[int] = []
        self.bytes_down = self.bytes_up = 0

    def phase(
        self,
        verb: Verb,
        requests: Mapping[int, Request],
        take: Callable[[int, bytes], None],
        freight: Freight | None = None,
    ) -> None:
        documents = {node: request.to_bytes() for node, request in requests.items()}
        self.bytes_down += sum(len(document) for document in documents.values())
        silent = set(documents)
        for reply in self._link.exchange(verb, documents, self._timeout, freight):
            try:
                if reply.node not in silent:
                    raise TallyRefused("it answered twice or was not asked")
                silent.discard(reply.node)
                if reply.document is None:
                    raise TallyRefused(reply.error)
                self.bytes_up += len(reply.document)
                take(reply.node, reply.document)
            except FedrecError as error:
                self._refuse(reply.node, f"{verb}: {error}")
                if reply.document is not None:
                    self.offenders.append(reply.node)
        self.bytes_down += 0 if freight is None else freight.n_bytes
        for node in sorted(silent):
            self._refuse(node, f"{verb}: it did not answer in time")

    def _refuse(self, node: int, reason: str) -> None:
        self.refused.append({"node": self._roster.name(node), "reason": reason})


def _hosts(roster: Roster, places: NDArray[np.int64]) -> dict[int, tuple[Ints, Ints]]:
    """Return node -> (numbers, slots); parties are numbered in the order of the roster."""
    hosts: dict[int, tuple[Ints, Ints]] = {}
    first = 0
    for node, slots in roster.slots(places).items():
        hosts[node] = (np.arange(first, first + len(slots), dtype=np.int64), slots)
        first += len(slots)
    return hosts
