"""Quality against epsilon: private statistics, private fits and both; user level, central mode, leave-one-out.

``--only ml-100k`` or ``ml-1m`` measures one data set; ``--part statistics``, ``fits`` or ``exact`` (no privacy) one
part. ``python -m benchmarks.privacy_plot`` draws the curves from what all parts wrote.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.harness import Row, claim, progress, run, unclaimed
from benchmarks.peers.ease import ease, item_weights
from benchmarks.private_choices import CHOICES, EASE, EXACT_SEEDS, FIT_SEEDS, FITS, SEEDS
from benchmarks.private_fits import combined, exact, fitted, live, quality, update_bytes
from benchmarks.private_statistics import CHOICE, Bench, Found
from fedrec.data.features import make_encoder
from fedrec.data.sources import load_dataset
from fedrec.errors import DataError

DATASETS = ("ml-100k", "ml-1m")
EPSILONS = (8.0, 4.0, 2.0, 1.0)
TARGETS = {
    "ml-1m": {8.0: 0.116, 4.0: 0.102, 2.0: 0.086, 1.0: 0.060},
    "ml-100k": {8.0: 0.082, 4.0: 0.070, 2.0: 0.063, 1.0: 0.055},
}
MOST_BYTES, PEOPLE = 100_000, 60
"""Bound of one client's upload, and how many people it is measured on beside those of the longest histories."""
STUDENT = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262}
"""97.5 % quantiles of Student's t by the number of seeds."""
UNIT = "NDCG@10"
HALF = "half of the 95 % interval"


def measure(quick: bool, names: Sequence[str], parts: Sequence[str]) -> list[Row]:
    """Measure every budget on some data sets; a quick run the statistics of the first."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    try:
        make_encoder("wordllama")
    except DataError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return rows
    for name in names[:1] if quick else names:
        try:
            dataset = load_dataset(name, say=lambda note: print(note, file=sys.stderr))
        except DataError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        bench = Bench(dataset)
        for part in ("statistics",) if quick else parts:
            rows += PARTS[part](name, bench, quick)
    return rows


def _statistics(name: str, bench: Bench, quick: bool) -> list[Row]:
    return _private(name, bench, quick) + _traffic(name, bench, quick)


def _private(name: str, bench: Bench, quick: bool) -> list[Row]:
    """Return what one round of counts and one of statistics give at each budget."""
    reach, rows = unclaimed if quick else claim, []
    for place in progress(range(len(EPSILONS)), f"{name}, statistics"):
        epsilon = EPSILONS[place]
        choice, head = CHOICES[name][epsilon], f"{name}, epsilon {epsilon:g}"
        seeds = SEEDS[name][:1] if quick else SEEDS[name]
        scores = [bench.spectral(choice, epsilon, seed).value for seed in seeds]
        popular = [bench.popularity(epsilon, seed).value for seed in seeds]
        mean = float(np.mean(scores))
        rows += [
            reach(f"{head}: spectral", mean, UNIT, ">=", TARGETS[name][epsilon]),
            *_spread(head, "spectral", scores),
        ]
        if not quick:
            chosen = bench.spectral(choice, epsilon, 100, CHOICE).value
            rows.append(Row(f"{head}: spectral, where it was chosen, other noise", chosen, UNIT))
        rows += _summary(head, "popularity", popular)
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
    rounds, cohort = FITS[name]["base"]["rounds"], FITS[name]["cohort"]["expected"]
    taking = rounds * cohort / bench.pool.census(CHOICE.train, bench.dataset.catalog.digest())
    return [
        *rows,
        Row(f"{name}: fit, upload of a client in one round", update, "bytes"),
        Row(f"{name}: fit, rounds", rounds, "rounds"),
        Row(f"{name}: fit, rounds in which a person takes part, mean", taking, "rounds"),
    ]


def _fits(name: str, bench: Bench, quick: bool) -> list[Row]:
    """Return what a private fit gives alone, and on top of the statistic as far as charged validation adopts it."""
    rows = []
    for place in progress(range(len(EPSILONS)), f"{name}, fits"):
        epsilon = EPSILONS[place]
        head = f"{name}, epsilon {epsilon:g}"
        alone = [live(bench, fitted(name, bench, epsilon, seed)) for seed in FIT_SEEDS[name]]
        both = [live(bench, combined(name, bench, epsilon, seed)) for seed in FIT_SEEDS[name]]
        rows += _summary(head, "DP-FedAvg transformer", [quality(one) for one in alone])
        rows += _summary(head, "combination", [quality(one) for one in both])
        weight = float(np.mean([one["adoption"]["weight"] for one in both]))
        rows.append(Row(f"{head}: combination, weight of the fit that was adopted, mean", weight, "weight"))
    return rows


def _exact(name: str, bench: Bench, quick: bool) -> list[Row]:
    """Return the rows without privacy: intervals over people where nothing is drawn, else over seeds."""
    head, rows = f"{name}, no privacy", []
    certain = {
        "popularity": bench.popularity(None, 0),
        "EASE, centralised": ease_found(bench, EASE[name]),
        "spectral": bench.spectral(CHOICES[name][None], None, 0),
    }
    for what, found in certain.items():
        rows += [
            Row(f"{head}: {what}", found.value, UNIT),
            Row(f"{head}: {what}, {HALF} over people", found.half, UNIT),
        ]
    lives = [live(bench, exact(name, seed)) for seed in progress(EXACT_SEEDS[name], f"{name}, no privacy")]
    rows += _summary(head, "federated transformer", [quality(one) for one in lives])
    return rows + _summary(head, "local-only, 200 people", [quality(one, "local_only") for one in lives])


def ease_found(bench: Bench, regularisation: float) -> Found:
    """Return centralised EASE, with its interval over people."""
    people = ease(bench.dataset, item_weights(bench.dataset, regularisation))
    return Found(float(people.mean()), 1.96 * float(people.std(ddof=1)) / math.sqrt(len(people)))


def _summary(head: str, what: str, scores: Sequence[float]) -> list[Row]:
    """Return the mean over seeds and how they spread."""
    return [Row(f"{head}: {what}", float(np.mean(scores)), UNIT), *_spread(head, what, scores)]


def _spread(head: str, what: str, scores: Sequence[float]) -> list[Row]:
    """Return half of Student's 95 % interval of the mean over seeds."""
    n = len(scores)
    if n == 1:
        return []
    half = STUDENT[n] * float(np.std(scores, ddof=1)) / math.sqrt(n)
    return [Row(f"{head}: {what}, {HALF} over {n} seeds", half, UNIT)]


PARTS = {"statistics": _statistics, "fits": _fits, "exact": _exact}


def main(argv: Sequence[str]) -> int:
    """Run what the arguments ask for."""
    rest = list(argv)
    chosen: dict[str, Sequence[str]] = {"--only": DATASETS, "--part": tuple(PARTS)}
    for option, known in chosen.items():
        if option in rest:
            place = rest.index(option)
            chosen[option] = rest[place + 1 : place + 2]
            if not set(chosen[option]) & set(known):
                print(f"{option} takes one of {', '.join(known)}.", file=sys.stderr)
                return 2
            del rest[place : place + 2]
    title = (__doc__ or "").split("\n")[0]
    return run("privacy", title, lambda quick: measure(quick, chosen["--only"], chosen["--part"]), rest, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
