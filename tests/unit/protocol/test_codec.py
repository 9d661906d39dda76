"""Codecs number by number: rounding, scales, rows, hostile documents, and codecs in plans, experiments and runs."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.config import Experiment
from fedrec.data.slices import LastWindow
from fedrec.errors import ConfigError, ProtocolError, TallyRefused
from fedrec.models.configs import PopularityConfig
from fedrec.params import Params, digest, norm
from fedrec.protocol import wire
from fedrec.protocol.codec import AnyCodec, Coding, Half, LowRank, Plain, Quantised, Shapes, Sparse, from_half, to_half
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Expectation, Tally
from fedrec.protocol.task import CountTask, FitTask
from fedrec.random import Key
from fedrec.server.publish import PRIVACY, privacy
from tests.support import dataset_of, same_bytes, simulated, small_document, small_experiment, small_rows

KEY = Key.from_seed(9)
F32 = np.dtype(np.float32)
SHAPES: Shapes = {"item": ((4, 2), F32), "w": ((3,), F32)}
SUMS: Params = {
    "item": np.array([[0, 0], [1, -2], [0, 0], [0, 3]], np.float32),
    "w": np.array([0.5, 0, -0.25], np.float32),
}
LEVELS, SCALES, HALVES, ROWS = "codec:levels", "codec:scales", "codec:halves", "codec:rows:item"


def coding(codec: AnyCodec, n_items: int = 4) -> Coding:
    return Coding(codec, n_items, KEY)


def written(codec: AnyCodec) -> dict[str, Any]:
    return dict(coding(codec).encode(SUMS, "a"))


def refuse(codec: AnyCodec, tensors: Params, match: str, shapes: Shapes = SHAPES) -> None:
    document = wire.pack("tally", {"n_clients": 1, "stats": {}}, tensors)
    with pytest.raises(TallyRefused, match=match):
        Expectation(shapes, 1, 10.0).check(Tally.from_bytes(document, coding(codec), shapes))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_nearest_and_ties_go_to_even(dtype: Any) -> None:
    import torch

    draws = KEY.numpy()
    values = (draws.standard_normal(5000) * 10.0 ** draws.integers(-9, 4, 5000)).astype(np.float32)
    unit = 2.0**-11 if dtype == "float16" else 2.0**-8
    ties = np.array([1 + unit, 1 + 3 * unit, -1 - unit, 0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    values = np.concatenate([values, ties])
    wanted = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    found = from_half(to_half(values, dtype))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)  # torch is the oracle
    np.testing.assert_array_equal(from_half(to_half(found, dtype)), found)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_keep_shapes(dtype: Any) -> None:
    for shape in ((), (0,), (3, 0), (2, 3)):
        assert from_half(to_half(np.ones(shape, np.float32), dtype)).shape == shape


def test_a_float16_that_overflows_is_refused_by_the_server() -> None:
    sums = {**SUMS, "w": np.array([1e5, 0, 0], np.float32)}
    refuse(Half(dtype="float16"), coding(Half(dtype="float16")).encode(sums, "a"), "'w' holds a NaN or an infinity")


def test_eight_bits_lie_within_one_step_and_the_largest_is_kept() -> None:
    values = KEY.numpy().standard_normal(1000).astype(np.float32)
    found, _ = coding(Quantised(chunk=100)).decode(
        coding(Quantised(chunk=100)).encode({"w": values}, "a"), {"w": (values.shape, F32)}
    )
    blocks, errors = values.reshape(10, 100), np.abs(found["w"] - values).reshape(10, 100)
    assert (errors < np.abs(blocks).max(axis=1, keepdims=True) / 127 * (1 + 1e-5)).all()
    top = np.abs(blocks).argmax(axis=1)
    np.testing.assert_allclose(found["w"].reshape(10, 100)[range(10), top], blocks[range(10), top], rtol=1e-6)


def test_a_value_between_two_levels_goes_up_as_often_as_it_is_near() -> None:
    values = np.full(100_001, 0.3, np.float32)
    values[::100] = 127.0  # every chunk gets scale 1
    found = coding(Quantised(chunk=100)).encode({"w": values}, "a")[LEVELS]
    ups = found[values < 1]
    assert set(ups.tolist()) == {0, 1}
    assert ups.mean() == pytest.approx(0.3, abs=4 * np.sqrt(0.21 / len(ups)))


def test_scales_do_not_reach_from_tensor_to_tensor() -> None:
    found = written(Quantised())
    assert found[SCALES].tolist() == [np.float32(3) / np.float32(127), np.float32(0.5) / np.float32(127)]
    assert found[LEVELS].shape == (11,)


def test_rows_that_are_zero_stay_at_home_and_only_of_item_tables() -> None:
    found = written(Sparse())
    assert found[ROWS].dtype == np.int32
    assert found[ROWS].tolist() == [1, 3]
    assert found["item"].tolist() == [[1, -2], [0, 3]]
    assert found["w"].tolist() == [0.5, 0, -0.25]
    assert ROWS not in coding(Sparse(), n_items=5).encode(SUMS, "a")


def test_directions_are_orthogonal_shared_by_nodes_and_new_in_each_round() -> None:
    codec, table = LowRank(rank=4), {"item": np.eye(12, dtype=np.float32)}
    one = Coding(codec, 12, KEY).encode(table, "a")["item"]
    np.testing.assert_allclose(one.T @ one, np.eye(4) * 12 / 4, atol=1e-5)
    assert np.array_equal(one, Coding(codec, 12, KEY).encode(table, "b")["item"])
    assert not np.allclose(one, Coding(codec, 12, KEY.child(1)).encode(table, "a")["item"])


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (np.array([1, 4], np.int32), "do not rise from 0 to 3"),
        (np.array([-1, 3], np.int32), "do not rise"),
        (np.array([3, 1], np.int32), "do not rise"),
        (np.array([1, 1], np.int32), "do not rise"),
        (np.array([1, 2**31 - 1], np.int32), "do not rise"),
        (np.array([1, 3], np.int64), "missing or no list"),
        (np.array([[1, 3]], np.int32), "missing or no list"),
        (np.array(1, np.int32), "missing or no list"),
        (np.array([1], np.int32), r"'item' is float32\(2, 2\) where float32\(1, 2\)"),
        (np.array([], np.int32), r"'item' is float32\(2, 2\) where float32\(0, 2\)"),
        (np.array([0, 1, 2, 3, 4], np.int32), "do not rise"),
        (None, "missing or no list"),
    ],
)
def test_rows_out_of_range_or_order_are_refused(rows: Any, match: str) -> None:
    tensors = {**written(Sparse()), ROWS: rows}
    refuse(Sparse(), {name: value for name, value in tensors.items() if value is not None}, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({LEVELS: np.zeros(10, np.int8)}, r"'codec:levels' is int8\(10,\) where int8\(11,\)"),
        ({LEVELS: np.zeros(11, np.uint8)}, "'codec:levels' is uint8"),
        ({LEVELS: np.zeros((11, 1), np.int8)}, "'codec:levels' is int8"),
        ({SCALES: np.zeros(3, np.float32)}, "'codec:scales' is float32"),
        ({SCALES: np.array([np.nan, 1], np.float32)}, "levels or scales"),
        ({SCALES: np.array([np.inf, 1], np.float32)}, "levels or scales"),
        ({SCALES: np.array([-1, 1], np.float32)}, "levels or scales"),
        ({LEVELS: np.full(11, -128, np.int8)}, "levels or scales"),
        ({LEVELS: np.ones(11, np.int8)}, "larger than they need"),
        ({LEVELS: np.full(11, 127, np.int8), SCALES: np.full(2, 3e38, np.float32)}, "NaN or an infinity"),
        ({LEVELS: np.full(11, 127, np.int8), SCALES: np.full(2, 1, np.float32)}, "above the bound"),
        ({SCALES: None}, "missing or unknown: codec:scales"),
        ({"extra": np.zeros(1)}, "missing or unknown: extra"),
        ({"w": SUMS["w"]}, "missing or unknown: w"),
    ],
)
def test_eight_bits_that_are_not_as_asked_are_refused(changes: dict[str, Any], match: str) -> None:
    tensors = {**written(Quantised()), **changes}
    refuse(Quantised(), {name: value for name, value in tensors.items() if value is not None}, match)


def test_halves_of_another_kind_or_number_are_refused() -> None:
    refuse(Half(), {HALVES: np.zeros(11, np.float16)}, "where uint16")
    refuse(Half(dtype="float16"), {HALVES: np.zeros(11, np.uint16)}, "where float16")
    refuse(Half(), {HALVES: np.zeros(12, np.uint16)}, r"where uint16\(11,\)")
    refuse(Half(), {HALVES: np.full(11, 0x7F80, np.uint16)}, "NaN or an infinity")


def test_directions_of_another_width_are_refused() -> None:
    shapes: Shapes = {"item": ((4, 8), F32)}
    refuse(LowRank(rank=2), {"item": np.zeros((4, 8), np.float32)}, r"where float32\(4, 2\)", shapes)
    huge = {"item": np.full((4, 2), 3e38, np.float32)}
    refuse(LowRank(rank=2), huge, "NaN or an infinity", shapes)


@pytest.mark.parametrize("codec", [Half(), Quantised(), Sparse(values=Quantised()), LowRank(rank=4)])
def test_nothing_is_allocated_for_a_document_that_does_not_fit(codec: AnyCodec) -> None:
    shapes: Shapes = {"item": ((1_000_000, 64), F32)}  # 256 MB if it were
    small = Coding(codec, 4, KEY).encode({"item": SUMS["item"]}, "a")
    document = wire.pack("tally", {"n_clients": 1, "stats": {}}, small)
    tracemalloc.start()
    try:
        with pytest.raises(TallyRefused):
            Tally.from_bytes(document, Coding(codec, 1_000_000, KEY), shapes)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_liar_gains_no_more_than_the_documents_say() -> None:
    """Levels of 1 beside one of 126 hide the most; the least norm still grows with the scale."""
    chunk, bound = 512, 1.0
    worst = 0.0
    for level in range(12):
        levels = np.full(chunk, level + 1, np.int8)
        levels[0] = 126
        least = np.sqrt(np.square(levels.astype(float) - 1).sum())
        tensors = {LEVELS: levels, SCALES: np.array([bound / least], np.float32)}
        sums, slack = coding(Quantised(chunk=chunk)).decode(tensors, {"w": ((chunk,), F32)})
        Expectation({"w": ((chunk,), F32)}, 1, bound).check(Tally(sums, 1, {}, slack))
        worst = max(worst, norm(sums))
    assert 1.05 < worst < 1.11


def test_a_plan_carries_its_codec_and_rounds_what_it_downloads() -> None:
    plan = RoundPlan(
        0, 1, FitTask(window=LastWindow(skip=0)), PopularityConfig(), 4,
        {"item": KEY.numpy().standard_normal((4, 2)).astype(np.float32), "wide": np.full(2, 0.1)}, KEY, "abc",
        np.arange(2), {"popularity": np.full(4, 0.1, np.float32)}, Sparse(values=Quantised(chunk=64)), "bfloat16",
    )  # fmt: skip
    back = RoundPlan.from_bytes(plan.to_bytes())
    assert (back.codec, back.download, back.coding) == (plan.codec, "bfloat16", plan.coding)
    assert np.array_equal(back.params["item"], from_half(to_half(plan.params["item"], "bfloat16")))
    assert digest(back.inputs) == digest(plan.inputs)
    assert np.array_equal(back.params["wide"], plan.params["wide"])
    assert back.to_bytes() == plan.to_bytes()
    counting = replace(plan, task=CountTask(window=LastWindow(skip=0)))
    assert counting.coding.codec == Plain()


@pytest.mark.parametrize(
    "changes", [{"codec": {"kind": "zip"}}, {"codec": {"kind": "quantised", "chunk": 0}}, {"download": "int4"}]
)
def test_a_plan_with_an_impossible_codec_is_malformed(changes: dict[str, Any]) -> None:
    plan = RoundPlan(
        0, 1, FitTask(window=LastWindow(skip=0)), PopularityConfig(), 4, {}, KEY, "abc", np.arange(2)
    )  # fmt: skip
    header, tensors = wire.unpack("plan", plan.to_bytes())
    with pytest.raises(ProtocolError, match="The plan is malformed"):
        RoundPlan.from_bytes(wire.pack("plan", {**header, **changes}, tensors))


def test_an_experiment_names_its_codec() -> None:
    found = small_experiment(training__codec={"kind": "sparse", "values": {"kind": "quantised", "chunk": 256}})
    assert found.training.codec == Sparse(values=Quantised(chunk=256))
    with pytest.raises(ConfigError, match=r"'training\.codec\.values\.chunks'.*did you mean 'chunk'"):
        Experiment.parse(
            small_document(training__codec={"kind": "sparse", "values": {"kind": "quantised", "chunks": 256}})
        )


def test_the_privacy_statement_says_what_the_codec_gives_away() -> None:
    assert privacy(small_experiment()) == PRIVACY
    eight = privacy(small_experiment(training__codec={"kind": "quantised"}))["statement"]
    assert "'quantised'" in eight
    assert "which items" not in eight
    sparse = privacy(small_experiment(training__codec={"kind": "sparse"}))["statement"]
    assert sparse.startswith("Not private")
    assert "which items its clients touched" in sparse


def test_runs_go_through_the_codec(tmp_path: Path) -> None:
    dataset = dataset_of(small_rows())
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "sparse": {"training__codec": {"kind": "sparse"}},
        "quantised": {"training__codec": {"kind": "quantised"}, "training__download": "float16"},
        "again": {"training__codec": {"kind": "quantised"}, "training__download": "float16"},
    }
    found = {}
    for name, change in changes.items():
        short = {"split__later": 0, "evaluation__local_only": {"people": 0}, "runtime__nodes": 2}
        document, registry = simulated(small_experiment(**short, **change), dataset, tmp_path / name)
        release = registry.load("newest")
        assert all(not record["refused"] for record in document["rounds"])
        found[name] = (document["releases"][0], release)
    assert same_bytes(found["sparse"][1].params, found["plain"][1].params)  # exact
    assert same_bytes(found["again"][1].params, found["quantised"][1].params)
    assert not same_bytes(found["quantised"][1].params, found["plain"][1].params)
    assert found["quantised"][0]["bytes_up"] < 0.5 * found["plain"][0]["bytes_up"]
    assert found["quantised"][0]["bytes_down"] < 0.75 * found["plain"][0]["bytes_down"]  # headers weigh
    assert "which items its clients touched" in found["sparse"][1].manifest.privacy["statement"]
