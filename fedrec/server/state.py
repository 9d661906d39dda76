"""`ServerState`: all that a killed server needs to go on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from fedrec.config import Experiment
from fedrec.data.catalog import ItemCatalog
from fedrec.errors import OtherVersion, RunError
from fedrec.params import Array, Params
from fedrec.random import Key

_TENSORS = (
    "params", "average", "memory", "counts", "statistic", "anchor", "prior", "fisher", "teacher", "study", "memories",
    "small", "small_memory", "best",
)  # fmt: skip


@dataclass(frozen=True)
class ServerState:
    """Everything between two rounds; immutable, serialisable, and with no clock in it.

    Attributes:
        run: name of the run.
        experiment_digest: the experiment that it carries out.
        catalog_digest: the catalogue that item numbers refer to.
        n_catalog: how many items it holds.
        slice: index of the slice being learnt.
        round: rounds of it that are done.
        counted: slices whose popularity counts are in `counts`.
        params: the shared parameters.
        average: moving average of the parameters over the slice's rounds; empty if the experiment wants none.
        memory: the server optimizer's state.
        counts: {"counts": [n_items] float32}, how many people took each item in the slices so far.
        statistic: the co-occurrence statistic of the slices so far, with its noise, and the counts, those of
            now and those that shaped its space of features; empty if the experiment wants none.
        anchor: the parameters that the slice began with, if training holds on to them; empty in the first slice.
        fisher: how much each parameter of the last release mattered to people so far; empty if training does not ask.
        teacher: what the slice began with, if clients are to imitate it; empty in the first slice.
        prior: parameters of a blend's spectral part, made from `statistic`.
        study: while the slice is distilled: "fitted:" parameters as the rounds left them, "memory:" of the optimizer.
        memories: synthetic histories that the slice rehearses; empty in the first, or if training wants none.
        small: the parameters that small devices train; empty where there are no tiers.
        small_memory: the state of their optimizer.
        best: the parameters that validation liked best in this slice so far, if training may stop early.
        stopping: what validation said: "tried", the "round" of the best, and whether the rounds have "ended".
        lesson: how far the slice is distilled, from whom; empty before.
        adoption: how far a blend's fitted part was adopted in this slice, and what was tried.
        clip_norm: of the next round, where it is learnt; None where it is fixed.
        overhead: what counting and evaluating cost in this slice: "seconds", "bytes_down", "bytes_up".
        parent: version of the last release.
        offences: node id to how often it sent what no honest node sends.
        rounds: a record of every round.
        releases: a record of every release.
    """

    run: str
    experiment_digest: str
    catalog_digest: str
    n_catalog: int = 0
    slice: int = 0
    round: int = 0
    counted: int = 0
    params: Params = field(default_factory=dict)
    average: Params = field(default_factory=dict)
    memory: Params = field(default_factory=dict)
    counts: Params = field(default_factory=dict)
    statistic: Params = field(default_factory=dict)
    anchor: Params = field(default_factory=dict)
    prior: Params = field(default_factory=dict)
    fisher: Params = field(default_factory=dict)
    teacher: Params = field(default_factory=dict)
    study: Params = field(default_factory=dict)
    memories: Params = field(default_factory=dict)
    small: Params = field(default_factory=dict)
    small_memory: Params = field(default_factory=dict)
    best: Params = field(default_factory=dict)
    stopping: Mapping[str, Any] = field(default_factory=dict)
    adoption: Mapping[str, Any] = field(default_factory=dict)
    lesson: Mapping[str, Any] = field(default_factory=dict)
    clip_norm: float | None = None
    overhead: Mapping[str, float] = field(default_factory=dict)
    parent: int | None = None
    offences: Mapping[str, int] = field(default_factory=dict)
    rounds: tuple[dict[str, Any], ...] = ()
    releases: tuple[dict[str, Any], ...] = ()

    @property
    def released(self) -> Params:
        """What a release of this state holds."""
        return self.average or self.params

    def to_record(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return the state as a JSON-able header and named tensors."""
        header = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _TENSORS}
        tensors = {f"{part}:{name}": np.asarray(v) for part in _TENSORS for name, v in getattr(self, part).items()}
        return header, tensors

    @classmethod
    def from_record(cls, header: dict[str, Any], tensors: Params) -> ServerState:
        """Return the state that `to_record` wrote.

        Raises:
            OtherVersion: another version of fedrec wrote it.
        """
        parts: dict[str, dict[str, Array]] = {part: {} for part in _TENSORS}
        if header.keys() | _TENSORS != {f.name for f in fields(cls)}:
            raise OtherVersion(
                f"The checkpoint of run '{header.get('run')}' is of another version of fedrec; go on with the fedrec "
                "that began the run, or delete it to start the run anew."
            )
        for path, value in tensors.items():
            part, name = path.split(":", 1)
            parts[part][name] = value
        lists = {name: tuple(header[name]) for name in ("rounds", "releases")}
        values: dict[str, Any] = {**header, **lists, **parts}
        return cls(**values)

    def checked(self, experiment: Experiment, catalog: ItemCatalog) -> ServerState:
        """Return the state to go on with; a catalogue that has only been added to is taken over.

        Raises:
            RunError: it belongs to another experiment or to other items.
        """
        if self.experiment_digest != experiment.digest():
            raise RunError(
                f"Run '{self.run}' was started with another experiment, so it cannot be resumed with this one; "
                "restore the TOML it began with, or start a new run without --resume."
            )
        found = catalog.digest()
        if self.catalog_digest == found:
            return self
        if not self.n_catalog < len(catalog) or catalog.prefix(self.n_catalog).digest() != self.catalog_digest:
            raise RunError(
                f"Run '{self.run}' was started on another catalogue; give it the data that it began with. Items can "
                "be added at the end of a catalogue, never changed or removed."
            )
        return self.advanced(catalog_digest=found, n_catalog=len(catalog))

    def blamed(self, offenders: Iterable[int]) -> ServerState:
        """Return the state with one more offence of each of these nodes."""
        counts = dict(self.offences)
        for node in offenders:
            counts[str(node)] = counts.get(str(node), 0) + 1
        return self if counts == self.offences else self.advanced(offences=counts)

    def quarantined(self, limit: int | None) -> frozenset[int]:
        """Return the nodes with so many offences; nobody without a limit."""
        return frozenset(int(node) for node, n in self.offences.items() if limit is not None and n >= limit)

    def advanced(self, **changes: Any) -> ServerState:
        """Return the state with these fields changed."""
        return replace(self, **changes)

    @staticmethod
    def root_key(experiment: Experiment) -> Key:
        """Return the key that all randomness of the experiment comes from."""
        return Key.from_seed(experiment.seed)
