"""`RoundPlan`: what the server asks of one node, complete: a node needs nothing else to do its part.

What is the same in round after round, such as the frozen part of a model, a plan can name instead of carrying it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedrec.data.slices import Window
from fedrec.errors import ProtocolError
from fedrec.models.configs import AnyModelConfig, ModelConfig
from fedrec.models.freeze import trains
from fedrec.params import Array, Params, digest
from fedrec.protocol import wire
from fedrec.protocol.codec import AnyCodec, Codec, Coding, Float, Plain, Sparse, from_half
from fedrec.protocol.parcels import LEAST_BYTES, MOST_NAMED, Freight, Held, Named, found, nothing, rounded
from fedrec.protocol.task import AnyTask, CooccurrenceTask, FitTask, Task
from fedrec.random import Key

MAX_CLIENTS = 100_000_000
"""More clients than a node can host; a larger census is a fault or an attack."""
MAX_TICKET = 64
TEACHER = "teacher/"
"""Inputs of this prefix are the release that a whole slice imitates."""
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
    named: dict[str, Named] = Field(default_factory=dict, max_length=MOST_NAMED)


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

    def to_bytes(self, freight: Freight | None = None) -> bytes:
        """Return the plan in the wire format.

        Args:
            freight: takes along what the plan then names only; None: the plan carries everything.
        """
        tensors, named = dict[str, Array](), dict[str, Any]()
        for prefix, form, group in ((_MODEL, self.download, self.params), (_INPUT, "float32", self.inputs)):
            for name, value in group.items():
                if freight is None or value.nbytes < LEAST_BYTES or not self._stays(prefix, name):
                    tensors[prefix + name] = rounded(value, form)
                else:
                    named[prefix + name] = freight.load(value, form).model_dump(mode="json")
        header = {**self._header, "named": named} if named else self._header
        return wire.pack("plan", header, {**tensors, _SLOTS: self.slots})

    def _stays(self, prefix: str, name: str) -> bool:
        """Return whether a tensor is likely to be the same in the next plan."""
        return name.startswith(TEACHER) if prefix == _INPUT else not trains(self.model, name)

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
    def from_bytes(cls, document: bytes, held: Held = nothing) -> RoundPlan:
        """Return the plan that `to_bytes` wrote.

        Args:
            document: the plan.
            held: gives the parcels that the plan may name.

        Raises:
            TensorsMissing: the plan names tensors that are not held.
            ProtocolError: the document is not a plan of this version.
        """
        plan, named = cls.outline(document)
        if not named:
            return plan
        arrived = found(named.values(), held)
        half = _DOWN.get(plan.download)
        params, inputs = dict(plan.params), dict(plan.inputs)
        for name, one in named.items():
            value = arrived[one.sha256]
            if name.startswith(_MODEL):
                params[name.removeprefix(_MODEL)] = from_half(value) if value.dtype == half else value
            else:
                inputs[name.removeprefix(_INPUT)] = value
        return replace(plan, params=params, inputs=inputs)

    @classmethod
    def outline(cls, document: bytes) -> tuple[RoundPlan, dict[str, Named]]:
        """Return the plan without the tensors that it only names, and their names.

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
        odd = [name for name in (*tensors, *header.named) if not name.startswith((_MODEL, _INPUT))]
        if odd:
            raise ProtocolError(f"The plan is malformed: nobody knows what its tensor '{odd[0]}' is for.")
        twice = tensors.keys() & header.named.keys()
        if twice:
            raise ProtocolError(f"The plan is malformed: it carries '{min(twice)}' and names it, too.")
        half = _DOWN.get(header.download)
        params = {
            name.removeprefix(_MODEL): from_half(value) if value.dtype == half else value
            for name, value in tensors.items()
            if name.startswith(_MODEL)
        }
        inputs = {name.removeprefix(_INPUT): value for name, value in tensors.items() if name.startswith(_INPUT)}
        plan = cls(
            header.slice, header.round, header.task, header.model, header.n_items, params, key,
            header.catalog_digest, slots, inputs, header.codec, header.download, header.ticket,
        )  # fmt: skip
        return plan, header.named


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
