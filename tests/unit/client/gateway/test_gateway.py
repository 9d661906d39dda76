"""A gateway over real gRPC and TLS on loopback, in this process; devices in threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fedrec.client.gateway.control import GatewayPool
from fedrec.client.gateway.devices import Devices
from fedrec.client.gateway.settings import Bounds, GatewaySettings
from fedrec.client.gateway_client import SERVICE, GatewayClient, GatewayUnavailable
from fedrec.client.keeping import Unsent, kept_unsent
from fedrec.client.sdk import Enrolment
from fedrec.data.slices import LastWindow
from fedrec.errors import GatewayError
from fedrec.models.configs import PopularityConfig
from fedrec.protocol.gateway.v1 import gateway_pb2 as messages
from fedrec.protocol.plan import Census, CensusRequest, RoundPlan
from fedrec.protocol.signing import Terms, sign
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import CountTask
from fedrec.random import Key
from tests.fleet import (
    ALWAYS,
    ANYWHERE,
    CATALOG,
    N_ITEMS,
    SERVER,
    device,
    enrolled,
    history,
    made,
    running,
    short_folder,
)

WINDOW = LastWindow(skip=0)
NOW = int(datetime.now(UTC).timestamp())


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


def census(folder: Path) -> int:
    request = CensusRequest(window=WINDOW, catalog_digest=CATALOG.digest())
    return Census.from_bytes(GatewayPool(folder).answer("census", request.to_bytes())).n_clients


def envelope(n: int, round_number: int = 0, seconds: int = 20, **changes: Any) -> bytes:
    task = CountTask(window=WINDOW)
    slots = np.arange(n, dtype=np.int64)
    plan = RoundPlan(0, round_number, task, PopularityConfig(), N_ITEMS, {}, Key.from_seed(1), CATALOG.digest(), slots)
    terms = Terms(
        ledger="main", cohort_minimum=1, epsilon=None, expires_at=int(datetime.now(UTC).timestamp()) + seconds,
        nonce=os.urandom(16).hex(),
    )  # fmt: skip
    return sign("plan", replace(plan, **changes).to_bytes(), SERVER, terms)


class Asked(threading.Thread):
    """The server's side: asks the gateway, in a thread, and keeps the answer."""

    def __init__(self, folder: Path, document: bytes) -> None:
        super().__init__(daemon=True)
        self.folder, self.document = folder, document
        self.tally: Tally | None = None
        self.error = ""
        self.start()

    def run(self) -> None:
        try:
            self.tally = Tally.from_bytes(GatewayPool(self.folder).answer("run", self.document))
        except GatewayError as error:
            self.error = str(error)

    def result(self) -> Tally:
        self.join(40)
        assert self.tally is not None, self.error
        return self.tally


def client_of(enrolment: Enrolment) -> GatewayClient:
    return GatewayClient(enrolment.address, enrolment.root_certificates.encode(), enrolment.token)


def assigned(client: GatewayClient, kinds: tuple[str, ...] = ("count",)) -> Any:
    found = client.check_in(ALWAYS, kinds, 10.0).assignment
    assert found is not None
    return found


def document(numbers: list[int]) -> bytes:
    counts = np.zeros(N_ITEMS, np.float32)
    counts[numbers] = 1
    return Tally({"counts": counts}, 1, {"clipped": 0.0}).to_bytes()


def test_devices_count_through_a_gateway(folder: Path, tmp_path: Path) -> None:
    settings = made(folder)
    with running(folder, settings):
        people = [device(tmp_path / str(n), enrolled(folder, settings, str(n)), n) for n in range(3)]
        assert census(folder) == 0, "nobody was seen yet"
        assert [one.participate(ANYWHERE, wait_seconds=0).outcome for one in people] == ["nothing"] * 3
        assert people[0].release.version == 0
        assert census(folder) == 3
        asked = Asked(folder, envelope(3))
        assert [one.participate(ANYWHERE).outcome for one in people] == ["answered"] * 3
        tally = asked.result()
        expected = np.zeros(N_ITEMS)
        for n in range(3):
            expected[[int(item[1:]) for item in set(history(n))]] += 1
        assert (tally.n_clients, tally.sums["counts"].tolist()) == (3, expected.tolist())
        assert [line["what"] for line in people[0].sent()] == ["check-in", "count"]
        status = GatewayPool(folder).status()
        assert (status["seen"], status["uploads"], status["spool_bytes"], status["open"]) == (3, 3, 0, [])
        assert list((folder / "spool").iterdir()) == []
        for one in people:
            assert kept_unsent(one.store) is None
            one.close()


