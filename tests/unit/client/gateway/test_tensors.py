"""What a plan names a device fetches from its gateway once; what it holds already it does not fetch at all."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.client.device_pool import DevicePool
from fedrec.client.gateway.control import GatewayPool
from fedrec.client.gateway_client import GatewayClient, Given
from fedrec.client.sdk import Device, Limits
from fedrec.client.shelf import FOLDER
from fedrec.data.slices import LastWindow
from fedrec.errors import GatewayError
from fedrec.models.build import build
from fedrec.models.configs import FeatureSettings, FullSoftmax, TextTransformerConfig
from fedrec.models.freeze import trainable
from fedrec.models.recommender import get_params
from fedrec.params import Params
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.settings import SecureSum
from fedrec.protocol.parcels import LEAST_BYTES, Freight, Missing
from fedrec.protocol.plan import Census, CensusRequest, RoundPlan
from fedrec.protocol.signing import DeviceRelease, Terms, sign
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import AnyTask, CountTask, FitTask, LocalTraining
from fedrec.random import Key
from fedrec.server.gather import Ask, Roster
from fedrec.server.secure import secure_gather
from fedrec.server.signed import Promise, SignedLink
from tests.fleet import (
    ANYWHERE,
    CATALOG,
    N_ITEMS,
    OPEN,
    SERVER,
    PoolLink,
    device,
    enrolled,
    made,
    running,
    short_folder,
)

WINDOW = LastWindow(skip=0)
N = 3
COUNT = CountTask(window=WINDOW, clip_norm=2.0)
FIT = FitTask(window=WINDOW, local=LocalTraining(learning_rate=0.3, clip_norm=1.0))
MODEL = TextTransformerConfig(
    dim=32, heads=2, expand=2, blocks=1, length=8, residual=2, lora=2, train="adapters", dropout=0.0,
    features=FeatureSettings(rank=4, fourier=0), softmax=FullSoftmax(),
)  # fmt: skip
FRESH = get_params(build(MODEL, N_ITEMS, Key.from_seed(2)))
PARAMS: Params = {n: v if trainable(MODEL, [n]) else Key.from_seed(3).child(n).numpy().standard_normal(v.shape).astype(
    np.float32) for n, v in FRESH.items()}  # fmt: skip
NAMED = {n for n, v in PARAMS.items() if not trainable(MODEL, [n]) and v.nbytes >= LEAST_BYTES}


def plan_for(task: AnyTask, number: int = 0, **changes: Any) -> Callable[[Any], RoundPlan]:
    def plan(slots: Any) -> RoundPlan:
        plain = RoundPlan(0, number, task, MODEL, N_ITEMS, PARAMS, Key.from_seed(1), CATALOG.digest(), slots)
        return replace(plain, **changes)

    return plan


def question(task: AnyTask, n: int, number: int = 0, **changes: Any) -> tuple[bytes, dict[str, bytes]]:
    """Return a signed plan and the parcels that go with it."""
    freight = Freight()
    document = plan_for(task, number, **changes)(np.arange(n, dtype=np.int64)).to_bytes(freight)
    said = {"ledger": "main", "cohort_minimum": 1, "epsilon": None, "expires_at": int(time.time()) + 60,
            "nonce": os.urandom(16).hex()}  # fmt: skip
    parcels = {sha256: freight.get(sha256) or b"" for sha256 in freight.parcels}
    return sign("plan", document, SERVER, Terms.model_validate(said)), parcels


class Asked(threading.Thread):
    """The server's side: asks the gateway, in a thread, and keeps the answer."""

    def __init__(self, folder: Path, document: bytes, parcels: Mapping[str, bytes]) -> None:
        super().__init__(daemon=True)
        self.asked, self.answer = (folder, document, parcels), b""
        self.start()

    def run(self) -> None:
        folder, document, parcels = self.asked
        self.answer = GatewayPool(folder).answer("run", document, parcels)

    def tally(self) -> Tally:
        self.join(60)
        return Tally.from_bytes(self.answer)


