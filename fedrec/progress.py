"""What a person sees on the terminal while a run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from fedrec.server.work import Event


class RunProgress:
    """Three bars on stderr: slices, rounds of the slice, and clients asked in the slice.

    Use it as a context manager, and its `observe` as the run's observer.
    """

    def __init__(self, console: Console, n_slices: int, expected_cohort: float) -> None:
        """Prepare the bars; nothing is drawn until the context is entered."""
        self._cohort = expected_cohort
        self._bars = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._slices = self._add("slices", n_slices)
        self._rounds = self._add("rounds", 0)
        self._clients = self._add("clients", 0)

    def _add(self, name: str, total: float) -> TaskID:
        return self._bars.add_task(name, total=total, note="")

    def __enter__(self) -> RunProgress:
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing."""
        self._bars.stop()

    def observe(self, event: Event) -> None:
        """Move the bars."""
        record: dict[str, Any] = event.record
        if event.kind == "slice":
            rounds = record["rounds"]
            per_round = min(self._cohort, record["clients"])
            self._bars.reset(self._rounds, total=rounds, completed=record["done"], note="training")
            self._bars.reset(self._clients, total=rounds * per_round, completed=record["done"] * per_round, note="")
        elif event.kind == "round":
            loss = "" if record["loss"] is None else f"loss {record['loss']:.3f}"
            self._bars.update(self._rounds, advance=1, note=loss)
            self._bars.update(self._clients, advance=record["clients"])
        elif event.kind == "evaluate":
            self._bars.update(self._rounds, note="evaluating")
        elif event.kind == "release":
            self._bars.update(self._slices, advance=1, note=f"release {record['version']}")
