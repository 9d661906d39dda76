"""Scale: a million registered clients, and rounds of growing cohorts; time and peak memory, one core."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Row, claim, progress, run, unclaimed
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.log import InteractionLog
from fedrec.data.population import write_population
from fedrec.data.slices import TimeSlice, TimeWindow
from fedrec.random import Key

WHAT = "Scale: time and peak memory against the population and the cohort, one core"
MODEL = {
    "kind": "transformer", "dim": 32, "blocks": 1, "heads": 2, "expand": 2, "length": 20,
    "softmax": {"kind": "sampled", "negatives": 64},
}  # fmt: skip
GIB = 1 << 30

T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """What a run goes through.

    Attributes:
        populations: people registered, ascending; the last one is what the claims are about.
        n_items: the catalogue.
        cohort: people in a round where the population varies.
        cohorts: people in a round where the cohort varies; at most the largest population.
        repeats: how many timed rounds a median is taken of.
    """

    populations: tuple[int, ...]
    n_items: int
    cohort: int
    cohorts: tuple[int, ...]
    repeats: int


FULL = Sizes((10_000, 100_000, 1_000_000), 10_000, 10_000, (1_000, 2_000, 4_000, 8_000, 16_000), 5)
QUICK = Sizes((1_000, 20_000), 2_000, 1_000, (250, 500, 1_000, 2_000), 3)


class Federation:
    """One in-process node with everybody of a log, and the server's side of a round."""

    def __init__(
        self, log: InteractionLog, dataset: Dataset, cohort: int, ids: NDArray[np.int64] | None = None
    ) -> None:
        """Register everybody in `log`, named in random streams by `ids`, and take the census of the whole time span."""
        import torch

        from fedrec.client.app import client_app
        from fedrec.client.pool import LogPool
        from fedrec.grid.in_process import InProcessGrid
        from fedrec.server.app import GridLink
        from fedrec.server.judge import initial
        from fedrec.server.round import Recipe, take_census
        from fedrec.server.state import ServerState

        torch.set_num_threads(1)
        self.recipe = Recipe(experiment_of(cohort), dataset.catalog.digest(), time.perf_counter)
        everything = TimeWindow(start=int(dataset.catalog.first_seen[0]), end=2**62)
        self.slice = TimeSlice(0, everything, everything, len(dataset.catalog), len(dataset.catalog))
        pool = LogPool.partition(log, dataset.catalog, 0, 1) if ids is None else LogPool(log, dataset.catalog, ids=ids)
        self.link = GridLink(InProcessGrid(client_app(lambda context: pool), [{}], {}))
        began = time.perf_counter()
        self.roster = take_census(self.link, everything, self.recipe)
        self.census_seconds = time.perf_counter() - began
        params = initial(self.recipe.experiment.model, len(dataset.catalog), self.recipe)
        self.state = ServerState("scale", self.recipe.experiment.digest(), dataset.catalog.digest(), params=params)

    def round(self, number: int) -> tuple[float, dict[str, NDArray[Any]]]:
        """Run this round from the initial model; return its seconds and the parameters after it."""
        from fedrec.server.round import run_round

        began = time.perf_counter()
        state, record = run_round(self.state.advanced(round=number), self.link, self.recipe, self.slice, self.roster)
        seconds = time.perf_counter() - began
        expected = min(self.recipe.experiment.training.cohort.size, self.roster.n_clients)  # type: ignore[union-attr]
        if record["clients"] != expected or record["refused"]:
            raise RuntimeError(f"{record['clients']} of {expected} clients took part: {record['refused']}")
        return seconds, dict(state.params)

    def chosen(self, number: int) -> NDArray[np.int64]:
        """Return whom the server samples in this round; everybody is eligible, so places are user numbers."""
        from fedrec.server.round import round_key
        from fedrec.server.sampling import sample

        key = round_key(self.recipe.experiment, 0, number).child("cohort")
        return sample(self.recipe.experiment.training.cohort, self.roster.n_clients, key)


