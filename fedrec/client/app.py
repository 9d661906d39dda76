"""The Flower ClientApp: a message comes in, the node's pool does the work, a message goes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedrec.client.budget import LocalBudget
from fedrec.client.node import KEY, hosted_policy, hosted_pool, hosted_shelf
from fedrec.client.pool import ClientPool, LogPool
from fedrec.client.secure import SecureNode
from fedrec.client.shelf import FOLDER, FolderShelf, MemoryShelf, Shelf, stocked
from fedrec.config import Experiment
from fedrec.data.sources import load_dataset
from fedrec.errors import RunError, TensorsMissing
from fedrec.protocol.flower import RECORD, from_record, parcels_of, to_record
from fedrec.protocol.identities import SIMULATION, STRICT, SecurePolicy
from fedrec.protocol.link import Verb
from fedrec.protocol.parcels import Held, Missing
from fedrec.protocol.plan import Census, CensusRequest, RoundPlan
from fedrec.protocol.signing import opened

SECURE: tuple[Verb, ...] = ("advertise", "share", "mask", "unmask")
MEMORY = "fedrec-secure"


class Relay(Protocol):
    """A node that hosts nobody itself: it passes the server's documents on, signatures and all, and answers back."""

    def answer(self, verb: Verb, document: bytes, parcels: Mapping[str, bytes]) -> bytes:
        """Return the answer to one question; `parcels` are the tensors that came with it, by digest."""
        ...


Host = Callable[[Context], ClientPool | Relay]


def client_app(
    pool_for: Host,
    policy_for: Callable[[Context], SecurePolicy] = lambda context: STRICT,
    shelf_for: Callable[[Context], Shelf] | None = None,
) -> ClientApp:
    """Return a ClientApp whose nodes host the pools, or relay to the gateways, that `pool_for` gives.

    Args:
        pool_for: the pool of a node, or its gateway.
        policy_for: on what the node insists in secure sums; without it, it refuses noise from a seed.
        shelf_for: where a node keeps the tensors that plans name; without it, in memory that all its nodes share.
    """
    made, shared = ClientApp(), MemoryShelf()

    def held(message: Message, context: Context) -> Held:
        return stocked(shared if shelf_for is None else shelf_for(context), parcels_of(message.content))

    @made.query("census")
    def census(message: Message, context: Context) -> Message:
        pool = pool_for(context)
        if not isinstance(pool, ClientPool):
            return _relayed(pool, "census", message)
        request = CensusRequest.from_bytes(_document(message))
        n_clients = pool.census(request.window, request.catalog_digest)
        return _reply(message, Census(node=pool.name, n_clients=n_clients, ticket=request.ticket).to_bytes())

    @made.train("run")
    def run(message: Message, context: Context) -> Message:
        pool = pool_for(context)
        if not isinstance(pool, ClientPool):
            return _relayed(pool, "run", message)
        try:
            plan = RoundPlan.from_bytes(_document(message), held(message, context))
        except TensorsMissing as error:
            return _reply(message, Missing(digests=error.digests).to_bytes())
        tally = replace(pool.run(plan), ticket=plan.ticket)
        return _reply(message, tally.to_bytes(plan.coding, pool.name))

    for verb in SECURE:
        made.train(verb)(_phase(verb, pool_for, policy_for, held))
    return made


def _phase(
    verb: Verb,
    pool_for: Host,
    policy_for: Callable[[Context], SecurePolicy],
    held: Callable[[Message, Context], Held],
) -> Callable[[Message, Context], Message]:
    """Return how a node answers in one phase of a secure sum; between them its secrets stay in its Flower context."""

    def answer(message: Message, context: Context) -> Message:
        pool = pool_for(context)
        if not isinstance(pool, ClientPool):
            return _relayed(pool, verb, message)
        kept = context.state.get(MEMORY)
        memory = None if kept is None else from_record(RecordDict({RECORD: kept}))
        node = SecureNode(pool, memory, policy_for(context), held(message, context))
        try:
            document = node.answer(verb, _document(message))
        except TensorsMissing as error:  # nothing was done, so nothing is to be remembered
            return _reply(message, Missing(digests=error.digests).to_bytes())
        context.state[MEMORY] = to_record(node.memory)[RECORD]
        return _reply(message, document)

    return answer


def _document(message: Message) -> bytes:
    """Return what the server asks; a node trusts the server that it is connected to, signed or not."""
    return opened(from_record(message.content))


def _relayed(relay: Relay, verb: Verb, message: Message) -> Message:
    return _reply(message, relay.answer(verb, from_record(message.content), parcels_of(message.content)))


def _reply(message: Message, document: bytes) -> Message:
    return Message(to_record(document), reply_to=message)


def configured_pool(context: Context) -> ClientPool | Relay:
    """Return the pool of the ``node.toml`` that `fedrec node` names, or a simulated node's share of the data.

    Raises:
        FedrecError: there is neither, or it makes no sense.
    """
    settings = context.node_config.get(KEY)
    return simulated_pool(context) if settings is None else hosted_pool(Path(str(settings)))


def configured_policy(context: Context) -> SecurePolicy:
    """Return on what the node insists that a ``node.toml`` describes; a simulated one takes noise from a seed."""
    settings = context.node_config.get(KEY)
    return SIMULATION if settings is None else hosted_policy(Path(str(settings)))


def configured_shelf(context: Context) -> Shelf:
    """Return where a node keeps tensors: beside its ``node.toml``, or beside the runs of a simulation."""
    settings = context.node_config.get(KEY)
    if settings is not None:
        return hosted_shelf(Path(str(settings)))
    return FolderShelf(Path(str(context.run_config.get("out", "runs"))) / FOLDER)


def simulated_pool(context: Context) -> LogPool:
    """Return this node's share of the experiment's data set, for Flower's own simulation engine.

    Raises:
        RunError: the node has no partition number.
    """
    partition, n_partitions = context.node_config.get("partition-id"), context.node_config.get("num-partitions")
    if not isinstance(partition, int) or not isinstance(n_partitions, int):
        raise RunError("This node has no partition-id and num-partitions; start it from a Flower simulation.")
    return _partition(
        str(context.run_config["experiment"]), partition, n_partitions, str(context.run_config.get("out", "runs"))
    )


@lru_cache(maxsize=64)
def _partition(experiment: str, partition: int, n_partitions: int, out: str) -> LogPool:
    import torch

    settings = Experiment.find(experiment)
    torch.set_num_threads(settings.runtime.threads)
    dataset = load_dataset(settings.data.source)
    # Processes come and go, so ledgers lie on disk; they outlive a run, as a person's budget does.
    budget = LocalBudget.of(settings.privacy, Path(out) / settings.name / "ledgers")
    return LogPool.partition(dataset.log, dataset.catalog, partition, n_partitions, settings.runtime.engine, budget)


app = client_app(configured_pool, configured_policy, configured_shelf)
