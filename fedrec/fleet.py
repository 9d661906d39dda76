"""`fedrec gateway` and `fedrec device`: a gateway for light devices, and one device on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedrec.errors import ConfigError

if TYPE_CHECKING:
    from fedrec.client.sdk import Device

gateway_app = typer.Typer(no_args_is_help=True, help="Serve many light devices as one node of a federation.")
device_app = typer.Typer(no_args_is_help=True, help="One person's device: record, recommend, take part, forget.")

GatewayFolder = Annotated[Path, typer.Argument(help="The gateway's folder.")]
DeviceFolder = Annotated[Path, typer.Argument(help="The device's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
PRIVATE = 0o600


@gateway_app.command("init")
def init_gateway(
    folder: GatewayFolder,
    trust: Annotated[list[str], typer.Option("--trust", help="Public key of a server, as `fedrec releases key` says.")],
    host: Annotated[
        str, typer.Option("--host", help="Name or address that devices call the gateway by.")
    ] = "localhost",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen at.")] = 8443,
    listen: Annotated[str, typer.Option("--listen", help="Address to listen at.")] = "127.0.0.1",
    release: Annotated[Path | None, typer.Option("--release", help="Signed release that devices are given.")] = None,
) -> None:
    """Make the folder of a gateway: certificates of its own, and gateway.toml."""
    from cryptography.hazmat.primitives.asymmetric import ec

    from fedrec.client.gateway.settings import SETTINGS, GatewaySettings
    from fedrec.evaluation.report import toml
    from fedrec.server.certificates import make_certificates, utc_clock

    path = folder / SETTINGS
    if path.exists():
        raise ConfigError(f"'{path}' exists already; edit it, or take another folder.")
    for key in trust:
        if len(key) != 64 or not set(key) <= set("0123456789abcdef"):
            raise ConfigError(f"'{key}' is no public key: 64 hexadecimal digits, as `fedrec releases key` says them.")
    said: dict[str, Any] = {"listen": f"{listen}:{port}", "address": f"{host}:{port}", "trusted": list(trust)}
    if release is not None:
        said["release"] = str(release.absolute())
    GatewaySettings.model_validate(said)
    make_certificates(folder, [host], utc_clock(), curve=ec.SECP256R1())
    path.write_text(toml(said) + "\n", encoding="utf-8")
    print(f"A gateway in '{folder}'. Add devices with `fedrec gateway add-device`, then start it with `run`.")


@gateway_app.command("add-device")
def add_device(
    folder: GatewayFolder,
    name: Annotated[str, typer.Argument(help="What to call the device here; it is never told to the server.")],
    out: Annotated[Path | None, typer.Option("--out", help="File for the enrolment; NAME.json if not given.")] = None,
) -> None:
    """Let a device in: writes its enrolment, with a token that is shown this once, into a file of mode 0600."""
    from fedrec.client.gateway.devices import Devices
    from fedrec.client.gateway.settings import GatewaySettings

    settings = GatewaySettings.load(folder)
    path = Path(f"{name}.json") if out is None else out
    if path.exists():
        raise ConfigError(f"'{path}' exists already; name another file with --out.")
    devices = Devices(folder)
    try:
        _write_private(path, enrol(folder, settings, devices, name))
    finally:
        devices.close()
    print(f"Enrolment of '{name}' in '{path}'; bring it to the device and run `fedrec device enrol`, then delete it.")


def enrol(folder: Path, settings: Any, devices: Any, name: str) -> str:
    """Add a device and return its enrolment as JSON."""
    from fedrec.client.sdk import Enrolment
    from fedrec.clock import system_clock

    if not settings.trusted:
        raise ConfigError("gateway.toml names nobody in 'trusted', so devices would act on no plan; add a public key.")
    root = settings.file(folder, settings.root_certificates)
    try:
        roots = root.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read '{root}': {error}.") from error
    token = devices.add(name, system_clock())
    made = Enrolment(address=settings.address, root_certificates=roots, token=token, trusted=settings.trusted)
    return made.model_dump_json(indent=1) + "\n"


@gateway_app.command("revoke-device")
def revoke_device(folder: GatewayFolder, name: Annotated[str, typer.Argument(help="The device.")]) -> None:
    """Let a device in no more; a running gateway knows at once."""
    from fedrec.client.gateway.devices import Devices
    from fedrec.client.gateway.settings import GatewaySettings
    from fedrec.clock import system_clock

    GatewaySettings.load(folder)
    devices = Devices(folder)
    try:
        devices.revoke(name, system_clock())
    finally:
        devices.close()
    print(f"'{name}' is refused from now on.")


@gateway_app.command("run")
def run_gateway(folder: GatewayFolder) -> None:
    """Serve devices until told to end; prints a line of JSON for each round and refusal.

    The Flower node beside it is `fedrec node NODE --gateway FOLDER`.
    """
    import asyncio

    from fedrec.client.gateway.service import serve
    from fedrec.client.gateway.settings import GatewaySettings

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)

    asyncio.run(serve(folder, GatewaySettings.load(folder), say))


@gateway_app.command("status")
def gateway_status(folder: GatewayFolder, as_json: AsJson = False) -> None:
    """Tell what goes on at a running gateway."""
    from fedrec.client.gateway.control import GatewayPool

    found = GatewayPool(folder).status()
    if as_json:
        print(json.dumps(found))
        return
    for name in ("devices", "seen", "revoked", "waiting", "check_ins", "uploads", "refused", "spool_bytes", "release"):
        print(f"{name.replace('_', ' '):12} {found[name]}")
    for one in [*found["rounds"][-5:], *found["open"]]:
        print(f"{one['verb']:12} {one['answered']} of {one['asked']} answered, {one['declined']} declined")


@device_app.command("enrol")
def enrol_device(
    folder: DeviceFolder, enrolment: Annotated[Path, typer.Argument(help="File from `fedrec gateway add-device`.")]
) -> None:
    """Tell a device its gateway, its token, and whom to trust; kept sealed in its store."""
    from fedrec.client.sdk import Enrolment

    try:
        text = enrolment.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read '{enrolment}': {error}.") from error
    with _device(folder) as device:
        device.enrol(Enrolment.parse(text, str(enrolment)))
    print(f"The device in '{folder}' is enrolled; delete '{enrolment}', which holds its token.")


@device_app.command("limit")
def limit(
    folder: DeviceFolder,
    cohort: Annotated[int | None, typer.Option("--cohort", min=1, help="Smallest cohort to hide in.")] = None,
    epsilon: Annotated[float | None, typer.Option("--epsilon", help="Most to spend over the device's life.")] = None,
    no_guarantee: Annotated[bool, typer.Option("--no-guarantee", help="Take part without an epsilon, too.")] = False,
    masked: Annotated[bool | None, typer.Option("--masked/--unmasked", help="Take part in masked sums only.")] = None,
    identities: Annotated[
        Path | None, typer.Option("--identities", help="JSON: public keys of the nodes of masked sums, people of each.")
    ] = None,
    own_epsilon: Annotated[
        float | None, typer.Option("--own-epsilon", help='Mode "local": add noise here, spend so much at most.')
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show or change what a device insists on."""
    from fedrec.client.sdk import Device, Limits
    from fedrec.protocol.identities import Identities
    from fedrec.settings import parsed

    with _device(folder) as device:
        said = {"cohort_minimum": cohort, "epsilon": epsilon, "masked": masked}
        changes: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
        if no_guarantee:
            changes["epsilon"] = None
        if identities is not None:
            known = Identities.load(identities).clients_of
            changes["identities"] = {key.hex(): n for key, n in known.items()}
        if own_epsilon is not None:
            changes["local"] = {"epsilon": own_epsilon, "metrics": "research"}
        limits = parsed(Limits, device.limits.model_dump() | changes, "the device's limits")
    if changes:
        Device(folder, limits=limits).close()
    print(limits.model_dump_json(indent=None if as_json else 1))


