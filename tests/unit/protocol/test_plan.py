"""Plans and censuses: exact round trips, and a `ProtocolError` for whatever is malformed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrec.data.slices import LastWindow, TimeWindow
from fedrec.errors import ProtocolError
from fedrec.models.configs import AnyModelConfig, FactorisationConfig, FullSoftmax, PopularityConfig, TransformerConfig
from fedrec.params import Params, digest
from fedrec.protocol import wire
from fedrec.protocol.plan import Census, CensusRequest, RoundPlan
from fedrec.protocol.task import AnyTask, CountTask, EvaluateTask, FitTask, LocalTraining
from fedrec.random import Key

FIT = FitTask(window=TimeWindow(start=5, end=9), local=LocalTraining(steps=3))
PLAN = RoundPlan(
    slice=2,
    round=41,
    task=FIT,
    model=TransformerConfig(softmax=FullSoftmax()),
    n_items=7,
    params={"item": np.arange(14, dtype=np.float32).reshape(7, 2), "bias": np.array(1.5, np.float32)},
    key=Key.from_seed(1),
    catalog_digest="abc",
    slots=np.array([3, 0, 8]),
    inputs={"popularity": np.arange(7, dtype=np.float32), "item": np.ones(1)},
)
DOCUMENT = PLAN.to_bytes()


def assert_same(one: RoundPlan, other: RoundPlan) -> None:
    def plain(plan: RoundPlan) -> dict[str, Any]:
        tensors: dict[str, Params] = {"params": plan.params, "inputs": plan.inputs, "slots": {"": plan.slots}}
        return {**vars(plan), **{name: digest(value) for name, value in tensors.items()}, "_header": None}

    assert plain(one) == plain(other)


def malformed(match: str, tensors: Params | None = None, **changes: Any) -> None:
    header, found = wire.unpack("plan", DOCUMENT)
    header = {name: value for name, value in {**header, **changes}.items() if value is not None}
    with pytest.raises(ProtocolError, match=match):
        RoundPlan.from_bytes(wire.pack("plan", header, found if tensors is None else tensors))


def test_a_plan_goes_there_and_back() -> None:
    assert_same(RoundPlan.from_bytes(DOCUMENT), PLAN)
    assert RoundPlan.from_bytes(DOCUMENT).to_bytes() == DOCUMENT


@pytest.mark.parametrize("model", [PopularityConfig(), FactorisationConfig(dim=3), TransformerConfig(dropout=0.0)])
@pytest.mark.parametrize(
    "task",
    [
        FIT,
        CountTask(window=LastWindow(skip=1, take=2), clip_norm=3.0),
        EvaluateTask(window=LastWindow(skip=0), n_known_items=5, ks=(1, 3), probes=4, personalise=FIT),
    ],
)
def test_every_task_and_model_travels(task: AnyTask, model: AnyModelConfig) -> None:
    plan = replace(PLAN, task=task, model=model, params={}, inputs={}, slots=np.array([], np.int64))
    back = RoundPlan.from_bytes(plan.to_bytes())
    assert_same(back, plan)
    assert (type(back.task), type(back.model)) == (type(task), type(model))


def test_an_unknown_task_is_refused_and_named() -> None:
    malformed(r"The plan is malformed: (.|\n)*task(.|\n)*'dream'", task={"kind": "dream"})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"task": {"kind": "fit"}}, "window"),
        ({"task": {"kind": "fit", "window": {"kind": "last", "skip": -1}}}, "greater than or equal to 0"),
        ({"task": {"kind": "count", "window": {"kind": "last", "skip": 0}, "speed": 1}}, "speed"),
        ({"model": {"kind": "oracle"}}, "oracle"),
        ({"n_items": 0}, "n_items"),
        ({"key": "not a key"}, "hexadecimal"),
        ({"key": "00" * 70}, "32 bytes"),
        ({"round": None}, "round"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_malformed_header_is_refused(changes: dict[str, Any], match: str) -> None:
    malformed(rf"The plan is malformed: (.|\n)*{match}", **changes)


@pytest.mark.parametrize("slots", [np.zeros((2, 2), np.int64), np.array([0.0]), np.array(1), np.array([1], np.int32)])
def test_slots_that_are_no_list_of_numbers_are_refused(slots: np.ndarray) -> None:
    malformed("its slots are .*, not int64", tensors={"slots": slots})


def test_a_plan_without_slots_is_refused() -> None:
    malformed("slots", tensors={})


def test_another_document_is_no_plan() -> None:
    with pytest.raises(ProtocolError, match="Expected a 'plan' document, got a 'census'"):
        RoundPlan.from_bytes(Census(node="a", n_clients=1).to_bytes())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(DOCUMENT) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_random_corruption_raises_nothing_but_protocol_errors(changes: list[tuple[int, int]]) -> None:
    document = bytearray(DOCUMENT)
    for place, value in changes:
        document[place] = value
    try:
        plan = RoundPlan.from_bytes(bytes(document))
    except ProtocolError:
        return
    assert plan.slots.dtype == np.int64
    assert plan.n_items >= 1


def test_a_census_goes_there_and_back() -> None:
    request = CensusRequest(window=TimeWindow(start=1, end=2), catalog_digest="abc")
    assert CensusRequest.from_bytes(request.to_bytes()) == request
    census = Census(node="hospital é", n_clients=12)
    assert Census.from_bytes(census.to_bytes()) == census


def test_a_malformed_census_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"The census is malformed: (.|\n)*n_clients"):
        Census.from_bytes(wire.pack("census", {"node": "a", "n_clients": -1}, {}))
    with pytest.raises(ProtocolError, match=r"The census request is malformed: (.|\n)*window"):
        CensusRequest.from_bytes(wire.pack("census-request", {"catalog_digest": "abc"}, {}))
    with pytest.raises(ProtocolError, match="Expected a 'census'"):
        Census.from_bytes(DOCUMENT)
