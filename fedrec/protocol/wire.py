"""The one wire format: a safetensors document whose metadata carries a version, a kind and a JSON header.

Plans, tallies and checkpoints are all written this way, over Flower messages and on disk. Reading it can allocate
arrays and parse JSON, and can do nothing else: no pickle, no code. A check sum over all of it finds what a bad line
or a bad disk changed; it is no signature.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedrec.errors import ProtocolError, WireVersion
from fedrec.params import Array, Params

VERSION = 3
MAX_HEADER_BYTES = 64 << 20


def pack(kind: str, header: dict[str, Any], tensors: Params) -> bytes:
    """Return one document of this kind; equal content gives equal bytes.

    >>> unpack("greeting", pack("greeting", {"to": "you"}, {"n": np.arange(2)}))
    ({'to': 'you'}, {'n': array([0, 1])})
    """
    arrays = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    text = json.dumps(header, sort_keys=True)
    metadata = {"fedrec": str(VERSION), "kind": kind, "header": text, "check": _check(kind, text, arrays)}
    # safetensors keeps metadata in a hash map, so more than one entry would be written in random order.
    return save(arrays, {"fedrec": json.dumps(metadata)})


def kind_of(document: bytes) -> str:
    """Return the kind of a document, without reading its tensors; empty if it is none.

    >>> kind_of(pack("greeting", {}, {}))
    'greeting'
    """
    try:
        length = int.from_bytes(document[:8], "little")
        if not 0 < length <= min(MAX_HEADER_BYTES, len(document) - 8):
            return ""
        metadata = json.loads(json.loads(document[8 : 8 + length])["__metadata__"]["fedrec"])
        return str(metadata["kind"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def unpack(kind: str, document: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return ``(header, tensors)`` of a document that `pack` wrote.

    Raises:
        WireVersion: it is of another version.
        ProtocolError: not such a document, of another kind, or changed on its way.
    """
    try:
        length = int.from_bytes(document[:8], "little")
        if not 0 < length <= min(MAX_HEADER_BYTES, len(document) - 8):
            raise ValueError("header length")
        metadata = json.loads(json.loads(document[8 : 8 + length])["__metadata__"]["fedrec"])
        header = json.loads(metadata["header"])
        if not isinstance(header, dict):
            raise TypeError("header")
        version, found = metadata["fedrec"], metadata["kind"]
        tensors = load(document)
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise ProtocolError(f"Not a fedrec document ({type(error).__name__}); the sender is not fedrec.") from error
    if version != str(VERSION):
        raise WireVersion(f"The sender speaks wire version {version}, this fedrec {VERSION}; update the older one.")
    if found != kind:
        raise ProtocolError(f"Expected a '{kind}' document, got a '{found}'.")
    if metadata.get("check") != _check(kind, metadata["header"], tensors):
        raise ProtocolError(f"The '{kind}' document was changed on its way: its check sum is wrong.")
    return header, tensors


def _check(kind: str, header: str, tensors: Params) -> str:
    """Return the check sum, of the same length whatever it is: a document's length depends on its shape alone."""
    found = zlib.crc32(f"{kind}|{header}".encode())
    for name in sorted(tensors):
        value = np.asarray(tensors[name], order="C")
        found = zlib.crc32(f"|{name}|{value.dtype.str}|{value.shape}|".encode(), found)
        found = zlib.crc32(value.reshape(-1).view(np.uint8).data, found)
    return f"{found:08x}"
