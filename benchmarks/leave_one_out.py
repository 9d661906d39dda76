"""Quality on MovieLens-100K: leave-one-out, full ranking, no privacy, three seeds."""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness import Row, claim, progress, run, unclaimed
from benchmarks.peers.ease import ease, item_weights
from fedrec.config import Experiment
from fedrec.data.sources import load_dataset
from fedrec.grid.simulate import simulate
from fedrec.learning import StageConfig

SEEDS = (1, 2, 3)
METRIC = "ndcg@10"
CHANCE = sum(1 / math.log2(rank + 1) for rank in range(1, 11))


def measure(quick: bool) -> list[Row]:
    """Run the experiment for each seed, and EASE on the same split."""
    experiment = Experiment.find("ml100k_leave_one_out")
    if quick:
        short = experiment.training.model_copy(update={"base": StageConfig(rounds=150, warmup=10, final=0.01)})
        experiment = experiment.model_copy(update={"training": short})
    dataset = load_dataset(experiment.data.source, say=lambda note: print(note, file=sys.stderr))
    found: dict[str, list[float]] = {}
    for seed in progress(SEEDS[: 1 if quick else None], "seeds"):
        with tempfile.TemporaryDirectory() as folder:
            document, _ = simulate(
                experiment.model_copy(update={"seed": seed}),
                runs=Path(folder),
                registry=Path(folder) / "registry",
                dataset=dataset,
                command=f"python -m benchmarks.leave_one_out (seed {seed})",
            )
        for name, groups in document["releases"][0]["rows"].items():
            found.setdefault(name, []).append(groups["all"]["metrics"][METRIC]["value"])
            found.setdefault(f"{name}, HR@10", []).append(groups["all"]["metrics"]["hr@10"]["value"])
            found.setdefault(f"{name}, 99 negatives", []).append(groups["sampled"]["metrics"][METRIC]["value"])
        found.setdefault("seconds", []).append(document["totals"]["seconds"])
    reach = unclaimed if quick else claim  # a quick run trains a tenth of the rounds
    n_candidates = len(dataset.catalog) - float(np.mean(dataset.log.counts - 1))
    unit = "NDCG@10"
    return [
        reach("federated transformer, mean of seeds", float(np.mean(found["release"])), unit, ">=", 0.095),
        reach("federated transformer, worst seed", min(found["release"]), unit, ">=", 0.095),
        Row("federated transformer, standard deviation over seeds", float(np.std(found["release"])), unit),
        Row("federated transformer, HR@10", float(np.mean(found["release, HR@10"])), "HR@10"),
        Row("popularity", found["popularity"][0], unit),
        Row("EASE, centralised, lambda 500", float(ease(dataset, item_weights(dataset, 500.0)).mean()), unit),
        claim("local-only (no federation)", float(np.mean(found["local_only"])), unit, "<=", 0.01),
        Row("chance", CHANCE / n_candidates, unit),
        Row("federated transformer, 99 negatives (old papers)", float(np.mean(found["release, 99 negatives"])), unit),
        Row("popularity, 99 negatives (old papers)", found["popularity, 99 negatives"][0], unit),
        Row("seconds per run", float(np.mean(found["seconds"])), "s"),
    ]


if __name__ == "__main__":
    raise SystemExit(run("leave_one_out", __doc__ or "", measure))
