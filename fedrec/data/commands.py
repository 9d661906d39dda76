"""`fedrec data`: list, fetch, describe, import and make up data sets."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedrec.data.cleaning import Dataset

app = typer.Typer(name="data", help="List, fetch, describe, import and make up data sets.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document; notes go to stderr.")]
Cache = Annotated[
    Path | None, typer.Option(help="Folder of prepared data sets (else $FEDREC_CACHE or ~/.cache/fedrec).")
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Folder with a sub-folder of original files for each data set, looked into first.")
]


class TimeFormat(StrEnum):
    """How times are written in a file."""

    seconds = "seconds"
    milliseconds = "milliseconds"
    iso8601 = "iso8601"


@app.command("list")
def list_sources(as_json: AsJson = False, cache: Cache = None, data_root: DataRoot = None) -> None:
    """List the data sets that fedrec knows by name, and whether they are at hand."""
    from fedrec.data.sources import SOURCES, find_local, prepared_folder

    known: list[dict[str, Any]] = []
    for name, source in SOURCES.items():
        folder = prepared_folder(name, cache)
        local = find_local(name, data_root)
        known.append(
            {
                "name": name,
                "summary": source.summary,
                "time_unit": source.time_unit,
                "prepared": (folder / "dataset.json").is_file(),
                "folder": str(folder),
                "local_files": str(local) if local else None,
                "can_be_fetched": bool(local or source.remotes),
                "terms": source.terms,
            }
        )
    if as_json:
        typer.echo(json.dumps({"sources": known}))
        return
    _print_table("", ("name", "what", "where"), [[one["name"], one["summary"], _at_hand(one)] for one in known])
    for terms in dict.fromkeys(one["terms"] for one in known):
        names = ", ".join(one["name"] for one in known if one["terms"] == terms)
        typer.echo(f"Terms of {names}: {terms}")


def _at_hand(one: dict[str, Any]) -> str:
    if one["prepared"]:
        return f"prepared in {one['folder']}"
    if one["local_files"]:
        return f"original files in {one['local_files']}"
    return "not here; `fedrec data fetch` gets it" if one["can_be_fetched"] else "not here; get the original files"


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="A name that `fedrec data list` shows.")],
    as_json: AsJson = False,
    cache: Cache = None,
    data_root: DataRoot = None,
) -> None:
    """Get a known data set and keep its prepared form in the cache."""
    from fedrec.data.sources import SOURCES, load_dataset, prepared_folder
    from fedrec.errors import DataError, nearest

    if name not in SOURCES:
        raise DataError(f"Unknown data set '{name}': known are {', '.join(SOURCES)}{nearest(name, SOURCES) or '.'}")
    dataset = load_dataset(name, cache=cache, data_root=data_root, say=_note)
    folder = prepared_folder(name, cache)
    if not (folder / "dataset.json").is_file():
        raise DataError(f"'{name}' was read but could not be kept in '{folder}'; choose another folder with --cache.")
    _print_result(_identity(dataset, folder), as_json)


@app.command("describe")
def describe(
    name: Annotated[
        str, typer.Argument(metavar="NAME|PATH", help="A known name, or a folder of `fedrec data import`.")
    ],
    as_json: AsJson = False,
    cache: Cache = None,
    data_root: DataRoot = None,
) -> None:
    """Say how many users, items and interactions a data set holds, and how they are spread. Uses no network."""
    from fedrec.data.sources import load_dataset

    dataset = load_dataset(name, cache=cache, data_root=data_root, fetch=False, say=_note)
    _print_result(_facts(dataset), as_json)


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="A CSV (.csv, .tsv, .gz) or Parquet (.parquet, .pq) file.")],
    *,
    user: Annotated[str, typer.Option(help="Column of user ids.")],
    item: Annotated[str, typer.Option(help="Column of item ids.")],
    time: Annotated[str, typer.Option(help="Column of times.")],
    out: Annotated[Path, typer.Option(help="Folder to write; an older data set there is replaced.")],
    value: Annotated[str | None, typer.Option(help="Column of ratings or amounts.")] = None,
    event: Annotated[str | None, typer.Option(help="Column that names what happened.")] = None,
    time_format: Annotated[TimeFormat, typer.Option(help="How times are written.")] = TimeFormat.seconds,
    items: Annotated[Path | None, typer.Option(help="File of items: id, title, attributes separated by '|'.")] = None,
    min_user: Annotated[int, typer.Option(min=0, help="Least number of interactions of a user.")] = 0,
    min_item: Annotated[int, typer.Option(min=0, help="Least number of interactions of an item.")] = 0,
    name: Annotated[str | None, typer.Option(help="What to call the data set (else the file's name).")] = None,
    as_json: AsJson = False,
) -> None:
    """Clean interactions of your own and write them as a data set, whole or not at all."""
    import hashlib
    import time as clock

    from fedrec.data.cleaning import Dataset, clean
    from fedrec.data.tabular import ColumnMapping, import_items, import_rows

    mapping = ColumnMapping(user=user, item=item, time=time, value=value, event=event, time_format=time_format.value)
    raw = import_rows(file, mapping)
    titles, attributes = import_items(items) if items else ({}, {})
    rows, report = clean(raw, min_user, min_item, now=int(clock.time()))
    _note(report.summary())
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    provenance = {"source": file.name, "sha256": digest, "terms": "those of the file's owner"}
    dataset = Dataset.build(
        rows, titles, attributes, name=name or file.name.split(".")[0], report=report, provenance=provenance
    )
    dataset.save(out)
    _print_result({**_identity(dataset, out), "cleaning": report.to_dict()}, as_json)


@app.command("synthesise")
def synthesise(
    users: Annotated[int, typer.Option(min=1, help="How many people.")],
    items: Annotated[int, typer.Option(min=1, help="How many items.")],
    out: Annotated[Path, typer.Option(help="New or empty folder for the data set.")],
    seed: Annotated[int, typer.Option(help="Root of all randomness.")] = 1,
    mean_length: Annotated[float, typer.Option(min=1, help="Mean number of interactions of a person.")] = 30.0,
    as_json: AsJson = False,
) -> None:
    """Make up a population: long-tail items, tastes that drift, people and items that arrive over time."""
    from rich.console import Console
    from rich.progress import Progress

    from fedrec.data.population import write_population
    from fedrec.random import Key

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("people", total=users)
        dataset = write_population(
            out,
            users,
            items,
            Key.from_seed(seed),
            mean_length=mean_length,
            observe=lambda written: bar.update(task, completed=written),
        )
    _print_result(_identity(dataset, out), as_json)


class Held(StrEnum):
    """What each block holds back."""

    test = "test"
    validation = "validation"


@app.command("blocks")
def blocks(
    source: Annotated[str, typer.Argument(metavar="NAME|PATH", help="A known name, or a folder of a data set.")],
    out: Annotated[Path, typer.Option(help="Folder to write; an older data set there is replaced.")],
    base: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share of the interactions in the first block.")
    ] = 0.6,
    later: Annotated[int, typer.Option(min=1, help="How many blocks follow.")] = 3,
    share: Annotated[
        float, typer.Option(min=0.01, max=0.4, help="Share of a person's part of a block held back.")
    ] = 0.1,
    hold: Annotated[Held, typer.Option(help="What is held back; choose settings on 'validation'.")] = Held.test,
    min_user: Annotated[int, typer.Option(min=0, help="Least number of interactions of a user.")] = 0,
    min_item: Annotated[int, typer.Option(min=0, help="Least number of interactions of an item.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Cut a data set into blocks that hold back a test for life, to measure what a recommender retains."""
    from fedrec.data.blocks import in_blocks
    from fedrec.data.sources import load_dataset

    dataset = in_blocks(load_dataset(source, say=_note), base, later, share, hold.value, min_user, min_item)
    dataset.save(out)
    _print_result(_identity(dataset, out), as_json)


