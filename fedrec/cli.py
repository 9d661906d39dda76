"""The `fedrec` command. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedrec import __version__
from fedrec.data.commands import app as data_app
from fedrec.errors import FedrecError, need
from fedrec.experiments import JsonOption, RegistryOption, audit, evaluate, pretrain, simulate
from fedrec.fleet import device_app, gateway_app
from fedrec.interrupts import redeliver_interrupts
from fedrec.server.commands import app as releases_app
from fedrec.server.deploy_commands import app as server_app
from fedrec.server.privacy_commands import app as privacy_app

app = typer.Typer(
    name="fedrec",
    help="Federated lifelong recommendation: private histories stay where they are, one recommender keeps learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (simulate, pretrain, evaluate, audit):
    app.command()(verb)
app.add_typer(data_app, name="data", help="Data sets: list, fetch, describe, import.")
app.add_typer(privacy_app, name="privacy", help="Plan a privacy budget, show a ledger.")
app.add_typer(server_app, name="server", help="Launch and look after an aggregation server.")
app.add_typer(gateway_app, name="gateway", help="Serve many light devices as one node.")
app.add_typer(device_app, name="device", help="One person's device on the command line.")
app.add_typer(releases_app, name="releases", help="Releases: list, show, promote, roll back, verify.")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedrec {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Take the options that come before a verb."""


