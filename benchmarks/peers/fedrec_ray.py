"""fedrec on Flower's Ray engine: the same ServerApp and ClientApp code as in-process, one node per processor core."""

from __future__ import annotations

import argparse
import time
from functools import lru_cache

import torch
from flwr.app import Context

from benchmarks.peers.processes import print_seconds
from benchmarks.peers.workloads import rounds, small
from fedrec.client.app import client_app
from fedrec.client.pool import LogPool
from fedrec.server.app import GridLink, server_app


@lru_cache(maxsize=4)
def partition(n_users: int, cohort: int, index: int, n_partitions: int) -> LogPool:
    """Return the pool of one node; made once in each process."""
    torch.set_num_threads(1)
    workload = small(n_users, cohort)
    return LogPool.partition(workload.log, workload.catalog, index, n_partitions)


def main() -> None:
    """Run warm-up rounds and then `--rounds`; print the seconds of each of these."""
    parser = argparse.ArgumentParser()
    for name in ("nodes", "people", "cohort", "rounds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    wanted = parser.parse_args()
    seconds: list[float] = []

    def run(link: GridLink, context: Context) -> None:
        link.wait_for(wanted.nodes)
        go = rounds(small(wanted.people, wanted.cohort), link)
        for _ in range(3 + wanted.rounds):  # either process may get either node, so both must have made both pools
            began = time.perf_counter()
            go()
            seconds.append(time.perf_counter() - began)

    def pool(context: Context) -> LogPool:
        index, n_partitions = (int(context.node_config[name]) for name in ("partition-id", "num-partitions"))
        return partition(wanted.people, wanted.cohort, index, n_partitions)

    from flwr.simulation import run_simulation

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app(run), client_app(pool), wanted.nodes, backend_config=resources)  # type: ignore[arg-type]
    print_seconds(seconds[3:])
