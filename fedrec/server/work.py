"""What a step of a slice is given, and where it leaves its results.

A slice is a list of steps (`fedrec.server.lifelong.STEPS`). Each takes the `Work` as the step before left it and gives
it back with more done. What must outlive a kill is in the state; the rest is a function of the state and is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedrec.data.catalog import ItemCatalog
from fedrec.data.slices import TimeSlice
from fedrec.protocol.link import Link
from fedrec.random import Key
from fedrec.server.gather import Roster
from fedrec.server.quarantine import newly_quarantined, trusted
from fedrec.server.registry import Registry
from fedrec.server.release import Release, Student
from fedrec.server.round import Recipe
from fedrec.server.state import ServerState


@dataclass(frozen=True)
class Event:
    """Something that an observer may show: "slice", "round", "evaluate" or "release", with its record."""

    kind: str
    record: dict[str, Any]


Observer = Callable[[Event], None]
Checkpoint = Callable[[ServerState], None]


@dataclass(frozen=True)
class Desk:
    """Where a run leaves its results.

    Attributes:
        registry: takes the releases.
        catalog: the public catalogue, published with them.
        checkpoint: stores the state, so that a killed run can go on.
        observe: is told what happens.
        due: returns when a slice may begin.
    """

    registry: Registry
    catalog: ItemCatalog
    checkpoint: Checkpoint
    observe: Observer
    due: Callable[[TimeSlice], None] = lambda time_slice: None


@dataclass(frozen=True)
class Work:
    """A slice being learnt.

    Attributes:
        state: how far it is; all that a resume needs.
        link: how to reach the nodes.
        time_slice: the slice.
        before: the slice before; None in the first.
        recipe: the experiment.
        desk: where results go.
        roster: who is there to learn from, once the slice has begun.
        began: when the release was made and its evaluation began, by the recipe's clock.
        student: the release's device student, once it is made.
        verdict: what the evaluation found.
        facts: what steps add to the release's record, by name.
        release: the release, once it is published.
    """

    state: ServerState
    link: Link
    time_slice: TimeSlice
    before: TimeSlice | None
    recipe: Recipe
    desk: Desk
    roster: Roster | None = None
    began: float = 0.0
    student: Student | None = None
    verdict: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    release: Release | None = None

    @property
    def trusted(self) -> Link:
        """The link to the nodes that are not in quarantine."""
        return trusted(self.link, self.state, self.recipe.experiment)

    @property
    def key(self) -> Key:
        """Where the randomness of the slice comes from."""
        return ServerState.root_key(self.recipe.experiment).child("slice", self.time_slice.index)

    def advanced(self, **changes: Any) -> Work:
        """Return the work with these fields of its state changed."""
        return replace(self, state=self.state.advanced(**changes))

    def noted(self, **facts: Any) -> Work:
        """Return the work with more facts for the release's record."""
        return replace(self, facts={**self.facts, **facts})

    def blamed(self, offenders: Iterable[int]) -> Work:
        """Return the work with these offences, and tell of nodes that come into quarantine."""
        after = self.state.blamed(offenders)
        self.tell_of_quarantine(after)
        return replace(self, state=after)

    def tell_of_quarantine(self, after: ServerState) -> None:
        """Tell the observer which nodes came into quarantine since this state."""
        for one in newly_quarantined(self.state, after, self.recipe.experiment):
            self.desk.observe(Event("quarantine", one))


Step = Callable[[Work], Work]