class Fleet:
    """A gateway and some devices that are there, with what each of them downloaded."""

    def __init__(self, folder: Path, devices: list[Device], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.devices = folder, devices
        self.downloads: list[str] = []
        real = GatewayClient.download

        def download(client: GatewayClient, blob: Given, most_bytes: int) -> bytes:
            self.downloads.append(blob.sha256)
            return real(client, blob, most_bytes)

        monkeypatch.setattr(GatewayClient, "download", download)

    def present(self) -> int:
        for one in self.devices:
            one.participate(ANYWHERE, wait_seconds=0)
        request = CensusRequest(window=WINDOW, catalog_digest=CATALOG.digest())
        return Census.from_bytes(GatewayPool(self.folder).answer("census", request.to_bytes())).n_clients

    def round(self, task: AnyTask, number: int = 0, **changes: Any) -> tuple[Tally, list[str]]:
        """Ask everybody; return the sum, and which tensors were downloaded."""
        document, parcels = question(task, len(self.devices), number, **changes)
        self.downloads.clear()
        asked = Asked(self.folder, document, parcels)
        assert [one.participate(ANYWHERE).outcome for one in self.devices] == ["answered"] * len(self.devices)
        return asked.tally(), [sha256 for sha256 in self.downloads if sha256 in parcels]


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    with ExitStack() as stack:
        folder = stack.enter_context(short_folder())
        settings = made(folder)
        stack.enter_context(running(folder, settings))
        devices = [
            stack.enter_context(device(tmp_path / str(n), enrolled(folder, settings, str(n)), n)) for n in range(N)
        ]
        found = Fleet(folder, devices, monkeypatch)
        assert found.present() == N
        yield found


def test_devices_fit_as_one_node_would_and_fetch_what_is_frozen_once(fleet: Fleet) -> None:
    assert len(NAMED) >= 4
    pool = DevicePool([one.store for one in fleet.devices], CATALOG)
    for number in range(2):
        tally, fetched = fleet.round(FIT, number)
        assert len(fetched) == (N * len(NAMED) if number == 0 else 0)
        plain = pool.run(plan_for(FIT, number)(np.arange(N, dtype=np.int64)))
        assert tally.n_clients == plain.n_clients == N
        for name, value in plain.sums.items():
            np.testing.assert_allclose(tally.sums[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
        assert max(float(np.abs(value).max()) for value in plain.sums.values()) > 0.01
    for one in fleet.devices:
        assert len(list((one.store.folder / FOLDER).iterdir())) == len(NAMED)
        one.forget_everything()
        assert not (one.store.folder / FOLDER).exists()


def test_a_gateway_that_lacks_tensors_says_which_before_it_asks_anybody(fleet: Fleet) -> None:
    document, parcels = question(COUNT, N)
    some = dict(list(parcels.items())[1:])
    missing = Missing.from_bytes(GatewayPool(fleet.folder).answer("run", document, some))
    assert missing is not None
    assert set(missing.digests) == parcels.keys() - some.keys()
    assert GatewayPool(fleet.folder).status()["rounds"] == []
    tally, _ = fleet.round(COUNT)
    assert tally.n_clients == N
    asked = Asked(fleet.folder, question(COUNT, N)[0], {})  # now it holds them
    assert [one.participate(ANYWHERE).outcome for one in fleet.devices] == ["answered"] * N
    assert asked.tally().n_clients == N


def test_a_gateway_refuses_a_poisoned_tensor_and_keeps_none_that_no_plan_names(fleet: Fleet) -> None:
    document, parcels = question(COUNT, N)
    first = min(parcels)
    with pytest.raises(GatewayError, match=f"The tensor sent as {first[:12]} is .* it was changed"):
        GatewayPool(fleet.folder).answer("run", document, {**parcels, first: parcels[first][:-1] + b"!"})
    assert not (fleet.folder / FOLDER / first).exists()
    assert Missing.from_bytes(GatewayPool(fleet.folder).answer("run", document, {"../escape": b"x"})) is not None
    assert not (fleet.folder / "escape").exists()


def test_what_the_installed_release_holds_is_not_fetched(fleet: Fleet) -> None:
    name = min(NAMED)
    made_of = {**PARAMS, name: PARAMS[name] + 1}
    envelope = sign("release", DeviceRelease(4, MODEL, dict(made_of), CATALOG).to_bytes(), SERVER)
    fleet.devices[0].adopt(envelope)
    fleet.round(COUNT)
    kept = [len(list((one.store.folder / FOLDER).glob("*"))) for one in fleet.devices]
    assert kept == [1, len(NAMED), len(NAMED)]
    _, fetched = fleet.round(COUNT, 1, inputs={f"teacher/{name}": made_of[name]})  # a teacher is a release
    assert len(fetched) == N - 1
    _, fetched = fleet.round(COUNT, 2, download="bfloat16")  # rounded, they are other tensors
    assert len(fetched) == 1 + (N - 1) * len(NAMED)


def test_a_device_fetches_nothing_for_a_plan_that_it_refuses(fleet: Fleet) -> None:
    one = fleet.devices[0]
    for limits, why in (
        (Limits(cohort_minimum=20, epsilon=None), "hides among at least 20"),
        (OPEN.model_copy(update={"most_bytes": 20_000}), "more than the 20,000 of the limits"),
    ):
        one.limits = limits
        document, parcels = question(COUNT, 1)
        fleet.downloads.clear()
        asked = Asked(fleet.folder, document, parcels)
        came = one.participate(ANYWHERE)
        assert (came.outcome, why in came.why) == ("refused", True), came.why
        assert asked.tally().n_clients == 0
        assert not parcels.keys() & set(fleet.downloads)


def test_a_device_keeps_no_more_than_its_limit(fleet: Fleet) -> None:
    one = fleet.devices[0]
    one.limits = OPEN.model_copy(update={"most_kept_bytes": 9000})
    for number in range(2):
        tally, fetched = fleet.round(COUNT, number)
        assert tally.n_clients == N
        assert len(fetched) == (N if number == 0 else 1) * len(NAMED)
        assert sum(path.stat().st_size for path in (one.store.folder / FOLDER).iterdir()) <= 9000


def test_tensors_are_given_to_devices_of_an_open_task_alone(fleet: Fleet) -> None:
    document, parcels = question(COUNT, 1)
    asked = Asked(fleet.folder, document, parcels)
    sha256, parcel = next(iter(parcels.items()))
    found = []
    for one in fleet.devices[:2]:
        enrolment = one.enrolment
        client = GatewayClient(enrolment.address, enrolment.root_certificates.encode(), enrolment.token)
        if one is fleet.devices[0]:
            while not GatewayPool(fleet.folder).status()["open"]:
                time.sleep(0.05)
            found.append(client.download(Given(sha256, len(parcel)), 1 << 20))
        else:
            with pytest.raises(GatewayError, match="There is no such document for this device"):
                client.download(Given(sha256, len(parcel)), 1 << 20)
        client.close()
    assert found == [parcel]
    assert fleet.devices[0].participate(ANYWHERE).outcome == "answered"
    asked.tally()


def test_masked_sums_name_tensors_too(fleet: Fleet, tmp_path: Path) -> None:
    limits = Limits(cohort_minimum=N, epsilon=10.0, delta=0.1, masked=True)
    over = threading.Event()

    def take_part(folder: Path) -> None:
        with Device(folder, limits=limits, senses=lambda: ANYWHERE) as one:
            while not over.is_set():
                one.participate(ANYWHERE, wait_seconds=1.0, patience_seconds=20.0)

    folders = [one.store.folder for one in fleet.devices]
    for one in fleet.devices:
        one.close()
    people = [threading.Thread(target=take_part, args=(folder,), daemon=True) for folder in folders]
    for person in people:
        person.start()
    link = SignedLink(PoolLink({7: GatewayPool(fleet.folder)}), SERVER, lambda: Promise("main", N, 1.0, 1e-6))
    mechanism = GaussianMechanism(2.0, 1e-4)
    charge = PrivacyLedger(None, epsilon=None, delta=1e-5).charge("sum", mechanism.event(1.0), clip_norm=2.0)
    ask = Ask(
        link, Roster(((7, "gateway", N),)), plan_for(COUNT, 2), {"counts": ((N_ITEMS,), np.dtype(np.float32))}, 30.0
    )
    try:
        got = secure_gather(ask, ask.everybody, mechanism, charge, SecureSum(minimum=N, neighbours=2, dropouts=0.0))
    finally:
        over.set()
        for person in people:
            person.join(30)
    assert (got.n_clients, got.refused) == (N, ())
    with ExitStack() as stack:
        stores = [stack.enter_context(Device(folder)).store for folder in folders]
        plain = DevicePool(stores, CATALOG).run(plan_for(COUNT, 2)(np.arange(N, dtype=np.int64)))
    np.testing.assert_allclose(got.sums["counts"], plain.sums["counts"], atol=0.05)
    assert all(len(list((folder / FOLDER).iterdir())) == len(NAMED) for folder in folders)
