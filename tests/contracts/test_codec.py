"""The contract of every codec: what it writes is read back, by anybody, as it was or right on average, and bounded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fedrec.errors import ProtocolError, TallyRefused
from fedrec.params import Params, add, digest, n_bytes, norm, scale
from fedrec.protocol.codec import AnyCodec, Codec, Coding, Half, LowRank, Plain, Quantised, Shapes, Sparse
from fedrec.protocol.tally import Expectation, Tally
from fedrec.random import Key

KEY = Key.from_seed(5)
N_ITEMS, DIM, TOUCHED = 400, 32, 50

# For each codec: how many times shorter its tally of one client is, at least. 50 of 400 rows are touched and the dense
# matrix is 1/9 of the whole, so by rows 1 / (1/9 + 8/9 / 8) = 4.5; in 8 of 32 directions 1 / (1/9 + 8/9 / 4) = 3.
CODECS: dict[str, tuple[AnyCodec, float]] = {
    "plain": (Plain(), 1.0),
    "bfloat16": (Half(dtype="bfloat16"), 1.99),
    "float16": (Half(dtype="float16"), 1.99),
    "quantised": (Quantised(), 3.9),
    "quantised, short chunks": (Quantised(chunk=64), 3.7),
    "sparse": (Sparse(), 4.2),
    "sparse, float16": (Sparse(values=Half(dtype="float16")), 8.2),
    "sparse, quantised": (Sparse(values=Quantised()), 15.0),
    "low rank": (LowRank(rank=8), 2.95),
    "low rank, quantised": (LowRank(rank=8, values=Quantised()), 11.0),
    "low rank, wider than the table": (LowRank(rank=64), 0.99),
}
EXACT = ("plain", "sparse", "low rank, wider than the table")
LINEAR = (*EXACT, "low rank")


def update(seed: int = 0) -> Params:
    """Return what one client might send: an item table of which it touched some rows, a matrix, a bias, a number."""
    draws = Key.from_seed(seed).child("update").numpy()
    table = np.zeros((N_ITEMS, DIM), np.float32)
    rows = draws.permutation(N_ITEMS)[:TOUCHED]
    table[rows] = draws.standard_normal((TOUCHED, DIM)) * 0.01
    return {
        "item": table,
        "w.weight": (draws.standard_normal((50, DIM)) * 0.003).astype(np.float32),
        "bias": (draws.standard_normal(7) * 1e-4).astype(np.float32),
        "scale": np.array(-0.25, np.float32),
    }


def shapes_of(sums: Params) -> Shapes:
    return {name: (value.shape, value.dtype) for name, value in sums.items()}


SHAPES = shapes_of(update())


def coding(codec: AnyCodec, key: Key = KEY) -> Coding:
    return Coding(codec, N_ITEMS, key)


def sent(codec: AnyCodec, sums: Params, key: Key = KEY, node: str = "a") -> bytes:
    return Tally(sums, 1, {"loss": 1.0}).to_bytes(coding(codec, key), node)


def there_and_back(codec: AnyCodec, sums: Params, key: Key = KEY, node: str = "a") -> Tally:
    return Tally.from_bytes(sent(codec, sums, key, node), coding(codec, key), shapes_of(sums))


@pytest.fixture(params=CODECS, ids=str)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def codec(name: str) -> AnyCodec:
    return CODECS[name][0]


def test_names_shapes_and_dtypes_come_back(codec: AnyCodec) -> None:
    sums = {**update(), "counts": np.arange(3), "wide": np.ones((2, 2))}  # of no float32: travel as they are
    back = there_and_back(codec, sums)
    assert shapes_of(back.sums) == shapes_of(sums)
    assert (back.n_clients, dict(back.stats)) == (1, {"loss": 1.0})
    assert all(np.array_equal(back.sums[n], sums[n]) for n in ("counts", "wide"))


def test_an_exact_codec_changes_nothing_and_a_lossy_one_something(name: str, codec: AnyCodec) -> None:
    back = there_and_back(codec, update())
    assert (digest(back.sums) == digest(update())) == (name in EXACT)
    if name in EXACT:
        assert back.slack == pytest.approx(0, abs=1e-12)


def test_equal_keys_and_nodes_send_equal_bytes(codec: AnyCodec) -> None:
    assert sent(codec, update()) == sent(codec, update())


def test_only_rounding_differs_between_nodes(name: str, codec: AnyCodec) -> None:
    same = sent(codec, update(), node="a") == sent(codec, update(), node="b")
    assert same == ("quantised" not in name)


def test_what_is_sent_is_as_short_as_stated(name: str, codec: AnyCodec) -> None:
    ratio = len(sent(Plain(), update())) / len(sent(codec, update()))
    assert ratio >= CODECS[name][1]


def test_zeros_stay_zeros(codec: AnyCodec) -> None:
    nothing = scale(update(), 0.0)
    back = there_and_back(codec, nothing)
    assert norm(back.sums) == 0
    assert back.slack == 0
    found = there_and_back(codec, update()).sums
    untouched = ~update()["item"].any(axis=1)
    assert not found["item"][untouched].any()  # no codec makes a row of nothing


def test_tensors_without_numbers_and_tallies_without_tensors_travel(codec: AnyCodec) -> None:
    sums = {"item": np.zeros((N_ITEMS, 0), np.float32), "w": np.zeros(0, np.float32)}
    assert shapes_of(there_and_back(codec, sums).sums) == shapes_of(sums)
    empty = Tally({}, 0, {}).to_bytes(coding(codec), "a")
    assert Tally.from_bytes(empty, coding(codec), SHAPES) == Tally({}, 0, {})
    assert there_and_back(codec, {"counts": np.arange(3)}).sums["counts"].tolist() == [0, 1, 2]


def test_the_sum_of_what_nodes_send_decodes_to_what_the_sum_would(name: str, codec: AnyCodec) -> None:
    a, b = update(1), update(2)
    apart = add(there_and_back(codec, a).sums, there_and_back(codec, b, node="b").sums)
    together = there_and_back(codec, add(a, b)).sums
    error = norm(add(apart, together, -1.0)) / norm(together)
    assert error < (1e-6 if name in LINEAR else 0.03)


def test_decoding_is_right_on_average(name: str, codec: AnyCodec) -> None:
    """Over 200 keys the mean is as near as its standard error says; halves are nearest, not unbiased."""
    sums, n = update(), 200
    decoded = [there_and_back(codec, sums, KEY.child("round", i)).sums for i in range(n)]
    errors = [norm(add(one, sums, -1.0)) for one in decoded]
    mean = {name: np.mean([one[name] for one in decoded], axis=0, dtype=np.float64) for name in sums}
    found = norm({name: mean[name] - sums[name] for name in sums})
    if "16" in name:
        assert found <= norm(sums) * (2**-8 if "bfloat16" in name else 2**-11)
    elif name in EXACT:
        assert found < 1e-12
    else:  # independent errors of size e leave e / sqrt(n); their sum over many numbers varies by little
        assert found == pytest.approx(math.sqrt(np.mean(np.square(errors)) / n), rel=0.25)


def test_the_error_is_what_the_documents_say(name: str, codec: AnyCodec) -> None:
    table = {"item": update()["item"]}
    errors = [norm(add(there_and_back(codec, table, KEY.child(i)).sums, table, -1.0)) for i in range(100)]
    relative = math.sqrt(np.mean(np.square(errors))) / norm(table)
    expected = {"low rank": math.sqrt(DIM / 8 - 1), "low rank, quantised": math.sqrt(DIM / 8 - 1)}
    if name in expected:
        assert relative == pytest.approx(expected[name], rel=0.05)
    else:
        assert relative < (0.013 if "quantised" in name else 2**-8)


@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-6, 1.0, 1e4])
def test_an_honest_update_at_its_bound_passes(codec: AnyCodec, magnitude: float) -> None:
    sums = scale(update(), magnitude)
    for i in range(20):
        back = there_and_back(codec, sums, KEY.child(i))
        Expectation(SHAPES, 1, max(norm(sums), 1e-300)).check(back)


def test_the_bound_is_widened_by_no_more_than_the_codec_needs(name: str, codec: AnyCodec) -> None:
    """An update 1 % (halves), 5 % (8 bits) or any visible part above the bound is refused."""
    sums = update()
    room = 1.05 if "quantised" in name else 1.01
    if isinstance(codec, LowRank) and codec.rank < DIM:  # what of the update lies in the directions counts
        sums = there_and_back(codec, {"item": sums["item"]}).sums
        room = 1.05
    back = there_and_back(codec, sums)
    with pytest.raises(TallyRefused, match="above the bound"):
        Expectation(shapes_of(sums), 1, norm(sums) / room).check(back)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_at_one_end_or_the_other(codec: AnyCodec, value: float) -> None:
    sums = {**update(), "bias": np.array([0, 1, value, 0, 0, 0, 0], np.float32)}
    with pytest.raises(ProtocolError, match="'bias' holds a NaN or an infinity"):
        Expectation(SHAPES, 1, None).check(there_and_back(codec, sums))


def test_an_answer_in_another_codec_is_refused(name: str, codec: AnyCodec) -> None:
    for other, (written, _) in CODECS.items():
        document = sent(written, update())
        try:
            Expectation(SHAPES, 1, 100.0).check(Tally.from_bytes(document, coding(codec), SHAPES))
        except TallyRefused:
            assert other != name
        else:
            alike = {"low rank, wider than the table": "plain"}
            assert alike.get(other, other) == alike.get(name, name)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(CODECS)),
    st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_random_corruption_raises_nothing_but_protocol_errors(chosen: str, changes: list[tuple[int, int]]) -> None:
    codec = CODECS[chosen][0]
    document = bytearray(sent(codec, update()))
    for place, value in changes:
        document[place % len(document) if place % 3 else place % 600] = value  # the header is worth a third
    try:
        tally = Tally.from_bytes(bytes(document), coding(codec), SHAPES)
        Expectation(SHAPES, 1, 1.0).check(tally)
    except ProtocolError:
        return
    assert shapes_of(tally.sums) == SHAPES
    assert norm(tally.sums) <= 1.0 + 1e-4 + tally.slack


def test_settings_travel_and_name_themselves(codec: AnyCodec) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Codec)
    assert adapter.validate_json(adapter.dump_json(codec)) == codec
    assert bool(codec.reveals) == isinstance(codec, Sparse)


def test_decoded_sums_take_no_more_memory_than_was_asked_for(codec: AnyCodec) -> None:
    back = there_and_back(codec, update())
    assert n_bytes(back.sums) == n_bytes(update())