@app.command()
def recommend(
    history: Annotated[str, typer.Option("--history", help="Item ids, oldest first, separated by commas.")] = "",
    release: Annotated[str, typer.Option("--release", help="A version, or 'latest' (the promoted one).")] = "latest",
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="How many items.")] = 10,
    student: Annotated[bool, typer.Option("--student", help="Ask the release's small student for devices.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say what each score is made of.")] = False,
    moment: Annotated[
        list[str] | None, typer.Option("--moment", help="hour=21, weekday=5, device=tv or place=home; repeatable.")
    ] = None,
    registry: RegistryOption = Path("runs/registry"),
    as_json: JsonOption = False,
) -> None:
    """Recommend to a person whom the release has never seen, from what they did so far."""
    need("torch")
    from fedrec.server.recommend import recommend as serve
    from fedrec.server.registry import Registry

    loaded = Registry(registry).load(int(release) if release.isdecimal() else release)
    ids = [item.strip() for item in history.split(",") if item.strip()]
    found = serve(loaded, ids, k, student, why=explain, moment=_moment(moment or []))
    document: dict[str, Any] = {
        "release": loaded.version,
        "student": student,
        "history": [{"id": i, "title": t} for i, t in zip(ids, found.history_titles, strict=True)],
        "items": [item.to_dict() for item in found.items],
    }
    if as_json:
        print(json.dumps(document, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Release {loaded.version} recommends", title_justify="left")
    for name, justify in (("", "right"), ("id", "right"), ("title", "left"), ("genres", "left"), ("score", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    if explain:
        table.add_column("because of")
    titles = dict(zip(ids, found.history_titles, strict=True))
    for item in found.items:
        cells = [str(item.rank), item.id, item.title, ", ".join(item.attributes), f"{item.score:.3f}"]
        if item.why:
            cells.append(item.why.words(titles))
        table.add_row(
            *(Text(cell) for cell in cells)
        )  # Text, so that a title such as '[draft]' is not taken for markup
    console = Console()
    console.print("After " + ("; ".join(found.history_titles) or "nothing yet"), highlight=False, markup=False)
    console.print(table)


@app.command()
def serve(
    host: Annotated[str, typer.Option("--host", help="Address to listen on; the default is this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8080,
    student: Annotated[bool, typer.Option("--student", help="Serve the release's small student for devices.")] = False,
    registry: RegistryOption = Path("runs/registry"),
) -> None:
    """Answer requests for recommendations over HTTP from the current release, until told to end."""
    need("torch", "starlette", "uvicorn")
    from fedrec.server.registry import Registry
    from fedrec.serving.http import Served
    from fedrec.serving.http import serve as listen

    listen(Served(Registry(registry), student), host, port, lambda line: print(line, flush=True))


@app.command()
def node(
    folder: Annotated[Path, typer.Argument(help="The node's folder, as the server's `init` or `add-node` wrote it.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of `fedrec data import` to host; remembered in node.toml.")
    ] = None,
    store: Annotated[
        list[Path] | None, typer.Option("--store", help="A device store to host, once a person; remembered.")
    ] = None,
    catalog: Annotated[
        Path | None, typer.Option("--catalog", help="Folder with the public catalog.json; remembered.")
    ] = None,
    gateway: Annotated[
        Path | None, typer.Option("--gateway", help="Folder of a running gateway to speak for; remembered.")
    ] = None,
) -> None:
    """Host the people of a local data set, of device stores or of a gateway as a node, until told to end."""
    need("torch", "flwr")
    from fedrec.client.node import SETTINGS, NodeSettings, node_toml, run_node
    from fedrec.settings import parsed

    path = folder / SETTINGS
    said = {"data": data, "stores": store, "catalog": catalog, "gateway": gateway}
    changes = {
        name: [str(one.absolute()) for one in value] if isinstance(value, list) else str(value.absolute())
        for name, value in said.items()
        if value
    }
    if changes:
        from fedrec.evaluation.report import toml

        places = {"data", "stores", "gateway"}
        gone = places - set(changes) if places & set(changes) else set()
        kept = {k: v for k, v in node_toml(path).items() if k not in gone}
        parsed(NodeSettings, kept | changes, str(path))
        path.write_text(toml(kept | changes) + "\n", encoding="utf-8")
    run_node(folder, lambda line: print(line, flush=True))


@app.command()
def doctor(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of a deployment or of a node; nothing: this machine alone.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look at versions, clock, disk, ports, certificates and data, and say what to do; exit with 1 if one is wrong."""
    from fedrec.checkup import as_document, clock, disk, python_and_packages

    found = [*python_and_packages(), clock()]
    if folder is None:
        found.append(disk(Path.cwd()))
    elif (folder / "node.toml").is_file():
        from fedrec.client.node import checkup

        found += checkup(folder)
    else:
        need("torch", "flwr")
        from fedrec.server.deployment import DeploymentFolder
        from fedrec.server.supervisor import running

        place = DeploymentFolder(folder)
        found += place.checkup(running(place) is not None)
    if as_json:
        print(json.dumps({"findings": as_document(found)}))
    else:
        for one in found:
            print(f"{'ok  ' if one.ok else 'BAD '} {one.what}: {one.said}")
            if one.fix:
                print(f"     fix: {one.fix}")
    if not all(one.ok for one in found):
        raise typer.Exit(1)


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    release: Annotated[str, typer.Argument(help="A version, 'latest' (the promoted one) or 'newest'.")] = "latest",
    kind: Annotated[str, typer.Option("--format", help="'device' (for fedrec on devices) or 'onnx'.")] = "device",
    bits: Annotated[int, typer.Option("--bits", help="Of each number of a device file: 8 or 32.")] = 8,
    keep: Annotated[float, typer.Option("--keep", help="Share of directions and units that pruning keeps.")] = 1.0,
    registry: RegistryOption = Path("runs/registry"),
    as_json: JsonOption = False,
) -> None:
    """Write a release as one small file: merged, pruned if asked, 8 bits a number; or as an ONNX graph."""
    from fedrec.errors import ConfigError
    from fedrec.server.registry import Registry
    from fedrec.serving.devices import export as write

    if kind not in ("device", "onnx"):
        raise ConfigError(f"Unknown format '{kind}': --format takes 'device' or 'onnx'.")
    loaded = Registry(registry).load(int(release) if release.isdecimal() else release)
    found = write(loaded, out, "onnx" if kind == "onnx" else "device", bits, keep)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    print(
        f"{found.path}: {found.kind} of release {found.release}, {found.bytes:,} bytes "
        f"({found.bytes / found.release_bytes:.0%} of the release), shares {found.overlap:.0%} of its top 10"
    )


def _moment(words: list[str]) -> dict[str, Any]:
    """Return the moment that the command line tells."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise FedrecError(f"--moment takes a name and a value, for example hour=21, not '{word}'.")
        found[key] = int(value) if key in ("hour", "weekday", "time") and value.isdecimal() else value
    return found


def main() -> None:
    """Run the command line; a mistake gives one sentence on stderr and exit code 1."""
    redeliver_interrupts()
    try:
        app()
    except FedrecError as error:
        print(f"fedrec: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except SystemExit as stop:
        if stop.code == 130:  # typer's word for an interrupt
            print("fedrec: stopped; what was checkpointed can be resumed with --resume.", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