def _identity(dataset: Dataset, folder: Path) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "folder": str(folder),
        "users": dataset.log.n_users,
        "items": len(dataset.catalog),
        "interactions": len(dataset.log),
        "digests": {"log": dataset.log.digest(), "catalog": dataset.catalog.digest()},
        "provenance": dataset.provenance,
    }


def _facts(dataset: Dataset) -> dict[str, Any]:
    import numpy as np

    log, n_items = dataset.log, len(dataset.catalog)
    per_item = np.bincount(log.item, minlength=n_items)
    quartiles = np.percentile(log.counts, (0, 25, 50, 75, 100)).tolist()
    return {
        "name": dataset.name,
        "users": log.n_users,
        "items": n_items,
        "items_touched": int((per_item > 0).sum()),
        "interactions": len(log),
        "density": len(log) / (log.n_users * n_items),
        "events": list(log.event_kinds),
        "time": _span(int(log.time.min()), int(log.time.max()), dataset.provenance.get("time_unit", "seconds")),
        "interactions_per_user": dict(zip(("min", "q1", "median", "q3", "max"), quartiles, strict=True)),
        "gini_of_items": _gini(per_item),
        "cleaning": {**dataset.report.to_dict(), "summary": dataset.report.summary()},
        "digests": {"log": log.digest(), "catalog": dataset.catalog.digest()},
        "provenance": dataset.provenance,
    }


def _gini(counts: NDArray[np.int64]) -> float:
    """Return how unevenly interactions fall on items: 0 all alike, near 1 all on one.

    G = 2 sum_i i x_(i) / (n sum_i x_i) - (n + 1) / n, with x in ascending order and i from 1.
    """
    import numpy as np

    n = len(counts)
    ranks = np.arange(1, n + 1)
    return float(2 * (ranks * np.sort(counts)).sum() / (n * counts.sum()) - (n + 1) / n)


def _span(first: int, last: int, unit: str) -> dict[str, Any]:
    from datetime import UTC, datetime

    if unit == "order":
        return {"unit": unit, "longest_history_position": last}
    days = [datetime.fromtimestamp(moment, UTC).isoformat() for moment in (first, last)]
    return {"unit": unit, "first": days[0], "last": days[1], "days": round((last - first) / 86400, 1)}


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result))
        return
    rows = [[label.replace("_", " "), _shown(value)] for label, value in result.items() if label != "name"]
    _print_table(str(result["name"]), ("", ""), rows)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        if "summary" in value:
            return str(value["summary"])
        return "\n".join(f"{key.replace('_', ' ')}: {_shown(one)}" for key, one in value.items() if key != "sha256")
    if isinstance(value, list):
        return ", ".join(_shown(one) for one in value)
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1 else f"{value:,.10g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _print_table(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title) if title else None, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # Text, so that a name such as '[draft]' is not taken for markup.
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