def experiment_of(cohort: int) -> Experiment:
    """Return the experiment whose rounds are timed: a small transformer, one local step, a fixed cohort."""
    training = {"cohort": {"kind": "fixed", "size": cohort}, "base": {"rounds": 1000}}
    return Experiment.parse({"name": "scale", "model": MODEL, "training": training})


def memory() -> dict[str, int]:
    """Return bytes: "peak" resident so far, and what is resident now, "own" (anonymous) and "mapped" (files).

    The peak is VmHWM: the program's own memory and the pages of libraries and mapped histories that it has touched.
    """
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        kind = {"VmHWM": "peak", "RssAnon": "own", "RssFile": "mapped"}.get(name)
        if kind:
            found[kind] = int(value.split()[0]) * 1024
    return found


def peak_memory(folder: Path, cohort: int, rounds: int) -> dict[str, float]:
    """Return what a fresh process needs for some rounds on a population; see `memory`."""
    dataset = Dataset.load(folder)
    federation = Federation(dataset.log, dataset, cohort)
    before = memory()["peak"]
    seconds = [federation.round(number)[0] for number in range(rounds)]
    return {**memory(), "census_peak": before, "census": federation.census_seconds, "round": float(np.median(seconds))}


def same_cohort(folder: Path, cohort: int, repeats: int) -> dict[str, float]:
    """Time rounds with everybody registered against rounds with only that round's cohort registered, in turn."""
    dataset = Dataset.load(folder)
    all_of_them = Federation(dataset.log, dataset, cohort)
    many, few, apart = [], [], 0.0
    with tempfile.TemporaryDirectory() as beside:
        for number in range(repeats + 1):
            users = all_of_them.chosen(number)
            dataset.log.take_users(users).save(Path(beside) / str(number))
            alone = Federation(InteractionLog.load(Path(beside) / str(number)), dataset, cohort, ids=users)
            pair = [all_of_them, alone] if number % 2 else [alone, all_of_them]
            done = {id(federation): federation.round(number) for federation in pair}
            (a, params), (b, others) = done[id(all_of_them)], done[id(alone)]
            apart = max(apart, *(float(np.abs(params[name] - others[name]).max()) for name in params))
            if number:  # the first is the warm-up
                many.append(a)
                few.append(b)
    ratios = np.array(many) / np.array(few)
    return {
        "many": float(np.median(many)), "few": float(np.median(few)), "ratio": float(np.median(ratios)),
        "apart": apart, "census": all_of_them.census_seconds,
    }  # fmt: skip


def cohort_seconds(folder: Path, cohorts: Sequence[int], repeats: int) -> list[float]:
    """Return the median seconds of a round of each cohort, the cohorts in turn."""
    dataset = Dataset.load(folder)
    federations = [Federation(dataset.log, dataset, cohort) for cohort in cohorts]
    federations[0].round(0)
    seconds = [[federation.round(number)[0] for federation in federations] for number in range(repeats)]
    return [float(value) for value in np.median(seconds, axis=0)]


