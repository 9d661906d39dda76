"""A plain Flower app on Ray, as Flower's tutorials write it: one node per client, FedAvg, whole models on the wire."""

from __future__ import annotations

import argparse
import time
from functools import lru_cache
from itertools import pairwise

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.peers.plain import N_ITEMS, PER_USER, SmallClient, batches
from benchmarks.peers.plain import train as train_client
from benchmarks.peers.processes import print_seconds

client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train on this node's history and send the item table back; the user vector stays."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    history = _history(int(context.node_config["partition-id"]))
    arrays = message.content["arrays"]
    if not isinstance(arrays, ArrayRecord):
        raise TypeError("the message holds no arrays")
    model = SmallClient()
    model.load_state_dict(arrays.to_torch_state_dict(), strict=False)
    with torch.no_grad():
        model.user.copy_(model.item.weight[history].mean(0))
    train_client(model, batches(history, generator))
    record = RecordDict(
        {"arrays": _shared(model), "metrics": MetricRecord({"num-examples": PER_USER, "train_loss": 0.0})}
    )
    return Message(record, reply_to=message)


@lru_cache(maxsize=2048)
def _history(partition: int) -> torch.Tensor:
    return torch.randperm(N_ITEMS, generator=torch.Generator().manual_seed(partition))[:PER_USER]


def _shared(model: SmallClient) -> ArrayRecord:
    return ArrayRecord({"item.weight": model.item.weight.detach()})


def main() -> None:
    """Run one warm-up round and then `--rounds`; print the seconds of each of these."""
    parser = argparse.ArgumentParser()
    for name in ("nodes", "cohort", "rounds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    wanted = parser.parse_args()
    ends: list[float] = []
    server = ServerApp()

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        torch.manual_seed(1)
        strategy = FedAvg(fraction_train=wanted.cohort / wanted.nodes, fraction_evaluate=0.0, min_available_nodes=2)

        def note(round_number: int, arrays: ArrayRecord) -> MetricRecord:
            ends.append(time.perf_counter())
            return MetricRecord({"round": round_number})

        strategy.start(grid, _shared(SmallClient()), num_rounds=1 + wanted.rounds, evaluate_fn=note)

    from flwr.simulation import run_simulation

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, wanted.nodes, backend_config=resources)  # type: ignore[arg-type]
    print_seconds([after - before for before, after in pairwise(ends[1:])])
