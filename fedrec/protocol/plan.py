"""`RoundPlan`: what the server asks of one node, complete: a node needs nothing else to do its part."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedrec.data.slices import Window
from fedrec.errors import ProtocolError
from fedrec.models.configs import AnyModelConfig, ModelConfig
from fedrec.params import Array, Params, digest
from fedrec.protocol import wire
from fedrec.protocol.codec import F32, AnyCodec, Codec, Coding, Float, Plain, Sparse, from_half, to_half
from fedrec.protocol.task import AnyTask, CooccurrenceTask, FitTask, Task
from fedrec.random import Key

MAX_CLIENTS = 100_000_000
"""More clients than a node can host; a larger census is a fault or an attack."""
MAX_TICKET = 64
_SLOTS, _MODEL, _INPUT = "slots", "model/", "input/"
_DOWN = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(np.uint16)}


class _Header(BaseModel):
    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    slice: int
    round: int
    task: Task
    model: ModelConfig
    n_items: int = Field(ge=1)
    key: str
    catalog_digest: str
    codec: Codec
    download: Float
    ticket: str = Field(default="", max_length=MAX_TICKET)


@dataclass(frozen=True)
class RoundPlan:
    """One round's request to one node.

    Attributes:
        slice: index of the time slice.
        round: number of the round within the slice.
        task: what to do.
        model: settings of the model that `params` belong to.
        n_items: how many items that model scores.
        params: the shared parameters; empty for tasks that need none.
        key: root of all randomness in this round.
        catalog_digest: the catalogue that item numbers refer to.
        slots: [k] int64, which of the node's eligible clients take part.
        inputs: further named tensors that the task needs, for example released popularity counts.
        codec: how the node writes the sums of a fit; what other tasks contribute travels as it is.
        download: how `params` travel; with 16 bits the node starts from rounded ones.
        ticket: drawn for this request to this node alone; the tally repeats it, so no other reply can pass for it.
    """

    slice: int
    round: int
    task: AnyTask
    model: AnyModelConfig
    n_items: int
    params: Params
    key: Key
    catalog_digest: str
    slots: NDArray[np.int64]
    inputs: Params = field(default_factory=dict)
    codec: AnyCodec = field(default_factory=Plain)
    download: Float = "float32"
    ticket: str = ""

    @property
    def coding(self) -> Coding:
        """How this round's tallies are written."""
        if isinstance(self.task, CooccurrenceTask) and self.task.sketch == "pairs":
            return Coding(Sparse(), self.n_items * (self.n_items + 1) // 2, self.key)
        return Coding(self.codec if isinstance(self.task, FitTask) else Plain(), self.n_items, self.key)

    def to_bytes(self) -> bytes:
        """Return the plan in the wire format."""
        tensors = {_MODEL + name: _packed(value, self.download) for name, value in self.params.items()}
        tensors |= {_INPUT + name: value for name, value in self.inputs.items()}
        return wire.pack("plan", self._header, {**tensors, _SLOTS: self.slots})

    @property
    def digest(self) -> str:
        """SHA-256 of what is asked, of whomever: slots and ticket are left out."""
        tensors = {_MODEL + name: value for name, value in self.params.items()}
        tensors |= {_INPUT + name: value for name, value in self.inputs.items()}
        header = json.dumps({**self._header, "ticket": ""}, sort_keys=True)
        return hashlib.sha256(f"{digest(tensors)}|{header}".encode()).hexdigest()

    @cached_property
    def _header(self) -> dict[str, Any]:
        return {
            "slice": self.slice,
            "round": self.round,
            "task": self.task.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
            "n_items": self.n_items,
            "key": self.key.hex(),
            "catalog_digest": self.catalog_digest,
            "codec": self.codec.model_dump(mode="json"),
            "download": self.download,
            "ticket": self.ticket,
        }

    @classmethod
    def from_bytes(cls, document: bytes) -> RoundPlan:
        """Return the plan that `to_bytes` wrote.

        Raises:
            ProtocolError: the document is not a plan of this version.
        """
        raw, tensors = wire.unpack("plan", document)
        try:
            header = _Header.model_validate(raw)
            slots, key = tensors.pop(_SLOTS), Key.from_hex(header.key)
        except (ValidationError, KeyError, ValueError) as error:
            raise ProtocolError(f"The plan is malformed: {error}") from error
        if slots.ndim != 1 or slots.dtype != np.int64:
            raise ProtocolError(f"The plan is malformed: its slots are {slots.dtype}{slots.shape}, not int64[k].")
        odd = [name for name in tensors if not name.startswith((_MODEL, _INPUT))]
        if odd:
            raise ProtocolError(f"The plan is malformed: nobody knows what its tensor '{odd[0]}' is for.")
        half = _DOWN.get(header.download)
        params = {
            name.removeprefix(_MODEL): from_half(value) if value.dtype == half else value
            for name, value in tensors.items()
            if name.startswith(_MODEL)
        }
        inputs = {name.removeprefix(_INPUT): value for name, value in tensors.items() if name.startswith(_INPUT)}
        return cls(
            header.slice, header.round, header.task, header.model, header.n_items, params, key,
            header.catalog_digest, slots, inputs, header.codec, header.download, header.ticket,
        )  # fmt: skip


def _packed(value: Array, download: Float) -> Array:
    return value if download == "float32" or value.dtype != F32 else to_half(value, download)


class CensusRequest(BaseModel):
    """Asks a node how many of its clients have interactions in the window."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    window: Window
    catalog_digest: str
    ticket: str = Field(default="", max_length=MAX_TICKET)

    def to_bytes(self) -> bytes:
        """Return the request in the wire format."""
        return wire.pack("census-request", self.model_dump(mode="json"), {})

    @classmethod
    def from_bytes(cls, document: bytes) -> CensusRequest:
        """Return the request that `to_bytes` wrote."""
        header, _ = wire.unpack("census-request", document)
        try:
            return cls.model_validate(header)
        except ValidationError as error:
            raise ProtocolError(f"The census request is malformed: {error}") from error


class Census(BaseModel):
    """A node's answer: its name, which orders the nodes, and how many of its clients are eligible."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    node: str = Field(max_length=200)
    n_clients: int = Field(ge=0, le=MAX_CLIENTS)
    ticket: str = Field(default="", max_length=MAX_TICKET)

    def to_bytes(self) -> bytes:
        """Return the answer in the wire format."""
        return wire.pack("census", self.model_dump(mode="json"), {})

    @classmethod
    def from_bytes(cls, document: bytes) -> Census:
        """Return the answer that `to_bytes` wrote."""
        header, _ = wire.unpack("census", document)
        try:
            return cls.model_validate(header)
        except ValidationError as error:
            raise ProtocolError(f"The census is malformed: {error}") from error
