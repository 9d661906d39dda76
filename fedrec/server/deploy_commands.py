"""`fedrec server`: make a deployment, run it, add nodes, look at it, stop it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedrec.errors import ConfigError, RunError

if TYPE_CHECKING:
    from fedrec.server.deployment import DeploymentFolder

app = typer.Typer(no_args_is_help=True, help="Launch and look after an aggregation server.")

Folder = Annotated[Path, typer.Argument(help="Folder of the deployment.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command()
def init(
    folder: Folder,
    experiment: Annotated[str, typer.Option("--experiment", help="TOML file, or a name that comes with fedrec.")],
    catalog: Annotated[
        Path | None, typer.Option("--catalog", help="Folder with the public catalog.json; nodes hold the data.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="A data set that the server may see, for a trial; nodes host shares.")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=0, help="How many node keys to make.")] = 3,
    host: Annotated[str, typer.Option("--host", help="Address that Flower listens at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Its port.")] = 8443,
    public: Annotated[
        str | None, typer.Option("--public", help="host:port that nodes connect to, if a proxy stands in front.")
    ] = None,
    metrics_port: Annotated[int, typer.Option("--metrics-port", help="Of /metrics and /health; 0: none.")] = 9464,
    signing_key: Annotated[
        Path | None,
        typer.Option("--signing-key", help="From `fedrec releases key`: sign plans, for a gateway's devices."),
    ] = None,
) -> None:
    """Make a deployment: settings, a CA, a server certificate, and keys for the first nodes."""
    from fedrec.evaluation.report import toml
    from fedrec.protocol.signing import read_key
    from fedrec.server.certificates import make_certificates, utc_clock
    from fedrec.server.deployment import CERTIFICATES, SETTINGS, Deployment, DeploymentFolder
    from fedrec.settings import parsed

    place = DeploymentFolder(folder)
    if (place.path / SETTINGS).exists():
        raise ConfigError(f"'{folder}' holds a deployment already; choose another folder, or edit its {SETTINGS}.")
    document: dict[str, Any] = {
        "experiment": str(Path(experiment).absolute()) if Path(experiment).is_file() else experiment,
        "catalog": None if catalog is None else str(catalog.absolute()),
        "data": str(Path(data).absolute()) if data and Path(data).exists() else data,
        "host": host,
        "port": port,
        "public_address": public,
        "waiting": {"minimum_nodes": max(1, nodes)},
        "operations": {"port": metrics_port},
        "signing": None if signing_key is None else {"key": str(signing_key.absolute())},
    }
    document = {name: value for name, value in document.items() if value is not None}
    parsed(Deployment, document, "the deployment")
    if signing_key is not None:
        read_key(signing_key)
    place.write_settings(
        "# A deployment of fedrec; docs/operate.md says what every key means.\n" + toml(document) + "\n"
    )
    make_certificates(place.path / CERTIFICATES, [(public or f"{host}:{port}").rpartition(":")[0], host], utc_clock())
    for number in range(nodes):
        make_node(place, f"node-{number + 1}", share=(number, nodes) if data else None)
    print(f"Made '{folder}'. Start the server with:\n  fedrec server run {folder}")
    for number in range(nodes):
        shown = f"  fedrec node {folder}/nodes/node-{number + 1}" + ("" if data else " --data FOLDER")
        print(shown if number else f"and on each node, after copying its folder there:\n{shown}")


def make_node(
    place: DeploymentFolder, name: str, public_key: Path | None = None, share: tuple[int, int] | None = None
) -> Path:
    """Make or take a node's key and write what goes to the node; the server registers the key when it looks next.

    Raises:
        ConfigError: there is such a node already, or the key is not one that Flower takes.
    """
    from fedrec.evaluation.report import toml
    from fedrec.server.certificates import check_node_key, make_node_key
    from fedrec.server.deployment import NODES
    from fedrec.server.files import make_folder, write_atomically

    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"'{name}' is no name for a node; use letters, digits, - and _.")
    registered, own = place.path / NODES / f"{name}.pub", place.path / NODES / name
    if registered.exists():
        raise ConfigError(f"There is a node '{name}' already; choose another name.")
    make_folder(own)
    own.chmod(0o700)
    line = make_node_key(own / "node.key") if public_key is None else check_node_key(public_key)
    data = place.settings.data
    document: dict[str, Any] = {"name": name, "server": place.public_address, "ca": "ca.crt", "key": "node.key"}
    if share is not None and data is not None:
        document |= {"name": None, "data": data, "share": list(share)}
    write_atomically(own / "node.toml", (toml(document) + "\n").encode())
    write_atomically(own / "ca.crt", place.certificate("ca.crt").read_bytes())
    write_atomically(registered, line)
    return own


@app.command("add-node")
def add_node(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="What to call it.")],
    public_key: Annotated[
        Path | None,
        typer.Option(
            "--public-key", help="Its public key (EC, OpenSSH format), if it keeps its own; else one is made."
        ),
    ] = None,
) -> None:
    """Let one more node take part; a running server notices at once."""
    from fedrec.server.deployment import DeploymentFolder

    own = make_node(DeploymentFolder(folder), name, public_key)
    print(f"Copy '{own}' to the node and start it there with: fedrec node {name} --data FOLDER")


@app.command()
def renew(
    folder: Folder,
    days: Annotated[int, typer.Option("--days", help="How long the certificate holds.")] = 397,
) -> None:
    """Make a new server certificate, signed by the same CA; nodes need nothing new."""
    from fedrec.server.certificates import make_certificates, utc_clock
    from fedrec.server.deployment import CERTIFICATES, DeploymentFolder

    place = DeploymentFolder(folder)
    hosts = [place.public_address.rpartition(":")[0], place.settings.host]
    make_certificates(place.path / CERTIFICATES, hosts, utc_clock(), days)
    print("Made a new server certificate; stop and run the server to use it.")


@app.command()
def run(folder: Folder) -> None:
    """Run the server until its planned life is over: wait for nodes, learn each slice when it is due, publish releases.

    It logs JSON lines, starts again what dies, goes on from the last checkpoint, and ends in good order on a signal.
    """
    from fedrec.server.deployment import DeploymentFolder
    from fedrec.server.supervisor import Supervisor

    Supervisor(DeploymentFolder(folder), say=lambda line: print(line, flush=True)).run()


@app.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Say whether the server runs and where it stands; exit with 3 if it does not run."""
    from fedrec.server.deployment import DeploymentFolder
    from fedrec.server.supervisor import standing

    place = DeploymentFolder(folder)
    _ = place.settings
    found = standing(place)
    if as_json:
        print(json.dumps(found))
    else:
        last = found.get("last")
        doing = last.get("doing", "nothing yet") if isinstance(last, dict) else "nothing yet"
        where = "" if not isinstance(last, dict) or "slice" not in last else f", slice {last['slice']}"
        print(f"{'Runs' if found['running'] else 'Does not run'} at {found['address']}; last: {doing}{where}.")
    if not found["running"]:
        raise typer.Exit(3)


@app.command()
def stop(
    folder: Folder,
    timeout: Annotated[float, typer.Option("--timeout", help="How many seconds to wait for the end.")] = 60.0,
) -> None:
    """Stop the server in good order; what was checkpointed is gone on with at the next run."""
    from fedrec.server.deployment import DeploymentFolder
    from fedrec.server.supervisor import running

    place = DeploymentFolder(folder)
    _ = place.settings
    pid = running(place)
    if pid is None:
        print("The server does not run.")
        return
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + timeout
    while running(place) is not None:
        if time.monotonic() > end:
            raise RunError(f"The server (process {pid}) did not end in {timeout:.0f} s; look at its log.")
        time.sleep(0.2)
    print("Stopped.")
