"""What every benchmark shares: its arguments, its table, and the JSON that lets anybody check a claim."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedrec.server.files import write_atomically
from fedrec.server.run import machine


@dataclass(frozen=True)
class Row:
    """One measured figure and, where something is claimed, what it must reach.

    Attributes:
        what: the figure in words.
        value: the measurement.
        unit: its unit.
        target: the claim, for example ">= 0.095"; empty where nothing is claimed.
        holds: whether the claim holds; None where nothing is claimed.
    """

    what: str
    value: float
    unit: str
    target: str = ""
    holds: bool | None = None


def claim(what: str, value: float, unit: str, relation: str, bound: float) -> Row:
    """Return a row that claims ``value >= bound`` or ``value <= bound``.

    >>> claim("quality", 0.1, "NDCG@10", ">=", 0.095).holds
    True
    """
    holds = {">=": value >= bound, "<=": value <= bound}[relation]
    return Row(what, value, unit, f"{relation} {bound:g}", holds)


def unclaimed(what: str, value: float, unit: str, relation: str, bound: float) -> Row:
    """Return the row of a claim that this run is too small to check; it names the target and does not judge."""
    return Row(what, value, unit, f"{relation} {bound:g}")


def option(rest: list[str], name: str, allowed: Sequence[str] | None, default: str) -> str:
    """Take an option with its value, one of those allowed if any are named, out of the arguments.

    Raises:
        ValueError: the value is none of those allowed.
    """
    if name not in rest:
        return default
    place = rest.index(name)
    given = "".join(rest[place + 1 : place + 2])
    if allowed is not None and given not in allowed:
        raise ValueError(f"{name} takes one of {', '.join(allowed)}.")
    del rest[place : place + 2]
    return given


def run(
    name: str,
    what: str,
    measure: Callable[[bool], Sequence[Row]],
    argv: Sequence[str] | None = None,
    typed: Sequence[str] | None = None,
) -> int:
    """Parse the arguments, measure, print the table, write the JSON; return 1 if a claim does not hold.

    Args:
        name: of the module.
        what: one sentence for ``--help``.
        measure: gets whether ``--quick`` was given; a quick run is smaller, and its figures claim less.
        argv: arguments; those of the process if not given.
        typed: what stands in the record as the arguments, where a benchmark took some of its own out of `argv`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=what)
    parser.add_argument("--quick", action="store_true", help="a smaller run, to see that it works")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the rows as JSON")
    arguments = parser.parse_args(argv)
    rows = list(measure(arguments.quick))
    table = Table(title=what, title_justify="left")
    for column, justify in (("what", "left"), ("value", "right"), ("unit", "left"), ("target", "right"), ("", "left")):
        table.add_column(column, justify="right" if justify == "right" else "left")
    for row in rows:
        table.add_row(
            row.what, f"{row.value:.4g}", row.unit, row.target, {True: "holds", False: "FAILS", None: ""}[row.holds]
        )
    Console().print(table)
    if arguments.json:
        given = sys.argv[1:] if argv is None else argv
        document = {
            "benchmark": name,
            "command": shlex.join(["python", "-m", f"benchmarks.{name}", *(typed or given)]),
            "quick": arguments.quick,
            "machine": machine(threads=1),
            "rows": [asdict(row) for row in rows],
        }
        write_atomically(arguments.json, (json.dumps(document, indent=1) + "\n").encode())
    return 1 if any(row.holds is False for row in rows) else 0


def progress(steps: Iterable[int], description: str) -> Iterable[int]:
    """Show a progress bar on stderr while going through `steps`."""
    return track(list(steps), description=description, console=Console(stderr=True))
