"""The wire format: exact round trips, equal bytes for equal content, and nothing but `ProtocolError` for the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import save

from fedrec.errors import ProtocolError
from fedrec.protocol import wire

HEADER = {"to": "Zoë ☃", "n": 3, "deep": {"list": [1, 2.5, None, True, "\ud800"]}}
TENSORS = {
    "scalar": np.array(2.5),
    "empty": np.zeros((0, 4), np.float32),
    "größe/ä": np.arange(6, dtype=np.int64).reshape(2, 3),
    "mask": np.array([True, False]),
    "reversed": np.arange(5, dtype=np.int32)[::-1],
    "transposed": np.arange(6, dtype=np.float16).reshape(2, 3).T,
    "odd": np.array([np.nan, np.inf, -0.0], np.float32),
}
DOCUMENT = wire.pack("greeting", HEADER, TENSORS)


def by_hand(metadata: Any, tensors: dict[str, np.ndarray] | None = None) -> bytes:
    """Return a safetensors document with this text where the wire format keeps its own."""
    return save(tensors or {}, {"fedrec": metadata if isinstance(metadata, str) else json.dumps(metadata)})


def test_what_goes_in_comes_out() -> None:
    header, tensors = wire.unpack("greeting", DOCUMENT)
    assert header == HEADER
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].shape == value.shape, name
        assert tensors[name].dtype == value.dtype, name
        assert tensors[name].tobytes() == np.asarray(value, order="C").tobytes(), name


DTYPES = st.sampled_from(["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u4", "u8", "?"])
ANY_TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
    DTYPES.flatmap(lambda dtype: arrays(np.dtype(dtype), array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=3))),
    max_size=4,
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), ANY_JSON, max_size=3), ANY_TENSORS, st.text(max_size=5))
def test_any_content_goes_there_and_back(header: dict[str, Any], tensors: dict[str, np.ndarray], kind: str) -> None:
    document = wire.pack(kind, header, tensors)
    found, back = wire.unpack(kind, document)
    assert found == header
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (back[name].shape, back[name].dtype) == (value.shape, value.dtype)
        assert back[name].tobytes() == value.tobytes()
    assert wire.pack(kind, found, back) == document


def test_equal_content_gives_equal_bytes_whatever_the_order() -> None:
    backwards = dict(reversed(list(TENSORS.items())))
    assert wire.pack("greeting", dict(reversed(list(HEADER.items()))), backwards) == DOCUMENT
    assert wire.pack("greeting", {**HEADER, "n": 4}, TENSORS) != DOCUMENT


def test_equal_content_gives_equal_bytes_in_every_process() -> None:
    """Python's hash seed orders its sets, and safetensors keeps metadata in a hash map of its own."""
    program = (
        "import sys, numpy as np; from fedrec.protocol import wire\n"
        "tensors = {n: np.arange(3) for n in {'a', 'b', 'c', 'd', 'e'}}\n"
        "header = {n: 1 for n in {'x', 'y', 'z', 'w'}}\n"
        "sys.stdout.buffer.write(wire.pack('k', header, tensors))"
    )
    documents = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(documents) == 1
    assert wire.unpack("k", documents.pop())[0] == dict.fromkeys("xyzw", 1)


# What is not a document


def test_another_kind_and_another_version_are_named() -> None:
    with pytest.raises(ProtocolError, match="Expected a 'plan' document, got a 'greeting'"):
        wire.unpack("plan", DOCUMENT)
    newer = by_hand({"fedrec": "4", "kind": "greeting", "header": "{}"})
    with pytest.raises(ProtocolError, match="speaks wire version 4, this fedrec 3; update the older one"):
        wire.unpack("greeting", newer)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"\x00" * 7,
        b"\x00" * 64,
        b"hello, this is no document at all",
        save({"w": np.ones(2)}),
        save({"w": np.ones(2)}, {"other": "metadata"}),
        by_hand("not json"),
        by_hand("5"),
        by_hand("[]"),
        by_hand(DEEP),
        by_hand({"fedrec": "2", "kind": "greeting"}),
        by_hand({"fedrec": "2", "kind": "greeting", "header": "{"}),
        by_hand({"fedrec": "2", "kind": "greeting", "header": "[1]"}),
        by_hand({"fedrec": "2", "kind": "greeting", "header": {"a": 1}}),
        by_hand({"fedrec": "2", "kind": "greeting", "header": DEEP}),
        by_hand({"fedrec": "2", "kind": "greeting", "header": "9" * 10_000}),
        DOCUMENT + b"x",
        b"\x80\x04\x95" + DOCUMENT,
    ],
)
def test_garbage_is_refused(document: bytes) -> None:
    with pytest.raises(ProtocolError, match="Not a fedrec document"):
        wire.unpack("greeting", document)


def test_a_header_that_claims_too_much_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    beyond = (2**63).to_bytes(8, "little") + DOCUMENT[8:]
    longer = len(DOCUMENT).to_bytes(8, "little") + DOCUMENT[8:]
    for document in (beyond, longer):
        with pytest.raises(ProtocolError, match="Not a fedrec document"):
            wire.unpack("greeting", document)
    monkeypatch.setattr(wire, "MAX_HEADER_BYTES", int.from_bytes(DOCUMENT[:8], "little") - 1)
    with pytest.raises(ProtocolError, match="Not a fedrec document"):
        wire.unpack("greeting", DOCUMENT)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F32", "nothing"])
def test_tensors_that_numpy_cannot_hold_or_that_lie_elsewhere_are_refused(dtype: str) -> None:
    metadata = json.dumps({"fedrec": "2", "kind": "greeting", "header": "{}"})
    entry = {"dtype": dtype, "shape": [1], "data_offsets": [0, 2]}
    head = json.dumps({"__metadata__": {"fedrec": metadata}, "w": entry}).encode()
    with pytest.raises(ProtocolError, match="Not a fedrec document"):
        wire.unpack("greeting", len(head).to_bytes(8, "little") + head + b"\x00\x00")


@pytest.mark.parametrize("length", range(0, len(DOCUMENT), 7))
def test_a_truncated_document_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError):
        wire.unpack("greeting", DOCUMENT[:length])


def survives(document: bytes) -> None:
    """Read it; only a `ProtocolError` may come out, or a header and arrays."""
    try:
        header, tensors = wire.unpack("greeting", document)
    except ProtocolError:
        return
    assert isinstance(header, dict)
    assert all(isinstance(value, np.ndarray) for value in tensors.values())


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(document: bytes) -> None:
    survives(document)
    survives(len(document).to_bytes(8, "little") + document)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(DOCUMENT) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_random_corruption_never_raises_anything_else(changes: list[tuple[int, int]]) -> None:
    document = bytearray(DOCUMENT)
    for place, value in changes:
        document[place] = value
    survives(bytes(document))
