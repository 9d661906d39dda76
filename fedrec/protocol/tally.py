"""`Tally`: a node's reply, and the checks that it must pass before anything of it is added to anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedrec import params as named
from fedrec.errors import ProtocolError, TallyRefused
from fedrec.params import Params
from fedrec.protocol import wire
from fedrec.protocol.codec import Coding, Shapes

MOST_PER_CLIENT = 1e9
"""Beyond any loss or count that one client has."""


class _Header(BaseModel):
    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    n_clients: int
    stats: dict[str, float]
    ticket: str = Field(default="", max_length=64)


@dataclass(frozen=True)
class Tally:
    """What a node's clients contribute together; no identity inside.

    Attributes:
        sums: named tensors, summed over clients.
        n_clients: how many clients are in the sums.
        stats: plain numbers summed over clients, for example "loss".
        slack: by how much a lossy codec may have lengthened the sums; found when decoding, never sent.
        ticket: that of the request it answers, `RoundPlan.ticket`.
    """

    sums: Params
    n_clients: int
    stats: Mapping[str, float]
    slack: float = 0.0
    ticket: str = ""

    def to_bytes(self, coding: Coding | None = None, node: str = "") -> bytes:
        """Return the tally in the wire format.

        Args:
            coding: how the sums are written, ``plan.coding``; None: as they are.
            node: name of the node, from which it draws its rounding.

        Raises:
            ProtocolError: the codec cannot write these sums.
        """
        sums = self.sums if coding is None or not self.sums else coding.encode(self.sums, node)
        header = {"n_clients": self.n_clients, "stats": dict(self.stats)} | (
            {"ticket": self.ticket} if self.ticket else {}
        )
        return wire.pack("tally", header, sums)

    @classmethod
    def from_bytes(
        cls, document: bytes, coding: Coding | None = None, shapes: Shapes | None = None, ticket: str | None = None
    ) -> Tally:
        """Return the tally that `to_bytes` wrote; it may hold anything still, see `Expectation.check`.

        Args:
            document: what came in.
            coding: how the sums should be written; None: as they are.
            shapes: what was asked for; whatever does not decode to it is refused, before memory is taken for it.
            ticket: that of the request; None: any.

        Raises:
            ProtocolError: the document is not a tally of this version.
            TallyRefused: it answers another request, or its sums do not decode.
        """
        raw, tensors = wire.unpack("tally", document)
        try:
            header = _Header.model_validate(raw)
        except ValidationError as error:
            raise ProtocolError(f"The tally is malformed: {error}") from error
        if ticket is not None and header.ticket != ticket:
            raise TallyRefused("it answers another request: a replay, a late answer or another node's")
        sums, slack = (tensors, 0.0) if coding is None or not tensors else coding.decode(tensors, shapes or {})
        return cls(sums, header.n_clients, header.stats, slack, header.ticket)


@dataclass(frozen=True)
class Expectation:
    """What a tally must look like to be folded.

    Attributes:
        shapes: name to (shape, dtype) of every tensor.
        max_clients: how many clients were asked.
        norm_bound: L2 bound of one client's contribution, or None where there is none; a lossy codec's slack comes on
            top, so that exactly those sums pass which may have been within the bound before they were encoded.
        counts: statistics that say of how many of the clients something holds.
        most: bound of what one client adds to any single number, or None.
        rows: name of an item table to the L2 bound of one client's part of each row.
    """

    shapes: Shapes
    max_clients: int
    norm_bound: float | None = None
    counts: tuple[str, ...] = ()
    most: float | None = None
    rows: Mapping[str, float] = field(default_factory=dict)

    def check(self, tally: Tally) -> None:
        """Raise `TallyRefused` with the first thing that is wrong; finite before norm, for NaN passes any bound."""
        if not 0 <= tally.n_clients <= self.max_clients:
            raise TallyRefused(f"it counts {tally.n_clients} clients where {self.max_clients} were asked")
        if not all(math.isfinite(value) for value in tally.stats.values()):
            raise TallyRefused("its statistics are not finite")
        if any(abs(value) > MOST_PER_CLIENT * max(1, tally.n_clients) for value in tally.stats.values()):
            raise TallyRefused("one of its statistics is beyond what so many clients can have")
        for name in self.counts:
            if not 0 <= tally.stats.get(name, 0.0 if tally.n_clients == 0 else -1.0) <= tally.n_clients:
                raise TallyRefused(f"its statistic '{name}' counts more clients than there are, or is missing")
        if tally.n_clients == 0 and not tally.sums:
            return
        if tally.sums.keys() != self.shapes.keys():
            odd = sorted(tally.sums.keys() ^ self.shapes.keys())
            raise TallyRefused(f"its tensors are missing or unknown: {', '.join(odd[:3])}")
        for name, (shape, dtype) in self.shapes.items():
            value = tally.sums[name]
            if value.shape != shape or value.dtype != dtype:
                raise TallyRefused(f"'{name}' is {value.dtype}{value.shape} where {dtype}{shape} was asked")
        broken = named.non_finite(tally.sums)
        if broken:
            raise TallyRefused(f"'{broken[0]}' holds a NaN or an infinity")
        if tally.n_clients == 0 and named.norm(tally.sums) > 0:
            raise TallyRefused("it carries sums of no clients")
        if self.most is not None:
            limit = self.most * tally.n_clients * (1 + 1e-4)
            wide = [name for name, value in tally.sums.items() if value.size and float(np.abs(value).max()) > limit]
            if wide:
                raise TallyRefused(f"'{sorted(wide)[0]}' is beyond what {tally.n_clients} clients can have")
        for name, bound in self.rows.items():
            value = tally.sums[name]
            longest = float(np.sqrt(np.square(value.reshape(len(value), -1), dtype=np.float64).sum(1).max(initial=0.0)))
            if longest > bound * tally.n_clients * (1 + 1e-4) + tally.slack:
                raise TallyRefused(f"it moves an item of '{name}' by {longest:.4g}, above the bound of its clients")
        if self.norm_bound is not None:
            norm, bound = named.norm(tally.sums), self.norm_bound * tally.n_clients
            if norm > bound * (1 + 1e-4) + tally.slack:
                raise TallyRefused(f"its norm {norm:.4g} is above the bound {bound:.4g} of {tally.n_clients} clients")
