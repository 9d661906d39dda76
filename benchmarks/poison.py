"""What lying nodes cost, with the plain mean and with robust aggregation: MovieLens 100K on 100 nodes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attackers import LIES, Crowd, n_liars
from benchmarks.harness import Row, claim, progress, run
from fedrec.client.pool import LogPool
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.sources import load_dataset
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import EvaluateTask
from fedrec.random import Key
from fedrec.server.registry import Registry
from fedrec.server.run import RunFolder, cut, run_experiment

N_NODES = 100
FEW, MANY = 0.01, 0.1
ROBUST = {"kind": "bounded", "norm_factor": 1.0, "item_factor": 1.5}
METRIC = "ndcg@10"


def experiment(aggregate: dict[str, Any], rounds: int, seed: int = 1) -> Experiment:
    """Return the run that is attacked: leave-one-out, so that everybody is tested."""
    return Experiment.parse(
        {
            "name": "poison",
            "seed": seed,
            "data": {"source": "ml-100k"},
            "split": {"kind": "leave_one_out"},
            "model": {
                "kind": "transformer", "dim": 32, "blocks": 1, "heads": 2, "length": 30, "dropout": 0.1,
                "softmax": {"kind": "sampled", "negatives": 128},
            },
            "training": {
                "aggregate": aggregate,
                "average": 0.9,
                "cohort": {"kind": "fixed", "size": 400},
                "local": {"steps": 1, "learning_rate": 1.0, "clip_norm": 10.0},
                "server": {"kind": "adam", "learning_rate": 0.01},
                "base": {"rounds": rounds, "warmup": 3, "final": 0.2},
            },
            "evaluation": {"ks": [10], "replicates": 100, "local_only": {"people": 0}},
            "runtime": {"checkpoint_every": 1000},
        }
    )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What came of a run: quality with its interval, and in whose list of ten each item stands, as a share."""

    ndcg: float
    low: float
    high: float
    exposure: np.ndarray[Any, np.dtype[np.float64]]


@lru_cache(maxsize=1)
def dataset() -> Dataset:
    """Return MovieLens 100K."""
    return load_dataset("ml-100k")


def attacked(settings: Experiment, lie: str | None = None, share: float = 0.0, item: int = 0) -> Outcome:
    """Run the experiment with some of its nodes lying, and look at what was released."""
    data = dataset()
    places = np.linspace(0, N_NODES - 1, n_liars(share, N_NODES)).astype(int).tolist() if lie else []
    promoted = item if lie == "item promotion" else None
    crowd = Crowd(data.log, data.catalog, N_NODES, {place: LIES[lie] for place in places if lie}, promoted)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        registry = Registry(root / "registry")
        registry.prepare()
        document = run_experiment(settings, data, crowd, RunFolder.new(root / "runs", settings), registry)
        found = document["releases"][0]["rows"]["release"]["all"]["metrics"][METRIC]
        params = registry.load(1).params
    return Outcome(found["value"], found["low"], found["high"], exposure(settings, data, params))


def exposure(settings: Experiment, data: Dataset, params: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return in what share of all people's lists of ten each item stands."""
    window = cut(settings, data)[0].test
    n_items = len(data.catalog)
    task = EvaluateTask(window=window, ks=(10,), replicates=0, n_known_items=n_items)
    pool = LogPool(data.log, data.catalog)
    slots = np.arange(pool.census(window, data.catalog.digest()), dtype=np.int64)
    counts = {"popularity": np.ones(n_items, np.float32)}
    plan = RoundPlan(
        0, 0, task, settings.model, n_items, params, Key.from_seed(0), data.catalog.digest(), slots, counts
    )
    tally = pool.run(plan)
    return np.asarray(tally.sums["recommended"], np.float64) / tally.n_clients


def target(clean: Outcome) -> int:
    """Return the item that attackers promote: the middling one of those that stand in a list in a hundred or more."""
    shown = np.flatnonzero(clean.exposure >= 0.01)
    return int(shown[np.argsort(clean.exposure[shown], kind="stable")[len(shown) // 2]])


def measure(quick: bool) -> list[Row]:
    """Measure quality under every attack, and the exposure of a promoted item."""
    rounds = 3 if quick else 40
    mean, robust = experiment({"kind": "mean"}, rounds), experiment(ROBUST, rounds)
    plain, clean = attacked(mean), attacked(robust)
    item = target(clean)
    rows = [
        Row("nobody lies: mean", plain.ndcg, METRIC),
        claim("nobody lies: bounded, as a share of the mean", clean.ndcg / plain.ndcg, "ratio", ">=", 0.95),
        Row("promoted item: clean exposure", 100 * clean.exposure[item], "% of lists"),
    ]
    jobs = [("item promotion", FEW), *((lie, MANY) for lie in LIES)] if not quick else [("sign-flip", MANY)]
    for place in progress(range(len(jobs)), "attacks"):
        lie, share = jobs[place]
        found = attacked(robust, lie, share, item)
        what = f"{lie}, {share:.0%} of nodes, bounded"
        rows.append(claim(f"{what}: NDCG lost", 100 * (1 - found.ndcg / clean.ndcg), "%", "<=", 5.0))
        if lie == "item promotion":
            name, ratio = f"{what}: exposure of the item", found.exposure[item] / clean.exposure[item]
            rows.append(claim(name, ratio, "x clean", "<=", 2.0) if share == FEW else Row(name, ratio, "x clean"))
    for lie, share in [("item promotion", FEW), ("scaled noise", MANY)] if not quick else []:
        worse = attacked(mean, lie, share, item)
        what = f"{lie}, {share:.0%} of nodes, mean"
        rows.append(Row(f"{what}: NDCG lost", 100 * (1 - worse.ndcg / plain.ndcg), "%"))
        if lie == "item promotion":
            ratio = worse.exposure[item] / max(plain.exposure[item], 1e-9)
            rows.append(Row(f"{what}: exposure of the item", ratio, "x clean"))
    return rows


if __name__ == "__main__":
    raise SystemExit(run("poison", __doc__ or "", measure))
