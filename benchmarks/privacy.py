"""Quality against epsilon: private statistics, private fits and both; user level, central mode, leave-one-out."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Row, claim, progress, run, unclaimed
from benchmarks.leave_one_out import ease
from benchmarks.private_choices import CHOICES, EASE, FIT_SEEDS, FITS, PLAIN, SEEDS
from benchmarks.private_fits import combined, fitted, live, plain, quality, update_bytes
from benchmarks.private_statistics import CHOICE, DELTA, Bench
from fedrec.data.features import make_encoder
from fedrec.data.sources import load_dataset
from fedrec.errors import DataError

EPSILONS = (8.0, 4.0, 2.0, 1.0)
PLOT = Path(__file__).parent / "results" / "privacy.png"
TARGETS = {
    "ml-1m": {8.0: 0.116, 4.0: 0.102, 2.0: 0.086, 1.0: 0.060},
    "ml-100k": {8.0: 0.082, 4.0: 0.070, 2.0: 0.063, 1.0: 0.055},
}
MOST_BYTES, PEOPLE = 100_000, 60
"""Bound of one client's upload, and how many people it is measured on beside those of the longest histories."""
STUDENT = {2: 12.706, 3: 4.303, 5: 2.776}
UNIT = "NDCG@10"
Points = dict[str, dict[float, list[float]]]
"""Of each recommender and epsilon (infinite: no noise) what every seed gave."""


def measure(quick: bool, fits: bool = True) -> list[Row]:
    """Measure every budget on both data sets, and draw the curves; without `fits` what is made of statistics alone."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    found: dict[str, Points] = {}
    try:
        make_encoder("wordllama")
    except DataError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return rows
    for name in ("ml-100k",) if quick else ("ml-100k", "ml-1m"):
        try:
            dataset = load_dataset(name, say=lambda note: print(note, file=sys.stderr))
        except DataError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        bench, points = Bench(dataset), found.setdefault(name, {})
        rows += _private(name, bench, points, quick)
        rows += _traffic(name, bench, quick)
        if fits and not quick:
            rows += _fits(name, bench, points)
            rows += _exact(name, bench, points)
    if not quick:
        draw(found, PLOT)
    return rows


def _private(name: str, bench: Bench, points: Points, quick: bool) -> list[Row]:
    """Return what one round of counts and one of statistics give at each budget."""
    reach, rows = unclaimed if quick else claim, []
    for place in progress(range(len(EPSILONS)), f"{name}, statistics"):
        epsilon = EPSILONS[place]
        choice, head = CHOICES[name][epsilon], f"{name}, epsilon {epsilon:g}"
        seeds = SEEDS[name][:1] if quick else SEEDS[name]
        scores = [bench.spectral(choice, epsilon, seed) for seed in seeds]
        popular = [bench.popularity(epsilon, seed) for seed in seeds]
        points.setdefault("spectral", {})[epsilon] = scores
        points.setdefault("popularity", {})[epsilon] = popular
        what = f"{head}: spectral, mean of {len(seeds)}"
        rows.append(reach(what, float(np.mean(scores)), UNIT, ">=", TARGETS[name][epsilon]))
        rows += _spread(f"{head}: spectral", scores)
        if not quick:
            chosen = bench.spectral(choice, epsilon, 100, CHOICE)
            rows.append(Row(f"{head}: spectral, where it was chosen, other noise", chosen, UNIT))
        rows += _summary(f"{head}: popularity", popular)
    return rows


def _traffic(name: str, bench: Bench, quick: bool) -> list[Row]:
    """Return what a client sends that is alone on its node."""
    rows = []
    for epsilon in EPSILONS[:: len(EPSILONS) - 1]:
        mean, most = bench.upload_bytes(CHOICES[name][epsilon], 10 if quick else PEOPLE)
        head = f"{name}, epsilon {epsilon:g}: statistic, upload of a client alone on its node"
        rows += [Row(f"{head}, mean", mean, "bytes"), claim(f"{head}, most", most, "bytes", "<=", MOST_BYTES)]
    rows += [
        Row(f"{name}: popularity counts, upload of a client alone on its node", bench.counts_bytes(), "bytes"),
        Row(f"{name}: spectral, rounds", 2, "rounds"),
    ]
    update = update_bytes(bench, fitted(name, bench, 8.0, 1))
    rounds, cohort = FITS["base"]["rounds"], FITS["cohort"]["expected"]
    taking = rounds * cohort / bench.pool.census(CHOICE.train, bench.dataset.catalog.digest())
    return [
        *rows,
        Row(f"{name}: fit, upload of a client in one round", update, "bytes"),
        Row(f"{name}: fit, rounds", rounds, "rounds"),
        Row(f"{name}: fit, rounds in which a person takes part, mean", taking, "rounds"),
    ]


def _fits(name: str, bench: Bench, points: Points) -> list[Row]:
    """Return what a private fit gives alone, and on top of the statistic as far as charged validation adopts it."""
    rows = []
    for place in progress(range(len(EPSILONS)), f"{name}, fits"):
        epsilon = EPSILONS[place]
        head = f"{name}, epsilon {epsilon:g}"
        alone = [quality(live(bench, fitted(name, bench, epsilon, seed))) for seed in FIT_SEEDS[name]]
        lives = [live(bench, combined(name, bench, epsilon, seed)) for seed in FIT_SEEDS[name]]
        both = [quality(one) for one in lives]
        points.setdefault("DP-FedAvg transformer", {})[epsilon] = alone
        points.setdefault("combination", {})[epsilon] = both
        rows += _summary(f"{head}: DP-FedAvg transformer", alone)
        rows += _summary(f"{head}: combination", both)
        weight = float(np.mean([one["adoption"]["weight"] for one in lives]))
        rows.append(Row(f"{head}: combination, weight of the fit that was adopted, mean", weight, "weight"))
    return rows


def _exact(name: str, bench: Bench, points: Points) -> list[Row]:
    """Return the rows without privacy."""
    lives = [live(bench, plain(name, seed)) for seed in PLAIN[name]]
    found = {
        "popularity": [bench.popularity(None, 0)],
        "EASE, centralised": [ease(bench.dataset, EASE[name])],
        "spectral": [bench.spectral(CHOICES[name][None], None, 0)],
        "federated transformer": [quality(one) for one in lives],
        "local-only": [quality(one, "local_only") for one in lives],
    }
    rows = []
    for what, scores in found.items():
        points.setdefault(what, {})[math.inf] = scores
        rows += _summary(f"{name}, no privacy: {what}", scores)
    return rows


def _summary(what: str, scores: Sequence[float]) -> list[Row]:
    """Return the mean and, of several seeds, how they spread."""
    if len(scores) == 1:
        return [Row(what, scores[0], UNIT)]
    return [Row(f"{what}, mean of {len(scores)}", float(np.mean(scores)), UNIT), *_spread(what, scores)]


def _spread(what: str, scores: Sequence[float]) -> list[Row]:
    """Return half of Student's 95 % interval of the mean over seeds."""
    if len(scores) == 1:
        return []
    half = STUDENT[len(scores)] * float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
    return [Row(f"{what}, half of the 95 % interval over seeds", half, UNIT)]


