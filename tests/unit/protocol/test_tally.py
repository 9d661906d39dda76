"""Tallies: exact round trips, and every way in which one is refused before it is folded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrec.errors import ProtocolError, TallyRefused
from fedrec.params import digest
from fedrec.protocol import wire
from fedrec.protocol.tally import Expectation, Tally

F32 = np.dtype(np.float32)
EXPECTED = Expectation({"w": ((2, 2), F32), "b": ((), F32)}, max_clients=3, norm_bound=2.0)
GOOD = Tally({"w": np.ones((2, 2), np.float32), "b": np.array(1.0, np.float32)}, 2, {"loss": 1.5, "clipped": 0.0})
DOCUMENT = GOOD.to_bytes()


def with_w(value: Any, dtype: Any = np.float32) -> Tally:
    return replace(GOOD, sums={**GOOD.sums, "w": np.asarray(value, dtype)})


def one_cell(value: float) -> Tally:
    return with_w([[0, 0], [value, 0]])


def test_a_tally_goes_there_and_back() -> None:
    back = Tally.from_bytes(DOCUMENT)
    assert digest(back.sums) == digest(GOOD.sums)
    assert (back.n_clients, dict(back.stats)) == (2, {"loss": 1.5, "clipped": 0.0})
    empty = Tally.from_bytes(Tally({}, 0, {}).to_bytes())
    assert (dict(empty.sums), empty.n_clients, dict(empty.stats)) == ({}, 0, {})


def test_a_tally_answers_one_request_and_is_as_long_whatever_its_ticket() -> None:
    tickets = [f"{number:032x}" for number in range(200)]
    documents = [replace(GOOD, ticket=ticket).to_bytes() for ticket in tickets]
    assert len({len(document) for document in documents}) == 1  # reports count bytes, and are compared
    assert Tally.from_bytes(documents[7], ticket=tickets[7]).ticket == tickets[7]
    with pytest.raises(TallyRefused, match="it answers another request"):
        Tally.from_bytes(documents[7], ticket=tickets[8])
    with pytest.raises(TallyRefused, match="it answers another request"):
        Tally.from_bytes(DOCUMENT, ticket=tickets[8])


def test_a_good_tally_passes() -> None:
    EXPECTED.check(GOOD)
    EXPECTED.check(Tally({}, 0, {}))
    EXPECTED.check(replace(GOOD, n_clients=3))
    replace(EXPECTED, norm_bound=None).check(with_w(np.full((2, 2), 1e30)))


@pytest.mark.parametrize(
    ("tally", "reason"),
    [
        (one_cell(np.nan), "'w' holds a NaN or an infinity"),
        (one_cell(np.inf), "'w' holds a NaN or an infinity"),
        (one_cell(-np.inf), "'w' holds a NaN or an infinity"),
        (replace(GOOD, sums={**GOOD.sums, "b": np.array(np.nan, np.float32)}), "'b' holds a NaN"),
        (replace(GOOD, sums={"w": GOOD.sums["w"]}), "missing or unknown: b"),
        (replace(GOOD, sums={**GOOD.sums, "c": np.ones(1)}), "missing or unknown: c"),
        (replace(GOOD, sums={}), "missing or unknown: b, w"),
        (with_w(np.ones(4)), r"'w' is float32\(4,\) where float32\(2, 2\) was asked"),
        (with_w(np.ones((2, 2)), np.float64), r"'w' is float64\(2, 2\) where float32"),
        (with_w(np.ones((2, 2)), np.int32), r"'w' is int32"),
        (replace(GOOD, n_clients=4), "counts 4 clients where 3 were asked"),
        (replace(GOOD, n_clients=-1), "counts -1 clients"),
        (replace(GOOD, n_clients=10**30), "clients where 3 were asked"),
        (one_cell(4.1), "its norm 4.22 is above the bound 4 of 2 clients"),
        (replace(GOOD, n_clients=0), "sums of no clients"),
        (replace(GOOD, stats={"loss": np.nan}), "statistics are not finite"),
        (replace(GOOD, stats={"loss": 1.0, "clipped": -np.inf}), "statistics are not finite"),
        (Tally({}, 0, {"loss": np.inf}), "statistics are not finite"),
    ],
)
def test_a_tally_that_is_not_as_asked_is_refused_with_the_reason(tally: Tally, reason: str) -> None:
    with pytest.raises(TallyRefused, match=reason):
        EXPECTED.check(tally)
    with pytest.raises(TallyRefused, match=reason):  # the wire neither repairs nor hides it
        EXPECTED.check(Tally.from_bytes(tally.to_bytes()))


def test_a_nan_is_found_before_the_norm_which_it_would_pass() -> None:
    tally = with_w([[np.nan, 1e30], [0, 0]])
    with pytest.raises(TallyRefused, match="NaN"):
        EXPECTED.check(tally)


def test_a_sum_that_moves_one_item_too_far_is_refused() -> None:
    shapes = {"item": ((3, 2), np.dtype(np.float32))}
    expected = Expectation(shapes, 2, 10.0, rows={"item": 1.5})
    rows = np.array([[3.0, 0.0], [0.0, 3.0], [2.0, 2.0]], np.float32)
    expected.check(Tally({"item": rows}, 2, {}))
    rows[1, 1] = 3.01
    with pytest.raises(TallyRefused, match=r"moves an item of 'item' by 3.01, above the bound"):
        expected.check(Tally({"item": rows}, 2, {}))


def test_the_bound_allows_for_rounding_and_nothing_more() -> None:
    one = replace(EXPECTED, shapes={"w": ((1,), F32)})
    one.check(Tally({"w": np.array([2.0001], np.float32)}, 1, {}))
    with pytest.raises(TallyRefused, match="above the bound"):
        one.check(Tally({"w": np.array([2.001], np.float32)}, 1, {}))


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ({"stats": {}}, "n_clients"),
        ({"n_clients": 1}, "stats"),
        ({"n_clients": 1.5, "stats": {}}, "n_clients"),
        ({"n_clients": 1, "stats": {"loss": "high"}}, "loss"),
        ({"n_clients": 1, "stats": {"loss": 10**400}}, "loss"),
        ({"n_clients": 1, "stats": {}, "user": "ann"}, "user"),
    ],
)
def test_a_malformed_header_is_refused(header: dict[str, Any], field: str) -> None:
    with pytest.raises(ProtocolError, match=rf"The tally is malformed: (.|\n)*{field}"):
        Tally.from_bytes(wire.pack("tally", header, {}))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(DOCUMENT) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_random_corruption_raises_nothing_but_protocol_errors_and_what_passes_is_bounded(
    changes: list[tuple[int, int]],
) -> None:
    document = bytearray(DOCUMENT)
    for place, value in changes:
        document[place] = value
    try:
        tally = Tally.from_bytes(bytes(document))
        EXPECTED.check(tally)
    except ProtocolError:
        return
    assert 0 <= tally.n_clients <= 3
    assert all(np.isfinite(value).all() for value in tally.sums.values())
