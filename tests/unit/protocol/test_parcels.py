"""Named tensors: equal tensors have one name, a name binds every bit, and a list of what is missing is bounded."""

from __future__ import annotations

import gc
import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedrec.data.slices import LastWindow
from fedrec.errors import ProtocolError, TensorsMissing
from fedrec.models.configs import FeatureSettings, FullSoftmax, TextTransformerConfig
from fedrec.params import digest
from fedrec.protocol import parcels, wire
from fedrec.protocol.codec import Float
from fedrec.protocol.parcels import Freight, Missing, check_parcel, tensor_of
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import FitTask, LocalTraining
from fedrec.random import Key

TABLE = Key.from_seed(1).numpy().standard_normal((400, 6)).astype(np.float32)
MODEL = TextTransformerConfig(
    dim=8, length=8, residual=2, lora=2, train="adapters", features=FeatureSettings(rank=6, fourier=0),
    softmax=FullSoftmax(),
)  # fmt: skip


def plan_of(**changes: Any) -> RoundPlan:
    made = RoundPlan(
        slice=0,
        round=4,
        task=FitTask(window=LastWindow(skip=1), local=LocalTraining()),
        model=MODEL,
        n_items=400,
        params={"text": TABLE, "position": TABLE[:9], "residual": np.repeat(TABLE, 2, axis=0)},
        key=Key.from_seed(3),
        catalog_digest="c" * 64,
        slots=np.arange(3),
        inputs={"teacher/residual": 2 * TABLE, "frequent": np.ones(8192, np.uint8)},
    )
    return replace(made, **changes)


def tensors(plan: RoundPlan) -> tuple[str, str]:
    return digest(plan.params), digest(plan.inputs)


def test_what_stays_the_same_and_is_large_is_named_the_rest_is_carried() -> None:
    freight = Freight()
    document = plan_of().to_bytes(freight)
    outline, named = RoundPlan.outline(document)
    assert sorted(named) == ["input/teacher/residual", "model/text"]
    assert set(outline.params) == {"position", "residual"}
    assert set(outline.inputs) == {"frequent"}
    assert {one.sha256 for one in named.values()} == freight.parcels.keys()
    for one in named.values():
        parcel = freight.get(one.sha256)
        assert parcel is not None
        assert (hashlib.sha256(parcel).hexdigest(), len(parcel)) == (one.sha256, one.size)
    assert len(document) < len(plan_of().to_bytes()) - TABLE.nbytes


@pytest.mark.parametrize("download", ["float32", "float16", "bfloat16"])
def test_a_tensor_has_the_same_bits_whether_it_comes_in_the_plan_or_beside_it(download: Float) -> None:
    asked, freight = plan_of(download=download), Freight()
    whole = RoundPlan.from_bytes(asked.to_bytes())
    joined = RoundPlan.from_bytes(asked.to_bytes(freight), freight.get)
    assert tensors(joined) == tensors(whole)
    assert joined.digest == whole.digest
    assert joined.params["text"].dtype == np.float32
    assert (digest(joined.params) == digest(asked.params)) is (download == "float32")


def test_equal_tensors_have_one_name_and_each_kind_of_download_its_own() -> None:
    names = {}
    for form in ("float32", "float16", "bfloat16"):
        one, other = Freight(), Freight()
        assert one.load(TABLE, form) == other.load(TABLE.copy(), form)
        names[form] = next(iter(one.parcels))
    assert len(set(names.values())) == 3
    changed = TABLE.copy()
    changed[-1, -1] = np.nextafter(changed[-1, -1], np.float32(9))
    assert Freight().load(changed, "float32").sha256 != names["float32"]
    assert Freight().load(TABLE.reshape(6, 400), "float32").sha256 != names["float32"]


def test_the_name_of_a_plan_binds_what_it_names() -> None:
    changed = TABLE.copy()
    changed[0, 0] += 1
    other = plan_of(params={**plan_of().params, "text": changed})
    assert other.digest != plan_of().digest
    assert other.to_bytes(Freight()) != plan_of().to_bytes(Freight())