def draw(found: dict[str, Points], path: Path) -> None:
    """Draw each data set's curves with the range over seeds, and what is reached without noise as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, max(1, len(found)), figsize=(6 * max(1, len(found)), 4.6), squeeze=False)
    for axis, (name, points) in zip(axes[0], found.items(), strict=True):
        for number, (label, budgets) in enumerate(points.items()):
            private = sorted(epsilon for epsilon in budgets if math.isfinite(epsilon))
            if private:
                means = [float(np.mean(budgets[epsilon])) for epsilon in private]
                ends = [_ends(budgets[epsilon], np.min, np.max) for epsilon in private]
                axis.errorbar(
                    private, means, yerr=np.transpose(ends), marker="o", capsize=3, color=f"C{number}", label=label
                )
            if math.inf in budgets:
                exact = float(np.mean(budgets[math.inf]))
                told = f"{label}, no privacy: {exact:.3f}"
                axis.axhline(exact, color=f"C{number}", linestyle=":", linewidth=1.2, label=told)
        axis.plot(*zip(*sorted(TARGETS[name].items()), strict=True), "k_", markersize=14, label="target")
        axis.set(
            title=name, xscale="log", xlabel=f"epsilon (user level, delta {DELTA:g})", ylabel="NDCG@10, full ranking"
        )
        axis.minorticks_off()
        axis.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=2, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _ends(scores: Sequence[float], low: Callable[..., float], high: Callable[..., float]) -> tuple[float, float]:
    mean = float(np.mean(scores))
    return mean - float(low(scores)), float(high(scores)) - mean


if __name__ == "__main__":
    given = sys.argv[1:]
    taken = [argument for argument in given if argument != "--statistics"]  # leaves the fits and exact models out
    sys.exit(run("privacy", __doc__ or "", lambda quick: measure(quick, taken == given), taken, given))
