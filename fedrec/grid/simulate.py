"""A whole simulation in this process: data, nodes, grid, apps, run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context

from fedrec.client.app import client_app
from fedrec.client.budget import LocalBudget
from fedrec.client.pool import ClientPool, LogPool
from fedrec.client.workers import WorkerPool
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.sources import load_dataset
from fedrec.grid.in_process import SERVER_NODE_ID, InProcessGrid
from fedrec.protocol.identities import SIMULATION
from fedrec.protocol.link import Link
from fedrec.server.app import GridLink, server_app
from fedrec.server.registry import Registry
from fedrec.server.run import RunFolder, check, run_experiment
from fedrec.server.work import Observer

T = TypeVar("T")
LEDGERS = "ledgers"
DEFAULT_RUNS, DEFAULT_REGISTRY = Path("runs"), Path("runs/registry")


def simulate(
    experiment: Experiment,
    *,
    runs: Path = DEFAULT_RUNS,
    registry: Path = DEFAULT_REGISTRY,
    resume: bool = False,
    dataset: Dataset | None = None,
    command: str = "fedrec.grid.simulate.simulate(...)",
    observe: Observer = lambda event: None,
    say: Callable[[str], None] = lambda note: None,
) -> tuple[dict[str, Any], Path]:
    """Run an experiment over `InProcessGrid` and return the report's document and the run's folder.

    Args:
        experiment: what to run.
        runs: root of run folders.
        registry: where releases go.
        resume: go on with the newest unfinished run of this experiment instead of starting one.
        dataset: the interactions; loaded as the experiment says if not given.
        command: what the user typed, for the report.
        observe: is told what happens.
        say: gets notes about where data came from.

    Raises:
        FedrecError: whatever went wrong, in one sentence.
    """
    import torch

    folder = RunFolder.unfinished(runs, experiment) if resume else None
    data = load_dataset(experiment.data.source, say=say) if dataset is None else dataset
    check(experiment, data)
    torch.set_num_threads(experiment.runtime.threads)
    store = Registry(registry)
    store.prepare()
    chosen = folder or RunFolder.new(runs, experiment)

    def main(link: Link) -> dict[str, Any]:
        return run_experiment(experiment, data, link, chosen, store, command=command, observe=observe)

    return over_grid(main, experiment, data, chosen.path / LEDGERS), chosen.path


def over_grid(main: Callable[[Link], T], experiment: Experiment, data: Dataset, ledgers: Path | None) -> T:
    """Return what `main` makes of a link to as many nodes as the experiment names, with the data shared out.

    Args:
        main: what a server does.
        experiment: its table `runtime` decides.
        data: whose histories the nodes host.
        ledgers: folder of the ledgers of clients that trust nobody; None: nothing that costs privacy will be asked.
    """
    with ExitStack() as stack:
        pools = [_pool(experiment, data, index, ledgers, stack) for index in range(experiment.runtime.nodes)]
        app = client_app(lambda context: pools[context.node_id - SERVER_NODE_ID - 1], lambda context: SIMULATION)
        grid, found = InProcessGrid(app, [{}] * len(pools), {}), []

        def served(link: GridLink, context: Context) -> None:
            found.append(main(link))

        server_app(served)(grid, grid.server_context())
    return found[0]


def _pool(experiment: Experiment, data: Dataset, index: int, ledgers: Path | None, stack: ExitStack) -> ClientPool:
    """Return the pool of one node; its worker processes, if any, end with the stack."""
    runtime = experiment.runtime
    budget = None if ledgers is None else LocalBudget.of(experiment.privacy, ledgers)
    if runtime.workers == 1:
        return LogPool.partition(data.log, data.catalog, index, runtime.nodes, runtime.engine, budget)
    pool = WorkerPool(
        data.log,
        data.catalog,
        runtime.workers,
        index=index,
        n_partitions=runtime.nodes,
        engine=runtime.engine,
        budget=budget,
    )
    return stack.enter_context(pool)
