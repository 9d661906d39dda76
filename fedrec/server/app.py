"""The Flower ServerApp, and the Grid as a `Link`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedrec.config import Experiment
from fedrec.data.sources import load_dataset
from fedrec.errors import FedrecError, ProtocolError, RunError
from fedrec.protocol.flower import from_record, to_record
from fedrec.protocol.link import Reply, Verb
from fedrec.protocol.parcels import Freight, Missing
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
MOST_HELD = 1000
"""Of so many tensors a link remembers that a node holds them; more are sent again."""


@dataclass(frozen=True)
class GridLink:
    """A Flower Grid as a `Link`: in-process, Ray or SuperLink, it makes no difference.

    A node is sent a tensor once: when it has answered a plan that names it, it is known to hold it. One that lost it
    says so, and is asked again in the same exchange, with all that the plan names.

    Attributes:
        grid: carries the messages.
        deadline_seconds: how long an exchange waits that names no time of its own; None: until all have answered.
    """

    grid: Grid
    deadline_seconds: float | None = None
    _held: dict[int, dict[str, None]] = field(default_factory=dict, repr=False, compare=False)

    def nodes(self) -> list[int]:
        """Return the ids of the nodes that are connected."""
        return sorted(self.grid.get_node_ids())

    def exchange(
        self,
        verb: Verb,
        documents: Mapping[int, bytes],
        timeout_seconds: float | None,
        freight: Freight | None = None,
    ) -> Iterable[Reply]:
        """Send one message to each node and yield the replies; an error reply carries its reason.

        Who lacks tensors gets as long as everybody had, for its first answer has come already.
        """
        freight = freight or Freight()
        beside = {node: freight.parcels.keys() - self._held.get(node, {}).keys() for node in documents}
        again: dict[int, bytes] = {}
        for reply in self._sent(verb, documents, beside, freight, timeout_seconds):
            lacked = _lacked(reply, freight)
            if lacked and reply.node in documents and reply.node not in again:
                again[reply.node] = documents[reply.node]
                self._forget(reply.node, lacked)
            else:
                yield self._heard(reply, lacked, freight)
        if again:
            freight.n_bytes += sum(map(len, again.values()))
            everything = dict.fromkeys(again, freight.parcels)
            for reply in self._sent(verb, again, everything, freight, timeout_seconds):
                yield self._heard(reply, _lacked(reply, freight), freight)

    def _sent(
        self,
        verb: Verb,
        documents: Mapping[int, bytes],
        beside: Mapping[int, Collection[str]],
        freight: Freight,
        timeout_seconds: float | None,
    ) -> Iterable[Reply]:
        messages = []
        for node, document in documents.items():
            parcels = {sha256: freight.get(sha256) or b"" for sha256 in sorted(beside[node])}
            freight.n_bytes += sum(map(len, parcels.values()))
            messages.append(Message(to_record(document, parcels), dst_node_id=node, message_type=MESSAGE_TYPES[verb]))
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

    def _heard(self, reply: Reply, lacked: Collection[str], freight: Freight) -> Reply:
        """Note what a node holds by its answer, and return the answer."""
        if lacked:
            self._forget(reply.node, lacked)
            return Reply(reply.node, None, f"it lacks {len(lacked)} tensors that it has just been sent")
        if reply.document is not None and freight.parcels:
            held = self._held.setdefault(reply.node, {})
            for sha256 in freight.parcels:
                held.pop(sha256, None)
                held[sha256] = None
            for sha256 in list(held)[: max(0, len(held) - max(MOST_HELD, len(freight.parcels)))]:
                del held[sha256]
        return reply

    def _forget(self, node: int, lacked: Collection[str]) -> None:
        for sha256 in lacked:
            self._held.get(node, {}).pop(sha256, None)

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


def _lacked(reply: Reply, freight: Freight) -> Collection[str]:
    """Return the digests of what a node says it lacks; none if it answers, or says what no honest node says."""
    try:
        missing = None if reply.document is None else Missing.from_bytes(reply.document)
    except ProtocolError:
        return ()
    return missing.digests if missing is not None and set(missing.digests) <= freight.parcels.keys() else ()


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