@device_app.command("record")
def record(
    folder: DeviceFolder,
    item: Annotated[str, typer.Argument(help="Id of the item.")],
    event: Annotated[str, typer.Option("--event", help="What happened.")] = "interaction",
    value: Annotated[float | None, typer.Option("--value", help="For example a rating.")] = None,
) -> None:
    """Keep one interaction, sealed, on this device."""
    with _device(folder) as device:
        device.record(item, event, value)


@device_app.command("recommend")
def recommend(
    folder: DeviceFolder,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="How many items.")] = 10,
    why: Annotated[bool, typer.Option("--why", help="Say which items of the history speak for each.")] = False,
    as_json: AsJson = False,
) -> None:
    """Recommend to the device's person from the release that it has; nothing is sent."""
    with _device(folder) as device:
        found: list[dict[str, Any]] = [
            {"id": one.item, "title": one.title, "score": round(one.score, 6)}
            | ({"because": [reason.title for reason in device.explain(one.item, 3)]} if why else {})
            for one in device.recommend(k)
        ]
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    for one in found:
        print(f"{one['title']}" + (f"   because of {', '.join(one['because'])}" if why else ""))


@device_app.command("participate")
def participate(
    folder: DeviceFolder,
    always: Annotated[bool, typer.Option("--always", help="Whether or not charging, unmetered and idle.")] = False,
    wait: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for something to do.")] = 20.0,
    keep_on: Annotated[bool, typer.Option("--keep-on", help="Go on, coming back when the gateway says.")] = False,
) -> None:
    """Ask the gateway for something to do, and do what the device's limits allow."""
    import time

    from fedrec.client.sdk import Conditions

    with _device(folder) as device:
        while True:
            came = device.participate(Conditions() if always else None, wait_seconds=wait)
            print(came.why, flush=True)
            if not keep_on:
                return
            time.sleep(came.come_back_seconds)