def test_a_straggler_is_left_out_at_the_deadline_and_a_refusal_ends_the_wait(folder: Path, tmp_path: Path) -> None:
    settings = made(folder, deadline_seconds=3.0)
    with running(folder, settings):
        people = [device(tmp_path / str(n), enrolled(folder, settings, str(n)), n) for n in range(3)]
        for one in people:
            one.participate(ANYWHERE, wait_seconds=0)
        assert census(folder) == 3
        asked = Asked(folder, envelope(3))
        assert people[0].participate(ANYWHERE).outcome == "answered"
        assert asked.result().n_clients == 1
        asked = Asked(folder, envelope(1, catalog_digest="f" * 64))
        came = people[0].participate(ANYWHERE)
        assert came.outcome == "refused"
        assert "which this device does not know" in came.why
        assert people[0].refused()[0]["why"] == came.why
        asked.join(2.5)
        assert not asked.is_alive(), "declined, so nobody is waited for"
        for one in people:
            one.close()


def test_an_upload_goes_on_where_it_stopped(folder: Path) -> None:
    settings = made(folder)
    with running(folder, settings):
        client = client_of(enrolled(folder, settings, "a"))
        client.check_in(ALWAYS, [], 0)
        assert census(folder) == 1
        big = 600_000
        asked = Asked(folder, envelope(1, params={"counts": np.zeros(big, np.float32)}, n_items=big))
        task = assigned(client)
        answer = Tally({"counts": np.ones(big, np.float32)}, 1, {}).to_bytes()
        unsent, sent = Unsent(task.task, "run", answer), []

        def break_off(data: bytes) -> bytes:
            if len(sent) == 3:
                raise RuntimeError
            sent.append(data)
            return data

        with pytest.raises(GatewayError):
            client.upload(unsent, break_off)
        state = client._unary("UploadStatus", messages.UploadStatusRequest(task=task.task), messages.UploadState)
        assert 0 < state.offset < len(answer)
        again: list[int] = []
        client.upload(unsent, lambda data: (again.append(len(data)), data)[1])
        assert sum(again) == len(answer) - state.offset
        assert asked.result().sums["counts"].sum() == big
        client.close()


def test_replays_duplicates_and_other_devices_tasks_are_refused(folder: Path) -> None:
    settings = made(folder)
    with running(folder, settings):
        own, other = (client_of(enrolled(folder, settings, name)) for name in ("a", "b"))
        for client in (own, other):
            client.check_in(ALWAYS, [], 0)
        census(folder)
        asked = Asked(folder, envelope(2))
        task = assigned(own)
        with pytest.raises(GatewayError, match="given to another device"):
            other.upload(Unsent(task.task, "run", document([1])))
        with pytest.raises(GatewayError, match="given to another device"):
            other.decline(task.task)
        own.upload(Unsent(task.task, "run", document([1])))
        own.upload(Unsent(task.task, "run", document([1])))  # a duplicate is not sent again, and changes nothing
        with pytest.raises(GatewayError, match="answered before"):
            list(_raw_upload(own, task.task, document([2])))
        assert own.check_in(ALWAYS, ["count"], 0).assignment is None
        other.upload(Unsent(assigned(other).task, "run", document([1])))
        tally = asked.result()
        assert (tally.n_clients, tally.sums["counts"][1]) == (2, 2)
        with pytest.raises(GatewayError, match="its round is closed"):
            own.upload(Unsent(task.task, "run", document([3])))
        for client in (own, other):
            client.close()


def _raw_upload(client: GatewayClient, task: str, data: bytes, sha256: str = "", size: int | None = None) -> Any:
    unsent = Unsent(task, "run", data)
    header = messages.UploadHeader(
        task=task, sha256=sha256 or unsent.sha256, size=len(data) if size is None else size, offset=0
    )
    parts = [messages.UploadPart(header=header), messages.UploadPart(data=data)]
    call = client._channel.stream_unary(
        f"/{SERVICE}/Upload", messages.UploadPart.SerializeToString, messages.UploadState.FromString
    )
    try:
        yield call(iter(parts), timeout=10, metadata=client._metadata)
    except grpc.RpcError as error:
        client._fail(error)


