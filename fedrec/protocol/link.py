"""`Link`: how the server reaches nodes. The Flower Grid is the one implementation; the protocol room knows no flwr."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from fedrec.protocol.parcels import Freight

Verb = Literal["census", "run", "advertise", "share", "mask", "unmask"]
"""What can be asked of a node; the last four are the phases of a secure sum."""


@dataclass(frozen=True)
class Reply:
    """What came back from a node: a document, or why there is none."""

    node: int
    document: bytes | None
    error: str = ""


class Link(Protocol):
    """A way to send one document to each of some nodes and get one back from each."""

    def nodes(self) -> list[int]:
        """Return the ids of the nodes that are there now."""
        ...

    def exchange(
        self,
        verb: Verb,
        documents: Mapping[int, bytes],
        timeout_seconds: float | None,
        freight: Freight | None = None,
    ) -> Iterable[Reply]:
        """Send, and yield the replies as they arrive; a node that does not answer in time yields none.

        Args:
            verb: what is asked.
            documents: node -> what it is asked.
            timeout_seconds: how long to wait; None: until all have answered.
            freight: the tensors that the documents name, for nodes that lack them.
        """
        ...