@device_app.command("log")
def log(folder: DeviceFolder, as_json: AsJson = False) -> None:
    """Show all that the device ever sent and refused, and what it has spent."""
    from dataclasses import asdict

    with _device(folder) as device:
        document: dict[str, Any] = {
            "sent": device.sent(),
            "refused": device.refused(),
            "privacy": asdict(device.privacy_spent()),
        }
    if as_json:
        print(json.dumps(document, ensure_ascii=False))
        return
    for line in document["sent"]:
        print(f"sent     {json.dumps(line, ensure_ascii=False)}")
    for line in document["refused"]:
        print(f"refused  {line['what']}: {line['why']}")
    spent = document["privacy"]["epsilon"]
    print(f"spent    {'without a guarantee' if spent is None else f'epsilon {spent:g}'}")


@device_app.command("export")
def export(folder: DeviceFolder) -> None:
    """Print the device's history as JSON lines."""
    with _device(folder) as device:
        sys.stdout.write(device.export_history())


@device_app.command("forget")
def forget(
    folder: DeviceFolder,
    item: Annotated[list[str] | None, typer.Option("--item", help="Id of an item to forget.")] = None,
    since: Annotated[int | None, typer.Option("--since", help="Forget from this time on (seconds, UTC).")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Destroy the key and remove the store.")] = False,
) -> None:
    """Delete interactions from the device; what was sent cannot be called back."""
    device = _device(folder)
    try:
        if everything:
            device.forget_everything()
            print("Everything is forgotten.")
            return
        print(f"{device.forget(items=item or None, since=since)} interactions are forgotten.")
    finally:
        device.close()


def _device(folder: Path) -> Device:
    from fedrec.client.sdk import Device

    return Device(folder)


def _write_private(path: Path, text: str) -> None:
    import os

    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE), "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"Cannot write '{path}': {error.strerror}.") from error
