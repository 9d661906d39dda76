"""`fedrec releases`: look at the releases of a registry, choose the one that is served, and check their bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedrec.server.registry import Registry
    from fedrec.server.release import ReleaseRow

app = typer.Typer(no_args_is_help=True, help="List, choose and check the releases of a registry.")

RegistryPath = Annotated[
    Path, typer.Option("--registry", envvar="FEDREC_REGISTRY", help="Folder of the registry.", show_default=True)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Version = Annotated[str, typer.Argument(help="A number, 'latest' (the current release) or 'newest'.")]
DEFAULT = Path("runs/registry")


@app.command("list")
def list_releases(registry: RegistryPath = DEFAULT, as_json: AsJson = False) -> None:
    """List all releases, oldest first."""
    releases = _registry(registry)
    rows = releases.list()
    manifests = [_sound_manifest(releases, row) for row in rows]
    if as_json:
        _print_json(
            {
                "registry": str(registry),
                "current": next((row.version for row in rows if row.current), None),
                "releases": [
                    asdict(row) | {"damaged": found is None, "metrics": found and found["metrics"]}
                    for row, found in zip(rows, manifests, strict=True)
                ],
            }
        )
        return
    lines = [
        (
            str(row.version),
            str(row.slice),
            row.run,
            "" if row.parent is None else str(row.parent),
            "current" if row.current else "",
            "damaged" if found is None else _ndcg(found["metrics"], "release").partition(" ")[0],
            _when(row.created_at),
        )
        for row, found in zip(rows, manifests, strict=True)
    ]
    _print_table(
        f"Releases in {registry}", ("version", "slice", "run", "parent", "", "NDCG@10", "created (UTC)"), lines
    )


@app.command()
def show(version: Version = "latest", registry: RegistryPath = DEFAULT, as_json: AsJson = False) -> None:
    """Show what a release is, where it came from and what it was measured at."""
    releases = _registry(registry)
    row = releases.row(version)
    manifest = releases.manifest(row.version).model_dump()
    line = [ancestor.version for ancestor in releases.lineage(row.version)]
    if as_json:
        _print_json(asdict(row) | {"lineage": line, "manifest": manifest})
        return
    facts = [
        ("current", "yes" if row.current else "no"),
        ("run", row.run),
        ("slice", str(row.slice)),
        ("lineage", " <- ".join(str(number) for number in line)),
        ("created (UTC)", _when(row.created_at)),
        ("items", f"{manifest['n_items']:,}"),
        ("NDCG@10", _ndcg(manifest["metrics"], "release")),
        ("NDCG@10 of popularity", _ndcg(manifest["metrics"], "popularity")),
        *((name, json.dumps(manifest[name], ensure_ascii=False)) for name in ("privacy", "lesson", "student", "model")),
        *((name, str(manifest[name])) for name in ("experiment_digest", "catalog_digest", "sha256")),
    ]
    _print_table(f"Release {row.version} in {registry}", ("what", "value"), facts)


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="A number or 'newest'.")],
    registry: RegistryPath = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Make a release the current one, after checking its bytes."""
    number = _registry(registry).promote(version)
    _print_json({"current": number}) if as_json else typer.echo(f"Release {number} is current.")


@app.command()
def rollback(registry: RegistryPath = DEFAULT, as_json: AsJson = False) -> None:
    """Go back to the release that was current before the present one was promoted."""
    number = _registry(registry).rollback()
    _print_json({"current": number}) if as_json else typer.echo(f"Rolled back: release {number} is current.")


@app.command()
def verify(registry: RegistryPath = DEFAULT, as_json: AsJson = False) -> None:
    """Check every byte of every release; exit with 1 if anything is wrong."""
    releases = _registry(registry)
    problems, n_releases = releases.verify(), len(releases.list())
    if as_json:
        _print_json({"registry": str(registry), "releases": n_releases, "problems": problems})
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"Checked releases: {n_releases}; problems: {len(problems)}.")
    if problems:
        raise typer.Exit(1)


def _registry(path: Path) -> Registry:
    from fedrec.server.registry import Registry

    return Registry(path)


def _sound_manifest(releases: Registry, row: ReleaseRow) -> dict[str, Any] | None:
    """Return the manifest, or None if it is damaged: one bad release must not hide the others."""
    from fedrec.errors import CorruptRelease

    try:
        return releases.manifest(row.version).model_dump()
    except CorruptRelease:
        return None


def _ndcg(metrics: dict[str, Any], who: str) -> str:
    """Return NDCG@10 over all people with its interval, or an empty string if it was not measured."""
    try:
        found = metrics[who]["all"]["metrics"]["ndcg@10"]
        return f"{found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"
    except (KeyError, TypeError):
        return ""


def _when(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, ensure_ascii=False, indent=2))


def _print_table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column not in ("run", "value"))
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    Console().print(table)


@app.command("key")
def make_key(path: Annotated[Path, typer.Argument(help="File for the new key; it stays on the server.")]) -> None:
    """Make the key that the server signs plans and releases with, and print its public half, which devices trust."""
    from fedrec.protocol.signing import public_key, write_key

    print(public_key(write_key(path)).hex())


@app.command("sign")
def sign_release(
    key: Annotated[Path, typer.Option("--key", help="The server's key, from `fedrec releases key`.")],
    out: Annotated[Path, typer.Option("--out", help="File for the signed release.")],
    version: Version = "latest",
    catalog: Annotated[
        Path | None, typer.Option("--catalog", help="Folder of the catalogue that plans number items by, if it grew.")
    ] = None,
    first: Annotated[bool, typer.Option("--first", help="No release yet: the catalogue alone, as release 0.")] = False,
    registry: RegistryPath = DEFAULT,
) -> None:
    """Write a release as devices take it, signed; a gateway gives it out."""
    from fedrec.data.catalog import ItemCatalog
    from fedrec.errors import ConfigError
    from fedrec.protocol.signing import read_key
    from fedrec.server.device_release import first_release, signed_release
    from fedrec.server.files import write_atomically

    grown = None if catalog is None else ItemCatalog.load(catalog)
    if first:
        if grown is None:
            raise ConfigError("Release 0 is a catalogue alone; name its folder with --catalog.")
        document = first_release(grown, read_key(key))
    else:
        releases = _registry(registry)
        document = signed_release(releases.load(releases.row(version).version), read_key(key), grown)
    write_atomically(out, document)
    print(f"{len(document):,} bytes in '{out}'.")
