"""What a secure sum refuses, on either side."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pydantic import ValidationError

from fedrec.client.party import DONE, MASKED, Party
from fedrec.client.secure import SecureNode
from fedrec.errors import ConfigError, MaskingError
from fedrec.privacy.settings import SecureSum
from fedrec.privacy.shares import SHARE_BYTES
from fedrec.privacy.terms import agree_on, degree
from fedrec.protocol.identities import STRICT, Identities, SecurePolicy, signed
from fedrec.protocol.link import Verb
from fedrec.protocol.secure import (
    OF_KEY,
    OF_ROOT,
    OF_SEED,
    AdvertiseReply,
    AdvertiseRequest,
    MaskReply,
    MaskRequest,
    ShareRequest,
    UnmaskReply,
    UnmaskRequest,
)
from fedrec.protocol.signing import read_key
from fedrec.random import Key
from fedrec.server.session import SecureSumServer
from tests.secure import SecureLink, gathered, plan_for

NONE = np.zeros(0, np.uint8)
LAYOUT = (("counts", (40,)),)


def terms_of(n: int, settings: SecureSum | None = None, session: str = "0" * 32) -> Any:
    return agree_on(session, 0, 3, settings or SecureSum(minimum=5), n, LAYOUT, 1.0, 1.0, "system")


def test_too_few_clients_are_refused_before_anything_is_sent() -> None:
    link = SecureLink([2, 2])
    with pytest.raises(MaskingError, match="4 clients are fewer than the 5"):
        gathered(link)
    assert link.verbs == []


@pytest.mark.parametrize("field", [{"threshold": 0.49}, {"minimum": 2}, {"survivors": 0.5}, {"unknown": 1}])
def test_settings_that_promise_nothing_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SecureSum(**field)


@pytest.mark.parametrize(("verb", "seen"), [("advertise", 1), ("share", 2), ("mask", 3)])
def test_below_the_threshold_the_session_ends_before_the_next_question(verb: Verb, seen: int) -> None:
    link = SecureLink([1] * 20, [(verb, 100 + place) for place in range(16)])
    with pytest.raises(MaskingError, match="Only 4 clients"):
        gathered(link)
    assert len(link.verbs) == seen


def test_without_enough_shares_the_sum_stays_closed() -> None:
    link = SecureLink([1] * 20, [("unmask", 100 + place) for place in range(10)])
    with pytest.raises(MaskingError, match="10 of the 11 shares"):
        gathered(link)
    assert gathered(SecureLink([1] * 20, [("unmask", 100 + place) for place in range(9)])).n_clients == 20


def test_a_changed_letter_is_refused_and_its_reader_leaves() -> None:
    def asked(verb: Verb, node: int, document: bytes) -> bytes:
        if (verb, node) != ("mask", 100):
            return document
        request = MaskRequest.from_bytes(document)
        letters = request.letters.copy()
        letters[0, 0, 30] ^= 1
        return replace(request, letters=letters).to_bytes()

    got = gathered(SecureLink([1] * 10, asked=asked))
    assert got.n_clients == 9
    assert "changed on their way" in got.refused[0]["reason"]


@pytest.mark.parametrize("lose", [[], [("mask", 105)]])
def test_a_wrong_share_opens_nothing(lose: list[tuple[Verb, int]]) -> None:
    def answered(verb: Verb, node: int, document: bytes) -> bytes:
        if (verb, node) != ("unmask", 100):
            return document
        reply = UnmaskReply.from_bytes(document)
        shares = reply.shares.copy()
        shares[:, :, 0] ^= 1
        return replace(reply, shares=shares).to_bytes()

    with pytest.raises(MaskingError):
        gathered(SecureLink([1] * 10, lose, answered=answered))


def test_a_key_that_another_client_has_is_refused() -> None:
    first: list[bytes] = []

    def answered(verb: Verb, node: int, document: bytes) -> bytes:
        if verb != "advertise":
            return document
        reply = AdvertiseReply.from_bytes(document)
        if node == 101:
            return replace(reply, adverts=np.frombuffer(first[0], np.uint8).reshape(1, -1)).to_bytes()
        first.append(reply.adverts.tobytes())
        return document

    got = gathered(SecureLink([1] * 10, answered=answered))
    assert got.n_clients == 9
    assert "one that another client has" in got.refused[0]["reason"]


def test_a_plan_of_another_round_is_refused() -> None:
    def asked(verb: Verb, node: int, document: bytes) -> bytes:
        if verb != "mask":
            return document
        request = MaskRequest.from_bytes(document)
        other = replace(plan_for(np.zeros(1, np.int64)), round=4).to_bytes()
        return replace(request, plan=np.frombuffer(other, np.uint8)).to_bytes()

    with pytest.raises(MaskingError, match="Only 0 clients contributed"):
        gathered(SecureLink([1] * 10, asked=asked))


def test_a_session_cannot_be_replayed_nor_a_phase_repeated() -> None:
    link, asked = SecureLink([1] * 10), {}

    def keep(verb: Verb, node: int, document: bytes) -> bytes:
        asked[verb, node] = document
        return document

    link.asked = keep
    gathered(link)
    for verb in ("advertise", "share", "mask", "unmask"):
        with pytest.raises(MaskingError):
            SecureNode(link.pools[100], link.memory[100]).answer(verb, asked[verb, 100])  # type: ignore[arg-type]


def parties(n: int, settings: SecureSum | None = None) -> list[Party]:
    """Parties that exchanged keys and letters, and masked zeros; party i has everybody else as neighbours, in order."""
    terms = terms_of(n, settings)
    found = [Party(terms, number, number) for number in range(n)]
    adverts = np.stack([party.advert() for party in found])
    others = [np.delete(np.arange(n), number) for number in range(n)]
    letters = {own.number: own.share(n, others[own.number], adverts[others[own.number]])[0] for own in found}
    for own in found:
        inbox = np.stack([letters[o][own.number - (own.number > o)] for o in others[own.number].tolist()])
        own.receive(np.ones(n - 1, np.bool_), inbox)
        own.mask(np.zeros(40, np.uint32), np.zeros(40, np.int64))
    return found


def test_a_client_gives_one_share_of_each_neighbour_once() -> None:
    party = parties(10)[0]
    # Of the 8 that arrived the first r keep: with 7 of 10 needed and two missing, r = ceil(7 x 2 / 3).
    arrived = np.array([True, False, False] + [True] * 7)
    kinds, shares = party.unmask(arrived)
    assert kinds.tolist() == [OF_KEY] * 2 + [OF_SEED] * 4 + [OF_ROOT] * 3 + [OF_SEED]
    assert shares.shape == (10, SHARE_BYTES)
    assert party.phase == DONE
    assert not party.received.any()
    with pytest.raises(MaskingError, match="out of turn or twice"):
        party.unmask(arrived)


@pytest.mark.parametrize(
    ("arrived", "words"),
    [
        ([1] * 6 + [0] * 4, "6 contributions arrived where 7 of 10"),
        ([0] + [1] * 9, "other clients than it asked"),
        ([1] * 11, "other clients than it asked"),
    ],
    ids=["few", "not the client's own", "more"],
)
def test_a_client_tells_nothing_to_a_server_that_asks_for_too_much(arrived: list[int], words: str) -> None:
    party = parties(10)[0]
    with pytest.raises(MaskingError, match=words):
        party.unmask(np.array(arrived, np.bool_))
    assert party.phase == MASKED


def test_a_client_checks_its_neighbours() -> None:
    terms = terms_of(10)
    found = [Party(terms, number, number) for number in range(10)]
    adverts = np.stack([party.advert() for party in found])
    others = np.arange(1, 10)
    copied = adverts[1:].copy()
    copied[1] = copied[0]
    for n, neighbours, keys in [
        (10, others, copied),
        (10, np.arange(9), adverts[:9]),
        (10, others[:4], adverts[1:5]),
        (4, others[:3], adverts[1:4]),
        (11, others, adverts[1:]),
    ]:
        with pytest.raises(MaskingError):
            Party(terms, 0, 0).share(n, neighbours, keys)
    low_order = adverts[1:].copy()
    low_order[0, :32] = 0
    with pytest.raises(MaskingError, match="nobody can agree"):
        Party(terms, 0, 0).share(10, others, low_order)


def test_the_server_refuses_answers_out_of_turn_or_of_others() -> None:
    terms = terms_of(6)
    hosts = {node: (np.array([node]), np.array([0])) for node in range(6)}
    server = SecureSumServer(terms, hosts)
    with pytest.raises(MaskingError):
        server.share_requests()
    server.advertise_requests()
    reply = AdvertiseReply(terms.session, np.array([0]), Party(terms, 0, 0).advert()[None], NONE, NONE)
    for node, odd in [(1, reply), (0, replace(reply, session="1" * 32)), (0, replace(reply, parties=np.array([7])))]:
        with pytest.raises(MaskingError):
            SecureSumServer.advertised(server, node, odd)
    server.advertised(0, reply)
    with pytest.raises(MaskingError, match="twice"):
        server.advertised(0, reply)


def test_documents_of_other_shapes_are_refused() -> None:
    good = ShareRequest(
        "0" * 32, 5, np.arange(2), np.ones((2, 3), np.int64), np.arange(4), np.zeros((4, 96), np.uint8),
        np.full(4, -1), np.zeros((0, 32), np.uint8), np.zeros((0, 64), np.uint8),
    )  # fmt: skip
    assert ShareRequest.from_bytes(good.to_bytes()).n_parties == 5
    for odd in (
        replace(good, neighbours=np.ones((3, 3), np.int64)),
        replace(good, adverts=np.zeros((4, 95), np.uint8)),
        replace(good, parties=np.zeros(2, np.float32)),
        replace(good, n_parties="5"),  # type: ignore[arg-type]
    ):
        with pytest.raises(MaskingError):
            ShareRequest.from_bytes(odd.to_bytes())
    asked = AdvertiseRequest("0" * 32, terms_of(6), np.arange(1), np.arange(1))
    weak = asked.terms.model_copy(
        update={"settings": SecureSum.model_construct(**{**dict(SecureSum()), "threshold": 0.2})}
    )
    with pytest.raises(MaskingError, match="terms"):
        AdvertiseRequest.from_bytes(replace(asked, terms=weak).to_bytes())


def test_simulated_dropouts_are_the_share_that_was_asked_for() -> None:
    got = gathered(SecureLink([200]), SecureSum(simulated_dropouts=0.3))
    assert 200 * 0.85 - 4 * 5 < got.n_clients < 200 * 0.85 + 4 * 5  # 15 % before contributing; deviation 5


def test_neighbours_grow_with_the_logarithm() -> None:
    found = [degree(n, SecureSum()) for n in (30, 1_000, 10_000, 100_000)]
    assert found[0] == 29
    assert found == sorted(found)
    assert found[3] < 300


def test_memory_and_upload_of_a_client_are_reported() -> None:
    link = SecureLink([1] * 12, policies=federation([1] * 12))
    got = gathered(link)
    assert got.bytes_up == sum(len(document) for _, _, document in link.sent)
    assert got.upload_per_client == pytest.approx(got.bytes_up / 12, rel=0.01)


def test_unmask_requests_name_only_what_arrived() -> None:
    seen: list[UnmaskRequest] = []

    def asked(verb: Verb, node: int, document: bytes) -> bytes:
        if verb == "unmask":
            seen.append(UnmaskRequest.from_bytes(document))
        return document

    gathered(SecureLink([1] * 10, [("mask", 103)], asked=asked))
    assert len(seen) == 9
    assert all(int((~request.arrived).sum()) == 1 and len(request.arrived) == 10 for request in seen)


def federation(sizes: list[int], known: int | None = None) -> list[SecurePolicy]:
    """Nodes that sign, of which the first `known` know each other and check what the server says of them."""
    keys = [Ed25519PrivateKey.generate() for _ in sizes]
    identities = Identities({k.public_key().public_bytes_raw(): n for k, n in zip(keys[:known], sizes, strict=False)})
    return [SecurePolicy(key, identities) for key in keys]


@pytest.mark.parametrize("sizes", [[1] * 12, [3, 4, 5, 2]])
@pytest.mark.parametrize("lose", [[], [("advertise", 103)], [("share", 103)], [("mask", 103)], [("unmask", 103)]])
def test_nodes_that_know_each_other_sum_as_others_do(sizes: list[int], lose: list[tuple[Verb, int]]) -> None:
    link = SecureLink(sizes, lose, federation(sizes))
    got = gathered(link, SecureSum(minimum=5), multiplier=1e-3)
    assert not [refusal for refusal in got.refused if "in time" not in refusal["reason"]]
    if not lose:
        np.testing.assert_allclose(got.sums["counts"], link.clipped_sum(), atol=0.01)


def test_a_node_without_an_identity_is_left_out_where_most_have_one() -> None:
    sizes = [1] * 10
    policies = [*federation(sizes)[:9], STRICT]
    assert gathered(SecureLink(sizes, policies=policies)).n_clients == 9
    # Without signatures those who insist on them take no part.
    few = SecureLink(sizes, policies=[*federation(sizes)[:4], *[STRICT] * 6])
    with pytest.raises(MaskingError, match="Only 6 clients exchanged keys where 7"):
        gathered(few, SecureSum(minimum=7, neighbours=9))


def test_the_server_refuses_what_a_node_did_not_sign_or_another_signed() -> None:
    sizes = [1] * 8
    policies = federation(sizes)

    def answered(verb: Verb, node: int, document: bytes) -> bytes:
        if verb == "advertise" and node == 100:
            reply = AdvertiseReply.from_bytes(document)
            return replace(reply, adverts=Party(terms_of(8), 0, 0).advert()[None]).to_bytes()
        if verb == "mask" and node == 101:
            return replace(MaskReply.from_bytes(document), signature=np.zeros(64, np.uint8)).to_bytes()
        return document

    got = gathered(SecureLink(sizes, policies=policies, answered=answered))
    assert [refusal["node"] for refusal in got.refused] == ["node 0", "node 1"]
    assert all("does not fit what it says" in refusal["reason"] for refusal in got.refused)
    assert got.n_clients == 6
    same = [policies[0], policies[0], *policies[2:]]
    assert "key of another node" in gathered(SecureLink(sizes, policies=same)).refused[0]["reason"]


def introduced(change: Any) -> list[str]:
    """Return why nodes refused what the server told of the others, changed on its way."""
    sizes = [1] * 10
    link = SecureLink(sizes, policies=federation(sizes))
    link.asked = lambda verb, node, document: (
        change(ShareRequest.from_bytes(document)).to_bytes() if verb == "share" else document
    )
    with pytest.raises(MaskingError, match="Only 0 clients exchanged keys"):
        gathered(link)
    answers = []
    for node, pool in link.pools.items():
        fresh = SecureNode(pool, link.memory[node], link.policies[node])  # type: ignore[arg-type]
        with pytest.raises(MaskingError) as refusal:
            fresh.answer("share", change(ShareRequest.from_bytes(link.told["share", node])).to_bytes())
        answers.append(str(refusal.value))
    return answers


def invented(request: ShareRequest) -> ShareRequest:
    """One more client, whom the server plays itself: its key is known to nobody."""
    key, party = Ed25519PrivateKey.generate(), Party(terms_of(11), 10, 0)
    speaker, signature = signed(key, "advertise", request.session, np.array([10]), party.advert().tobytes())
    return replace(
        request,
        n_parties=11,
        known=np.append(request.known, 10),
        adverts=np.concatenate([request.adverts, party.advert()[None]]),
        speaker_of=np.append(request.speaker_of, 10),
        speakers=np.concatenate([request.speakers, speaker[None]]),
        signatures=np.concatenate([request.signatures, signature[None]]),
    )


def swapped(request: ShareRequest) -> ShareRequest:
    """A key of the server's own in the place of a client's."""
    adverts = request.adverts.copy()
    adverts[3] = Party(terms_of(10), 3, 0).advert()
    return replace(request, adverts=adverts)


def twice(request: ShareRequest) -> ShareRequest:
    """A node speaks for a client of another one."""
    return replace(request, speaker_of=np.where(request.speaker_of == 5, 4, request.speaker_of))


def more(request: ShareRequest) -> ShareRequest:
    """More clients are claimed than are shown, so that each would add too little noise."""
    return replace(request, n_parties=request.n_parties + 1)


def unsigned(request: ShareRequest) -> ShareRequest:
    return replace(request, speaker_of=np.full_like(request.speaker_of, -1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (invented, "whom this client does not know"),
        (swapped, "does not fit what it says"),
        (twice, "speaks for 2 clients, and may for 1"),
        (more, "does not show who vouches"),
        (unsigned, "does not show who vouches"),
    ],
)
def test_a_server_that_invents_clients_or_swaps_keys_is_found_out(change: Any, words: str) -> None:
    assert all(words in answer for answer in introduced(change))


def test_a_server_that_claims_more_contributions_than_arrived_is_told_nothing() -> None:
    sizes = [1] * 10

    def asked(verb: Verb, node: int, document: bytes) -> bytes:
        if verb != "unmask":
            return document
        request = UnmaskRequest.from_bytes(document)
        return replace(request, arrived=np.ones_like(request.arrived)).to_bytes()

    link = SecureLink(sizes, [("mask", 104), ("mask", 105)], federation(sizes), asked)
    with pytest.raises(MaskingError, match="0 of the 6 shares"):
        gathered(link)


def test_noise_from_a_seed_is_refused_unless_a_node_is_told_to_accept_it() -> None:
    with pytest.raises(MaskingError, match="Only 0 clients advertised"):
        gathered(SecureLink([1] * 6, policies=[STRICT] * 6), seed=Key.from_seed(1))
    assert gathered(SecureLink([1] * 6), seed=Key.from_seed(1)).n_clients == 6


def test_identities_are_read_from_files(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    pem = tmp_path / "identity.key"
    pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = read_key(pem).public_key().public_bytes_raw()
    assert public == key.public_key().public_bytes_raw()
    roster = tmp_path / "identities.json"
    roster.write_text(json.dumps({public.hex(): 3}))
    assert Identities.load(roster).clients_of == {public: 3}
    for text in ("[]", '{"ab": 1}', f'{{"{public.hex()}": 0}}', "no"):
        roster.write_text(text)
        with pytest.raises(ConfigError, match="Cannot read identities"):
            Identities.load(roster)
    with pytest.raises(ConfigError, match="Cannot read a key"):
        read_key(roster)
