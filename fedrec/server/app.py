"""The Flower ServerApp, and the Grid as a `Link`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedrec.config import Experiment
from fedrec.data.sources import load_dataset
from fedrec.errors import FedrecError, ProtocolError, RunError
from fedrec.protocol.flower import from_record, to_record
from fedrec.protocol.link import Reply, Verb
from fedrec.server.deployed import run_deployed
from fedrec.server.deployment import DeploymentFolder
from fedrec.server.registry import Registry
from fedrec.server.run import RunFolder, check, run_experiment
from fedrec.server.work import Event

MESSAGE_TYPES: Mapping[Verb, str] = {
    "census": "query.census",
    "run": "train.run",
    "advertise": "train.advertise",
    "share": "train.share",
    "mask": "train.mask",
    "unmask": "train.unmask",
}


@dataclass(frozen=True)
class GridLink:
    """A Flower Grid as a `Link`: in-process, Ray or SuperLink, it makes no difference.

    Attributes:
        grid: carries the messages.
        deadline_seconds: how long an exchange waits that names no time of its own; None: until all have answered.
    """

    grid: Grid
    deadline_seconds: float | None = None

    def nodes(self) -> list[int]:
        """Return the ids of the nodes that are connected."""
        return sorted(self.grid.get_node_ids())

    def exchange(self, verb: Verb, documents: Mapping[int, bytes], timeout_seconds: float | None) -> Iterable[Reply]:
        """Send one message to each node and yield the replies; an error reply carries its reason."""
        messages = [
            Message(to_record(document), dst_node_id=node, message_type=MESSAGE_TYPES[verb])
            for node, document in documents.items()
        ]
        sent = [message.metadata for message in messages]
        for reply in self.grid.send_and_receive(messages, timeout=timeout_seconds or self.deadline_seconds):
            node = reply.metadata.src_node_id
            if reply.has_error():
                if node not in documents:  # the SuperLink's own word that a node is gone; it names the message
                    asked = reply.metadata.reply_to_message_id
                    node = next((one.dst_node_id for one in sent if one.message_id == asked), node)
                yield Reply(node, None, f"the node failed: {reply.error.reason}")
                continue
            try:
                yield Reply(node, from_record(reply.content))
            except ProtocolError as error:
                yield Reply(node, None, str(error))

    def wait_for(self, n_nodes: int, timeout_seconds: float = 120.0) -> None:
        """Return when so many nodes are connected.

        Raises:
            RunError: they are not, in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while len(found := self.nodes()) < n_nodes:
            if time.monotonic() > deadline:
                raise RunError(f"{len(found)} of {n_nodes} nodes are connected after {timeout_seconds:.0f} s.")
            time.sleep(0.2)


def server_app(main: Callable[[GridLink, Context], None]) -> ServerApp:
    """Return a ServerApp that runs `main` over the Grid that Flower hands it."""
    made = ServerApp()

    @made.main()
    def run(grid: Grid, context: Context) -> None:
        main(GridLink(grid), context)

    return made


def run_configured(link: GridLink, context: Context) -> None:
    """Carry out the experiment that Flower's run config names: keys experiment, nodes, out, registry, resume.

    A run that names a deployment (`fedrec server run`) finds everything in its folder instead.

    Relative paths start where the SuperLink was started, not where `flwr run` was typed, so give absolute ones.

    Raises:
        FedrecError: whatever went wrong; printed too, because `flwr run --stream` shows a traceback and exits with 0.
    """
    config = context.run_config
    if config.get("deployment"):
        deployment = DeploymentFolder(Path(str(config["deployment"])))
        patient = GridLink(link.grid, deployment.settings.waiting.deadline_seconds)
        run_deployed(deployment, patient, int(config.get("attempt", 0)))
        return
    try:
        experiment = Experiment.find(str(config["experiment"]))
        root, registry = (Path(str(config[key])).absolute() for key in ("out", "registry"))
        dataset = load_dataset(experiment.data.source, say=log_note)
        check(experiment, dataset)
        link.wait_for(int(config["nodes"]))
        folder = (RunFolder.unfinished if config["resume"] else RunFolder.new)(root, experiment)
        log_note(f"run {folder.path}, releases in {registry}")
        run_experiment(experiment, dataset, link, folder, Registry(registry), command="flwr run .", observe=log_event)
    except FedrecError as error:
        log_note(f"the run failed: {error}")
        raise
    log_note(f"report at {folder.path / 'report.html'}")


def log_note(note: str) -> None:
    """Print one line that Flower's log shows at once."""
    print(f"fedrec: {note}", flush=True)


def log_event(event: Event) -> None:
    """Print one line for each slice, each tenth round and each release."""
    record = event.record
    if event.kind == "slice":
        log_note(f"slice {record['slice']}: {record['rounds']} rounds, {record['clients']} clients")
    elif event.kind == "round" and record["round"] % 10 == 0:
        log_note(f"slice {record['slice']}, round {record['round']}: loss {record['loss']}")
    elif event.kind == "release":
        log_note(f"release {record['version']} after slice {record['slice']}")


app = server_app(run_configured)
