"""Quarantine: nodes that again and again sent what no honest node sends are asked no more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedrec.config import Experiment
from fedrec.protocol.link import Link, Reply, Verb
from fedrec.protocol.parcels import Freight
from fedrec.server.state import ServerState


@dataclass(frozen=True)
class TrustedLink:
    """A link without the nodes in quarantine."""

    link: Link
    quarantined: frozenset[int]

    def nodes(self) -> list[int]:
        """Return the ids of the nodes that are there and not in quarantine."""
        return [node for node in self.link.nodes() if node not in self.quarantined]

    def exchange(
        self,
        verb: Verb,
        documents: Mapping[int, bytes],
        timeout_seconds: float | None,
        freight: Freight | None = None,
    ) -> Iterable[Reply]:
        """Send, and yield the replies as they arrive."""
        return self.link.exchange(verb, documents, timeout_seconds, freight)


def trusted(link: Link, state: ServerState, experiment: Experiment) -> Link:
    """Return the link to the nodes that are not in quarantine."""
    gone = state.quarantined(experiment.training.quarantine_after)
    return TrustedLink(link, gone) if gone else link


def newly_quarantined(before: ServerState, after: ServerState, experiment: Experiment) -> list[dict[str, Any]]:
    """Return a record of each node that came into quarantine between two states."""
    limit = experiment.training.quarantine_after
    new = after.quarantined(limit) - before.quarantined(limit)
    return [{"node": node, "offences": after.offences[str(node)]} for node in sorted(new)]
