"""Workload A on pfl (pfl-research): its FederatedAveraging and SimulatedBackend, in an environment of its own."""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from typing import Any

import torch

from benchmarks.peers.plain import BATCH, N_ITEMS, NEGATIVES, PER_USER, RATE, SmallClient
from benchmarks.peers.processes import print_seconds


def dataset_of(user: int) -> Any:
    """Return one user's data: 160 targets, each with its share of the negatives, so that 5 batches are one epoch."""
    from pfl.data.dataset import Dataset  # type: ignore[import-not-found]

    generator = torch.Generator().manual_seed(user)
    history = torch.randperm(N_ITEMS, generator=generator)[:PER_USER]
    return Dataset((history, torch.randint(N_ITEMS, (PER_USER, NEGATIVES // BATCH), generator=generator)))


def main() -> None:
    """Run a warm-up iteration and then `--rounds`; print the seconds of each of these."""
    parser = argparse.ArgumentParser()
    for name in ("people", "cohort", "rounds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    from pfl.aggregate.simulate import SimulatedBackend  # type: ignore[import-not-found]
    from pfl.algorithm.base import NNAlgorithmParams  # type: ignore[import-not-found]
    from pfl.algorithm.federated_averaging import FederatedAveraging  # type: ignore[import-not-found]
    from pfl.data.federated_dataset import FederatedDataset  # type: ignore[import-not-found]
    from pfl.data.sampling import get_user_sampler  # type: ignore[import-not-found]
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams  # type: ignore[import-not-found]
    from pfl.metrics import Weighted  # type: ignore[import-not-found]
    from pfl.model.pytorch import PyTorchModel  # type: ignore[import-not-found]

    class Model(SmallClient):
        def loss(self, targets: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
            return super().loss(targets, negatives.flatten())

        def metrics(self, targets: torch.Tensor, negatives: torch.Tensor) -> dict[str, Any]:
            return {"loss": Weighted.from_unweighted(float(self.loss(targets, negatives)))}

    made = Model()
    central = torch.optim.SGD(made.parameters(), lr=1.0)
    model = PyTorchModel(made, local_optimizer_create=torch.optim.SGD, central_optimizer=central)
    users = list(range(wanted.people))
    data = FederatedDataset(dataset_of, get_user_sampler("random", users))
    ends: list[float] = []

    class Clock:
        def on_train_begin(self, *, model: Any) -> Any:
            return _nothing()

        def after_central_iteration(self, aggregate: Any, model: Any, *, central_iteration: int) -> Any:
            ends.append(time.perf_counter())
            return False, _nothing()

        def on_train_end(self, *, model: Any) -> None:
            return None

    def _nothing() -> Any:
        from pfl.metrics import Metrics

        return Metrics()

    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=1 + wanted.rounds,
            evaluation_frequency=1_000_000,
            train_cohort_size=wanted.cohort,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=data, val_data=data),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=RATE, local_batch_size=BATCH),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[Clock()],
    )
    print_seconds([after - before for before, after in pairwise(ends)])
