"""A masked sum through a gateway: devices in threads, over TLS; the gateway sees no single contribution."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.client.answering import Answerer
from fedrec.client.gateway.control import GatewayPool
from fedrec.client.gateway.split import cut
from fedrec.client.sdk import Device, Enrolment, Limits
from fedrec.data.slices import LastWindow
from fedrec.errors import MaskingError, PlanRefused
from fedrec.models.configs import PopularityConfig
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.settings import SecureSum
from fedrec.privacy.terms import Terms, agree_on
from fedrec.protocol import wire
from fedrec.protocol.link import Verb
from fedrec.protocol.plan import Census, CensusRequest, RoundPlan
from fedrec.protocol.secure import AdvertiseRequest
from fedrec.protocol.signing import Terms as Promised
from fedrec.protocol.signing import public_key, sign, write_key
from fedrec.protocol.task import CountTask
from fedrec.random import Key
from fedrec.server.gather import Ask, Roster
from fedrec.server.secure import secure_gather
from fedrec.server.signed import Promise, SignedLink
from tests.fleet import (
    ANYWHERE,
    CATALOG,
    N_ITEMS,
    SERVER,
    PoolLink,
    device,
    enrolled,
    history,
    made,
    running,
    short_folder,
)

N = 7
WINDOW = LastWindow(skip=0)
LIMITS = Limits(cohort_minimum=5, masked=True)
CLIP = 4.0


class Person(threading.Thread):
    """One device, in a thread of its own, taking part until it is told to leave, or until a phase."""

    def __init__(
        self, folder: Path, enrolment: Enrolment, number: int, leaves_at: str = "", limits: Limits = LIMITS
    ) -> None:
        super().__init__(daemon=True)
        self.folder, self.enrolment, self.number, self.leaves_at = folder, enrolment, number, leaves_at
        self.limits = limits
        self.log: list[dict[str, Any]] = []
        self.refused: list[dict[str, Any]] = []
        self.spent: float | None = None
        self.over = False

    def run(self) -> None:
        one = device(self.folder, self.enrolment, self.number, self.limits)
        if self.leaves_at:
            self._leave(one)
        try:
            while not self.over:
                one.participate(ANYWHERE, wait_seconds=1.0, patience_seconds=20.0)
        except SystemExit:
            pass
        self.log, self.refused, self.spent = one.sent(), one.refused(), one.privacy_spent().epsilon
        one.close()

    def _leave(self, one: Device) -> None:
        kept = one.store.log_sent

        def log_sent(entry: dict[str, Any]) -> int:
            if entry.get("verb") == self.leaves_at:
                raise SystemExit
            return kept(entry)

        one.store.log_sent = log_sent  # type: ignore[method-assign]


def plan_for(slots: Any) -> RoundPlan:
    task = CountTask(window=WINDOW, clip_norm=CLIP)
    return RoundPlan(0, 2, task, PopularityConfig(), N_ITEMS, {}, Key.from_seed(1), CATALOG.digest(), slots)


@pytest.mark.parametrize("known", ["all", "a stranger", "too few people"])
def test_devices_with_a_roster_take_part_with_the_nodes_in_it_alone(tmp_path: Path, known: str) -> None:
    with short_folder() as folder:
        key = write_key(folder / "identity.key")
        vouches = public_key(key).hex()
        rosters = {"all": {vouches: N}, "a stranger": {"0" * 64: N}, "too few people": {vouches: N - 1}}
        limits = LIMITS.model_copy(update={"identities": rosters[known]})
        settings = made(folder, deadline_seconds=8.0, identity="identity.key")
        with running(folder, settings):
            people = [Person(tmp_path / str(n), enrolled(folder, settings, str(n)), n, "", limits) for n in range(N)]
            for one in people:
                one.start()
            pool = GatewayPool(folder)
            request = CensusRequest(window=WINDOW, catalog_digest=CATALOG.digest()).to_bytes()
            while Census.from_bytes(pool.answer("census", request)).n_clients < N:
                pass
            try:
                got = summed(pool, N)
                assert known == "all"
                assert got.n_clients == N
            except MaskingError:
                assert known != "all"
            for one in people:
                one.over = True
            for one in people:
                one.join(30)
    why = {"a stranger": "whom this client does not know", "too few people": "speaks for 7 clients, and may for 6"}
    for one in people:
        if known == "all":
            assert one.refused == []
            assert [line["verb"] for line in one.log if "verb" in line] == ["advertise", "share", "mask", "unmask"]
        else:
            assert why[known] in one.refused[0]["why"]
            assert "mask" not in [line.get("verb") for line in one.log], "nothing of the history has left"


def summed(pool: GatewayPool, present: int) -> Any:
    """Ask the devices of a gateway for a masked sum of what they took."""
    link = SignedLink(PoolLink({7: pool}), SERVER, lambda: Promise("main", 5, 1.0, 1e-6))
    mechanism = GaussianMechanism(CLIP, 1e-4)
    charge = PrivacyLedger(None, epsilon=None, delta=1e-5).charge("sum", mechanism.event(1.0), clip_norm=CLIP)
    shapes = {"counts": ((N_ITEMS,), np.dtype(np.float32))}
    ask = Ask(link, Roster(((7, "gateway", present),)), plan_for, shapes, 20.0)
    return secure_gather(ask, ask.everybody, mechanism, charge, SecureSum(minimum=5, dropouts=0.3, neighbours=6))


@pytest.mark.parametrize("leaves_at", ["", "mask", "unmask"])
def test_the_sum_of_masked_contributions_is_that_of_the_histories(tmp_path: Path, leaves_at: str) -> None:
    with short_folder() as folder:
        settings = made(folder, deadline_seconds=4.0 if leaves_at else 20.0)
        with running(folder, settings):
            people = [
                Person(tmp_path / str(n), enrolled(folder, settings, str(n)), n, leaves_at if n == 0 else "")
                for n in range(N)
            ]
            for one in people:
                one.start()
            pool = GatewayPool(folder)
            request = CensusRequest(window=WINDOW, catalog_digest=CATALOG.digest()).to_bytes()
            while (present := Census.from_bytes(pool.answer("census", request)).n_clients) < N:
                pass
            got = summed(pool, present)
            for one in people:
                one.over = True
            for one in people:
                one.join(30)
    expected = np.zeros(N_ITEMS)
    there = range(1, N) if leaves_at == "mask" else range(N)
    for n in there:
        expected[[int(item[1:]) for item in set(history(n))]] += 1
    np.testing.assert_allclose(got.sums["counts"], expected, atol=0.05)
    assert got.n_clients == len(there)
    last = people[-1]
    assert [line["verb"] for line in last.log if "verb" in line] == ["advertise", "share", "mask", "unmask"]
    assert (last.spent, last.refused) == (1.0, [])


def terms(**changes: Any) -> Terms:
    said: dict[str, Any] = {"noise": "system", "minimum": 5} | changes
    settings = SecureSum(minimum=said["minimum"], neighbours=6)
    return agree_on("0" * 32, 0, 2, settings, N, (("counts", (N_ITEMS,)),), CLIP, 1.0, said["noise"])


def begun(one: Device, agreed: Terms) -> bytes:
    asked = AdvertiseRequest(agreed.session, agreed, np.zeros(1, np.int64), np.zeros(1, np.int64)).to_bytes()
    return asked_of(one, "advertise", asked, b"")


def asked_of(one: Device, verb: Verb, document: bytes, plan: bytes) -> bytes:
    answerer = Answerer(one.store, one.pool, one.trusted, one.limits)
    found = answerer.answer(verb, document, plan, one.store._now())
    found.keep(one.store, "task", verb)
    return found.document


def masked_device(folder: Path) -> Device:
    from fedrec.server.device_release import first_release

    return Device(folder, release=first_release(CATALOG, SERVER), trusted=[public_key(SERVER)], limits=LIMITS)


def test_weak_terms_are_refused_before_a_key_is_made(tmp_path: Path) -> None:
    with masked_device(tmp_path) as one:
        with pytest.raises(PlanRefused, match="noise from a seed"):
            begun(one, terms(noise="seed"))
        with pytest.raises(PlanRefused, match="may be opened for 3 people"):
            begun(one, terms(minimum=3))
        assert one.sent() == []


def test_a_plan_that_was_signed_for_another_sum_or_for_none_is_refused(tmp_path: Path) -> None:
    with masked_device(tmp_path) as one:
        begun(one, terms())
        promised = Promised(
            ledger="main", cohort_minimum=5, epsilon=1.0, delta=1e-6, expires_at=1 << 40, nonce="0" * 32
        )
        plan = plan_for(np.zeros(1, np.int64)).to_bytes()
        with pytest.raises(PlanRefused, match="signed for other terms"):
            asked_of(one, "mask", b"", sign("plan", plan, SERVER, promised))
        with pytest.raises(PlanRefused, match="not masked, and this device takes part in masked ones only"):
            asked_of(one, "run", b"", sign("plan", plan, SERVER, promised))


def test_the_server_cannot_repeat_a_session_or_skip_its_beginning(tmp_path: Path) -> None:
    with masked_device(tmp_path) as one:
        begun(one, terms())
        with pytest.raises(MaskingError, match="was held before"):
            begun(one, terms())
    with pytest.raises(MaskingError, match="not begun here"):
        cut("share", wire.pack("secure-share-request", {}, {}), None)