def linear(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Return slope, intercept and R^2 of the least-squares line.

    >>> [round(value, 6) for value in linear([1, 2, 4], [3, 5, 9])]
    [2.0, 1.0, 1.0]
    """
    slope, intercept = (float(value) for value in np.polyfit(x, y, 1))
    rest = np.asarray(y) - (slope * np.asarray(x) + intercept)
    return slope, intercept, 1.0 - float((rest**2).sum()) / float(((np.asarray(y) - np.mean(y)) ** 2).sum())


def fresh(function: Callable[..., T], *arguments: Any) -> T:
    """Return what a function returns in a new process, whose memory holds nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def measure(quick: bool, points: dict[str, list[float]]) -> list[Row]:
    """Make the populations, and measure each thing in its own process; leave the curves in `points`."""
    sizes = QUICK if quick else FULL
    reach = unclaimed if quick else claim
    with tempfile.TemporaryDirectory() as root:
        folders, rows = _populations(Path(root), sizes)
        peaks = [fresh(peak_memory, folder, sizes.cohort, 2) for folder in folders]
        pair = fresh(same_cohort, folders[-1], sizes.cohort, sizes.repeats)
        seconds = fresh(cohort_seconds, folders[-1], sizes.cohorts, min(3, sizes.repeats))
    slope, intercept, r2 = linear(sizes.cohorts, seconds)
    points["population"], points["peak"] = list(sizes.populations), [one["peak"] / GIB for one in peaks]
    points["own"], points["census_peak"] = ([one[name] / GIB for one in peaks] for name in ("own", "census_peak"))
    points["cohort"], points["seconds"], points["line"] = list(sizes.cohorts), seconds, [slope, intercept]
    n, c = f"{sizes.populations[-1]:,}", f"{sizes.cohort:,}"
    for people, one in zip(sizes.populations, peaks, strict=True):
        bound = reach if people == sizes.populations[-1] else unclaimed
        what = f"peak memory, {people:,} registered, {min(people, sizes.cohort):,} in the round"
        rows += [
            bound(f"{what} (with mapped pages)", one["peak"] / GIB, "GiB", "<=", 3.0),
            Row("  of it before the first round (libraries, census)", one["census_peak"] / GIB, "GiB"),
            Row("  resident after the rounds without mapped files", one["own"] / GIB, "GiB"),
        ]
    rows += [
        Row(f"census of {n}, once per slice", pair["census"], "s"),
        Row(f"round of {c} from {n} registered", pair["many"], "s"),
        Row(f"round of the same {c} from {c} registered", pair["few"], "s"),
        reach("round time, ratio", pair["ratio"], "x", "<=", 1.1),
        claim("largest difference between the two rounds' parameters", pair["apart"], "", "<=", 0.0),
    ]
    rows += [Row(f"round of {k:,} from {n} registered", s, "s") for k, s in zip(sizes.cohorts, seconds, strict=True)]
    return [
        *rows,
        Row("line through them: slope", slope * 1e3, "ms/client"),
        Row("line through them: intercept", intercept, "s"),
        reach("line through them: R^2", r2, "", ">=", 0.99),
    ]


def _populations(root: Path, sizes: Sizes) -> tuple[list[Path], list[Row]]:
    """Write the populations, and return their folders and how long the largest took."""
    folders, rows = [], []
    for place in progress(range(len(sizes.populations)), "populations"):
        n_users = sizes.populations[place]
        began = time.perf_counter()
        dataset = write_population(root / str(n_users), n_users, sizes.n_items, Key.from_seed(1))
        rows = [
            Row(f"making {n_users:,} people up", time.perf_counter() - began, "s"),
            Row("  their interactions", len(dataset.log), "rows"),
        ]
        folders.append(root / str(n_users))
    return folders, rows


def plot(points: dict[str, list[float]], path: Path) -> None:
    """Draw seconds against the cohort with the fitted line, and peak memory against the population."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    slope, intercept = points["line"]
    cohort = np.asarray(points["cohort"])
    left.plot(cohort, slope * cohort + intercept, color="0.6", label=f"{slope * 1e3:.3g} ms a client")
    left.plot(cohort, points["seconds"], "o", label="median of rounds")
    left.set(xlabel="clients in the round", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    left.set_xticks([0, *points["cohort"][-3:]])
    left.set_title(f"{points['population'][-1]:,.0f} registered", fontsize="medium")
    for name, label in (("peak", "peak, mapped pages included"), ("own", "after the rounds, without mapped files")):
        right.plot(points["population"], points[name], "o-", label=label)
    right.set(xlabel="registered clients", ylabel="GiB", xscale="log", ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Run the benchmark; with ``--json OUT``, also draw the curves into a PNG beside it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    points: dict[str, list[float]] = {}
    code = run("scale", WHAT, lambda quick: measure(quick, points))
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", type=Path)
    out = parser.parse_known_args()[0].json
    if out:
        plot(points, out.with_suffix(".png"))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