def test_what_is_too_long_changed_or_not_asked_for_is_refused(folder: Path) -> None:
    settings = made(folder, bounds=Bounds(strikes=1))
    with running(folder, settings) as lines:
        client, honest = (client_of(enrolled(folder, settings, name)) for name in ("a", "b"))
        for one in (client, honest):
            one.check_in(ALWAYS, [], 0)
        assert census(folder) == 2
        asked = Asked(folder, envelope(2))
        task = assigned(client)
        with pytest.raises(GatewayError, match="at most"):
            list(_raw_upload(client, task.task, document([1]), size=10 << 30))
        with pytest.raises(GatewayError, match="another digest"):
            list(_raw_upload(client, task.task, document([1]), sha256="0" * 64))
        with pytest.raises(GatewayError, match="announced"):
            list(_raw_upload(client, task.task, document([1]), size=10))
        with pytest.raises(GatewayError, match="no such document"):
            client.download(replace(task.plan, sha256="1" * 64), 1 << 20)
        client.upload(
            Unsent(task.task, "run", Tally({"counts": np.full(N_ITEMS, np.nan, np.float32)}, 1, {}).to_bytes())
        )
        honest.upload(Unsent(assigned(honest).task, "run", document([4])))
        assert asked.result().sums["counts"].sum() == 1
        assert [line["why"] for line in lines if line["event"] == "answer refused"] == [
            "'counts' holds a NaN or an infinity"
        ]
        assert GatewayPool(folder).status()["quarantined"] == ["a"]
        assert census(folder) == 1, "who sends nonsense is asked no more"
        for one in (client, honest):
            one.close()


def test_strangers_revoked_devices_and_plain_text_are_refused(folder: Path) -> None:
    settings = made(folder, bounds=Bounds(calls_per_minute=10))
    with running(folder, settings):
        enrolment = enrolled(folder, settings, "a")
        stranger = client_of(enrolment.model_copy(update={"token": "x" * 43}))
        with pytest.raises(GatewayError, match="no device has this token"):
            stranger.check_in(ALWAYS, [], 0)
        client = client_of(enrolment)
        client.check_in(ALWAYS, [], 0)
        plain = grpc.insecure_channel(enrolment.address.replace("localhost", "127.0.0.1"))
        call = plain.unary_unary(f"/{SERVICE}/CheckIn", messages.CheckInRequest.SerializeToString)
        with pytest.raises(grpc.RpcError) as refused:
            call(messages.CheckInRequest(), timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        for _ in range(9):
            client.check_in(ALWAYS, [], 0)
        with pytest.raises(GatewayError, match="too many calls"):
            client.check_in(ALWAYS, [], 0)
        devices = Devices(folder)
        devices.revoke("a", NOW)
        devices.close()
        with pytest.raises(GatewayError, match="was revoked"):
            client.check_in(ALWAYS, [], 0)
        for one in (stranger, client):
            one.close()
        plain.close()


@pytest.mark.parametrize("how", ["expired", "another CA", "not there"])
def test_a_gateway_that_cannot_prove_who_it_is_gets_nothing(folder: Path, tmp_path: Path, how: str) -> None:
    past = datetime.now(UTC) - timedelta(days=60)
    settings = made(folder, certified=past if how == "expired" else None)
    enrolment = enrolled(folder, settings, "a")
    if how == "another CA":
        made(tmp_path / "other")
        roots = (tmp_path / "other" / "ca.crt").read_text()
        enrolment = enrolment.model_copy(update={"root_certificates": roots})
    why = "nobody listens" if how == "not there" else "certificate is expired, for another host, or not one"
    one = device(tmp_path / "device", enrolment, 0)
    if how == "not there":
        with pytest.raises(GatewayUnavailable, match=why):
            one.participate(ANYWHERE, wait_seconds=0)
    else:
        with running(folder, settings), pytest.raises(GatewayUnavailable, match=why):
            one.participate(ANYWHERE, wait_seconds=0)
    assert one.sent() == []
    one.close()


def test_plans_that_no_trusted_server_signed_do_not_reach_devices(folder: Path) -> None:
    settings = made(folder)
    with running(folder, settings):
        asked = Asked(folder, b"nonsense")
        asked.join(10)
        assert "is not signed" in asked.error
        asked = Asked(folder, envelope(1))
        asked.join(10)
        assert "take the census again" in asked.error


def test_tokens_are_kept_as_hashes_and_names_once(folder: Path) -> None:
    devices = Devices(folder)
    token = devices.add("a", NOW)
    assert token.encode() not in b"".join(path.read_bytes() for path in folder.iterdir())
    known = devices.holder(token)
    assert known is not None
    assert (known.name, known.revoked) == ("a", False)
    assert devices.holder(token[:-1]) is None
    devices.close()


def test_the_pace_spreads_devices_out(folder: Path) -> None:
    from fedrec.client.gateway.hall import Hall

    devices = Devices(folder)
    for n in range(100):
        devices.add(str(n), NOW)
    settings = GatewaySettings.model_validate({"pace": {"per_second": 2.0, "least_seconds": 1.0, "jitter": 0.2}})
    hall = Hall(folder, settings, devices)
    later = [hall._later() for _ in range(200)]
    assert 40 <= min(later) < 43
    assert 57 < max(later) <= 60
    devices.close()
