"""What a device student keeps of a spectral release, by where it begins and how it is taught, on validation.

ML-100K. One held-out interaction of each person is too little to choose by (the first student kept 97 % on one, and
87 % on the test). Here each person's last twelve are left out of training, and ten of them, all but the last two, which
are the validation and test items of leave-one-out, are asked one by one, given everything before: 9,430 questions.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import Row, run
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.log import InteractionLog
from fedrec.data.sources import load_dataset
from fedrec.grid.simulate import simulate
from fedrec.models.build import restore
from fedrec.models.configs import SpectralConfig
from fedrec.models.recommender import Recommender
from fedrec.models.transfer import StudentConfig
from fedrec.params import Params
from fedrec.random import Key
from fedrec.server.files import load_checkpoint
from fedrec.server.registry import Registry
from fedrec.server.run import CHECKPOINT
from fedrec.server.spectral import spectral_params
from fedrec.server.state import ServerState
from fedrec.server.student import device_student

LEFT_OUT, ASKED, LENGTH, K = 12, 10, 60, 10
RELEASE = SpectralConfig()


def shortened(dataset: Dataset, n: int) -> Dataset:
    """Return the data set without everybody's last `n` interactions."""
    log = dataset.log
    ranges = [np.arange(a, b - n) for a, b in zip(log.offsets[:-1], log.offsets[1:], strict=True)]
    offsets, rows = np.concatenate([[0], np.cumsum([len(r) for r in ranges])]), np.concatenate(ranges)
    columns = (log.item[rows], log.time[rows], log.event[rows], log.value[rows])
    return replace(dataset, log=InteractionLog(offsets, *columns, log.user_ids))


def released(dataset: Dataset) -> tuple[Params, ServerState]:
    """Return the release of all ranks on the shortened data, and the state that holds its statistic."""
    document: dict[str, Any] = {
        "name": "choice", "data": {"source": "ml-100k"}, "split": {"kind": "leave_one_out"},
        "model": {"kind": "spectral"},
        "training": {"statistics": {}, "base": {"rounds": 0}, "later": {"rounds": 0}},
        "evaluation": {"replicates": 0, "local_only": {"people": 0}},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        simulate(Experiment.parse(document), runs=root, registry=root / "registry",
                 dataset=shortened(dataset, LEFT_OUT - 2))  # fmt: skip
        state = ServerState.from_record(*load_checkpoint(next(root.glob(f"*/*/{CHECKPOINT}"))))
        return Registry(root / "registry").load(1).params, state


def questions(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return newest items [q, l], which of them are there, the next item [q], and what the person had [q, n]."""
    log, n = dataset.log, len(dataset.catalog)
    asked = [(u, p) for u in range(log.n_users) for p in range(ASKED)]
    items, there = np.zeros((len(asked), LENGTH), np.int64), np.zeros((len(asked), LENGTH), np.bool_)
    target, had = np.zeros(len(asked), np.int64), np.zeros((len(asked), n), np.bool_)
    for row, (user, number) in enumerate(asked):
        whole = log.item[log.offsets[user] : log.offsets[user + 1]]
        place = len(whole) - LEFT_OUT + number
        newest = whole[max(0, place - LENGTH) : place]
        items[row, : len(newest)], there[row, : len(newest)] = newest, True
        target[row], had[row, whole[:place]] = whole[place], True
    return torch.from_numpy(items), torch.from_numpy(there), torch.from_numpy(target), torch.from_numpy(had)


@torch.no_grad()
def ndcg(model: Recommender, asked: tuple[torch.Tensor, ...]) -> NDArray[np.float64]:
    """Return [q] NDCG@10; ties count against the model."""
    found = []
    for first in range(0, len(asked[0]), 1024):
        items, there, target, had = (part[first : first + 1024] for part in asked)
        scores = model.score(model.encode(items, there)).masked_fill(had, -torch.inf)
        rank = (scores >= scores.gather(1, target[:, None])).sum(1)
        found.append(torch.where(rank <= K, 1.0 / torch.log2(rank + 1.0), 0.0))
    return torch.cat(found).double().numpy()


def measure(quick: bool) -> list[Row]:
    """Measure students of rank 80 by where they begin."""
    dataset = load_dataset("ml-100k", say=lambda note: print(note, file=sys.stderr))
    params, state = released(dataset)
    asked, n = questions(dataset), len(dataset.catalog)
    whole = ndcg(restore(RELEASE, n, params), asked)
    rows = [Row("the release", float(whole.mean()), "NDCG@10")]
    counts, rng = state.counts["counts"], np.random.default_rng(0)
    weights = rng.poisson(1.0, (500, dataset.log.n_users)).repeat(ASKED, axis=1)

    def add(what: str, own: NDArray[np.float64]) -> None:
        shares = (weights @ own) / (weights @ whole)
        low, high = np.percentile(shares, (2.5, 97.5))
        rows.append(Row(f"{what}: share of it", float(own.mean() / whole.mean()), ""))
        rows.extend((Row(f"{what}: low", float(low), ""), Row(f"{what}: high", float(high), "")))
        print(f"{what}: {own.mean() / whole.mean():.3f}", file=sys.stderr, flush=True)

    for power in (0.2, 0.35, 0.5):
        config = SpectralConfig(item_rank=80, feature_rank=0, item_power=power)
        start = spectral_params(state.statistic, counts, config, None, n)
        add(f"the statistic at rank 80, power {power}, not taught", ndcg(restore(config, n, start), asked))
        rates = {0.2: (), 0.35: (1e-4, 3e-4, 1e-3), 0.5: (3e-4,)}[power]
        for rate in rates[: 1 if quick else None]:
            settings = StudentConfig(model=config, learning_rate=rate)
            taught = device_student(RELEASE, params, counts, settings, n, Key.from_seed(1), start)
            add(
                f"the statistic at rank 80, power {power}, taught at rate {rate:g}",
                ndcg(restore(config, n, taught.params), asked),
            )
    config = SpectralConfig(item_rank=80, feature_rank=0)
    for rate in (1e-3, 3e-3)[: 0 if quick else None]:
        settings = StudentConfig(model=config, learning_rate=rate, steps=300)
        taught = device_student(RELEASE, params, counts, settings, n, Key.from_seed(1))
        add(
            f"the release's leading directions, taught at rate {rate:g}", ndcg(restore(config, n, taught.params), asked)
        )
    return rows


def main(argv: Sequence[str]) -> int:
    """Run what the arguments ask for."""
    return run("student_choice", (__doc__ or "").split("\n")[0], measure, argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
