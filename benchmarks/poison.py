"""What lying nodes cost, with the plain mean and with robust aggregation: MovieLens 100K on 100 nodes."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attackers import CLAIMED, LIES, PROMOTIONS, Crowd, n_liars
from benchmarks.harness import Row, claim, progress, run, unclaimed
from fedrec.client.pool import LogPool
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.sources import load_dataset
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import EvaluateTask
from fedrec.random import Key
from fedrec.server.files import make_folder, write_atomically
from fedrec.server.registry import Registry
from fedrec.server.run import RunFolder, cut, run_experiment

N_NODES = 100
SEEDS = (4, 5, 6, 7, 8)
"""What is claimed is the mean over them; the rest is of the first. Settings were chosen on seeds 11 and 12."""
SHARES = (0.01, 0.05, 0.1)
FEW, MANY = SHARES[0], SHARES[-1]
ROBUST = {"kind": "bounded"}
ITEM_CLIP = 0.3
"""What a client may do to one item, where a masked sum leaves the defence to the clients."""
METRIC = "ndcg@10"


def experiment(aggregate: dict[str, Any], rounds: int, seed: int, item_clip: float | None = None) -> Experiment:
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
                "local": {"steps": 1, "learning_rate": 1.0, "clip_norm": 10.0, "item_clip": item_clip},
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


@dataclass(frozen=True)
class Runs:
    """Runs that were attacked; what is kept in the folder is not run again, so a stopped measurement goes on."""

    folder: Path

    def attacked(self, settings: Experiment, lie: str | None = None, share: float = 0.0, item: int = 0) -> Outcome:
        """Return what comes of a run with some of its nodes lying."""
        number = item if lie in PROMOTIONS else 0
        path = self.folder / f"{settings.digest()[:16]}-{lie}-{share}-{number}.json".replace(" ", "_")
        if not path.is_file():
            made = lived(settings, lie, share, item)
            make_folder(self.folder)
            write_atomically(path, json.dumps({**asdict(made), "exposure": made.exposure.tolist()}).encode())
        found = json.loads(path.read_text(encoding="utf-8"))
        return Outcome(**found | {"exposure": np.array(found["exposure"])})


def lived(settings: Experiment, lie: str | None, share: float, item: int) -> Outcome:
    """Run the experiment with some of its nodes lying, and look at what was released."""
    data = dataset()
    places = np.linspace(0, N_NODES - 1, n_liars(share, N_NODES)).astype(int).tolist() if lie else []
    promoted = item if lie in PROMOTIONS else None
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


def target(*clean: Outcome) -> int:
    """Return the item that attackers promote: the middling one of those that stand in a list in a hundred or more."""
    least = np.minimum.reduce([one.exposure for one in clean])
    common = np.flatnonzero(least >= 0.01)
    return int(common[np.argsort(least[common], kind="stable")[len(common) // 2]])


@dataclass(frozen=True)
class Seed:
    """The runs of one seed without a liar, and the item that is promoted."""

    runs: Runs
    number: int
    rounds: int

    def attacked(self, aggregate: dict[str, Any], lie: str | None = None, share: float = 0.0) -> Outcome:
        """Return what comes of a run."""
        item = self.item if lie in PROMOTIONS else 0
        return self.runs.attacked(experiment(aggregate, self.rounds, self.number), lie, share, item)

    @property
    def plain(self) -> Outcome:
        """The mean, and nobody lies."""
        return self.attacked({"kind": "mean"})

    @property
    def item(self) -> int:
        """What is promoted: shown in some lists by both rules, so that times as often means something."""
        return target(self.plain, self.attacked(ROBUST))

    def lost(self, aggregate: dict[str, Any], lie: str, share: float) -> float:
        """Return how many per cent of NDCG a lie costs."""
        return 100 * (1 - self.attacked(aggregate, lie, share).ndcg / self.attacked(aggregate).ndcg)

    def lifted(self, aggregate: dict[str, Any], lie: str, share: float) -> float:
        """Return how many times as often the promoted item is shown."""
        return times(self.attacked(aggregate, lie, share), self.attacked(aggregate), self.item)


def measure(quick: bool, runs: Runs) -> list[Row]:
    """Measure quality under every attack, and the exposure of a promoted item."""
    seeds = [Seed(runs, number, 3 if quick else 40) for number in (SEEDS[:1] if quick else SEEDS)]
    judge = unclaimed if quick else claim
    ratios = [one.attacked(ROBUST).ndcg / one.plain.ndcg for one in seeds]
    rows = [
        Row("nobody lies: mean", float(np.mean([one.plain.ndcg for one in seeds])), METRIC),
        *over(seeds, judge, "nobody lies: bounded, as a share of the mean", ratios, "ratio", ">=", 0.95),
        Row("promoted items: clean exposure, bounded", shown(seeds), "% of lists"),
    ]
    for lie, share in steps([(lie, MANY) for lie in (CLAIMED[:1] if quick else CLAIMED)]):
        lost = [one.lost(ROBUST, lie, share) for one in seeds]
        rows += over(seeds, judge, f"{lie}, {share:.0%} of nodes, bounded", lost, "% of NDCG", "<=", 5.0)
    if quick:
        return rows
    lifted = [one.lifted(ROBUST, "item promotion", FEW) for one in seeds]
    what = f"item promotion, {FEW:.0%} of nodes, bounded: exposure of the item"
    rows += over(seeds, judge, what, lifted, "x clean", "<=", 2.0)
    first = seeds[0]
    for lie, share in steps([*((lie, share) for lie in CLAIMED for share in SHARES[:-1]), ("IPM in disguise", MANY)]):
        rows.append(Row(f"{lie}, {share:.0%} of nodes, bounded, one seed", first.lost(ROBUST, lie, share), "% of NDCG"))
    for share in SHARES[1:]:
        what = f"item promotion, {share:.0%} of nodes, bounded, one seed: exposure of the item"
        rows.append(Row(what, first.lifted(ROBUST, "item promotion", share), "x clean"))
    return rows + undefended(first)


def over(
    seeds: list[Seed], judge: Any, what: str, found: list[float], unit: str, relation: str, bound: float
) -> list[Row]:
    """Return the row of a claim about the mean over seeds, and how sure that mean is."""
    rows = [judge(what, float(np.mean(found)), unit, relation, bound)]
    if len(seeds) > 1:
        error = float(np.std(found, ddof=1) / np.sqrt(len(found)))
        rows.append(Row(f"{what}: standard error over {len(seeds)} seeds", error, unit))
    return rows


def shown(seeds: list[Seed]) -> float:
    """Return in how many per cent of the lists the promoted items stand where nobody lies."""
    return float(100 * np.mean([one.attacked(ROBUST).exposure[one.item] for one in seeds]))


def undefended(seed: Seed) -> list[Row]:
    """Measure what lies cost where nobody looks at single updates, as in a masked sum; clients can bound themselves."""
    rows, mean = [], {"kind": "mean"}
    for lie, share in steps(
        [("item promotion", FEW), ("poisoned history", FEW), ("IPM", MANY), ("scaled noise", MANY)]
    ):
        what = f"{lie}, {share:.0%} of nodes, mean, one seed"
        rows.append(Row(what, seed.lost(mean, lie, share), "% of NDCG"))
        if lie in PROMOTIONS:
            rows.append(Row(f"{what}: exposure of the item", seed.lifted(mean, lie, share), "x clean"))
    clipped = experiment(mean, seed.rounds, seed.number, item_clip=ITEM_CLIP)
    clean, what = seed.runs.attacked(clipped), f"item_clip {ITEM_CLIP:g}"
    rows.append(Row(f"nobody lies: mean with {what}, as a share of the mean", clean.ndcg / seed.plain.ndcg, "ratio"))
    for share in (FEW, MANY):
        found = seed.runs.attacked(clipped, "poisoned history", share, seed.item)
        name = f"poisoned history, {share:.0%} of nodes, mean with {what}: exposure of the item"
        rows.append(Row(name, times(found, clean, seed.item), "x clean"))
    return rows


def steps(jobs: list[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """Go through the attacks behind a progress bar."""
    return (jobs[place] for place in progress(range(len(jobs)), "attacks"))


def times(attacked: Outcome, clean: Outcome, item: int) -> float:
    """Return how many times as often an item is shown as without an attack."""
    return float(attacked.exposure[item] / max(clean.exposure[item], 1e-9))


def main() -> int:
    """Measure; ``--keep FOLDER`` keeps finished runs."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--keep", type=Path)
    known, rest = parser.parse_known_args()
    what = f"{(__doc__ or '').strip()} --keep FOLDER keeps runs, so that a stopped measurement goes on."
    with tempfile.TemporaryDirectory() as spare:
        runs = Runs(known.keep or Path(spare))
        return run("poison", what, lambda quick: measure(quick, runs), rest, typed=rest)


if __name__ == "__main__":
    raise SystemExit(main())