def test_a_large_tensor_is_packed_once_for_its_name_and_forgotten_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    real = wire.pack

    def counting(kind: str, *arguments: Any) -> bytes:
        packed.append(kind == "parcel")
        return real(kind, *arguments)

    monkeypatch.setattr(wire, "pack", counting)
    table = TABLE + 1
    asked = plan_of(params={"text": table}, inputs={})
    for _ in range(5):
        asked.to_bytes(Freight())
    assert sum(packed) == 1
    known = len(parcels._NAMES._known)
    del asked, table
    gc.collect()
    assert len(parcels._NAMES._known) == known - 1


def test_a_receiver_that_lacks_tensors_says_which() -> None:
    freight = Freight()
    document = plan_of().to_bytes(freight)
    with pytest.raises(TensorsMissing) as error:
        RoundPlan.from_bytes(document)
    assert set(error.value.digests) == freight.parcels.keys()
    [first, second] = sorted(freight.parcels)
    with pytest.raises(TensorsMissing) as error:
        RoundPlan.from_bytes(document, lambda sha256: freight.get(sha256) if sha256 == first else None)
    assert error.value.digests == (second,)
    answer = Missing(digests=error.value.digests)
    assert Missing.from_bytes(answer.to_bytes()) == answer
    assert Missing.from_bytes(document) is None
    assert Missing.from_bytes(answer.to_bytes() + bytes(parcels.MOST_ANSWER)) is None, "it is not even read"
    assert len(Missing(digests=("0" * 64,) * parcels.MOST_NAMED).to_bytes()) < parcels.MOST_ANSWER


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"named": {"model/text": {"sha256": "0" * 63, "size": 9}}}, "sha256"),
        ({"named": {"model/text": {"sha256": "0" * 64, "size": 0}}}, "size"),
        ({"named": {"weights": {"sha256": "0" * 64, "size": 9}}}, "nobody knows what its tensor 'weights' is for"),
        ({"named": {"model/position": {"sha256": "0" * 64, "size": 9}}}, "it carries 'model/position' and names it"),
        ({"named": ["model/text"]}, "named"),
    ],
)
def test_names_that_make_no_sense_are_refused(change: dict[str, Any], match: str) -> None:
    header, found = wire.unpack("plan", plan_of().to_bytes(Freight()))
    with pytest.raises(ProtocolError, match=rf"The plan is malformed: (.|\n)*{match}"):
        RoundPlan.from_bytes(wire.pack("plan", header | change, found))


def test_bytes_that_are_not_what_their_name_says_are_refused_in_one_sentence() -> None:
    freight = Freight()
    sha256 = freight.load(TABLE, "float32").sha256
    parcel = freight.get(sha256)
    assert parcel is not None
    check_parcel(sha256, parcel)
    wrong = bytes([parcel[0] ^ 1]) + parcel[1:]
    with pytest.raises(ProtocolError, match=f"The tensor sent as {sha256[:12]} is .* it was changed"):
        check_parcel(sha256, wrong)


def test_a_parcel_is_one_tensor() -> None:
    two = wire.pack("parcel", {}, {"tensor": TABLE, "other": TABLE})
    with pytest.raises(ProtocolError, match="something else than one tensor"):
        tensor_of(two)
    with pytest.raises(ProtocolError, match="Expected a 'parcel' document"):
        tensor_of(wire.pack("greeting", {}, {"tensor": TABLE}))


@pytest.mark.parametrize("digests", [[], ["0" * 64] * (parcels.MOST_NAMED + 1), "0" * 64])
def test_a_list_of_missing_tensors_is_bounded(digests: Any) -> None:
    with pytest.raises(ProtocolError, match="The list of missing tensors is malformed"):
        Missing.from_bytes(wire.pack("missing", {"digests": digests}, {}))
