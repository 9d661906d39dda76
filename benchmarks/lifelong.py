"""A life in four blocks on three data sets, everything known masked: what is learnt, what is retained, at what price.

Settings were chosen on validation parts (``--validation`` tests on those and leaves the tests out), never on a test.
``--only f3crec``, ``movietweetings`` or ``amazon-video`` runs one data set, ``--seeds N`` the first N of five seeds; a
full retraining takes two.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.harness import Row, claim, progress, run, unclaimed
from benchmarks.lives import (
    DATASETS,
    METRIC,
    Hold,
    Lived,
    blocks_of,
    experiment_of,
    forked,
    laid_over,
    live,
    shared_base,
)
from fedrec.data.cleaning import Dataset

SEEDS, RETRAINED = (1, 2, 3, 4, 5), 2
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantiles of Student's t by the number of seeds."""
UNIT = "NDCG@20"
PRIOR: dict[str, Any] = {
    "feature_rank": 0, "item_power": 0.35, "decay": 0.88, "popularity_weight": 0.1,
}  # fmt: skip
STATISTICS: dict[str, Any] = {"item_share": 1.0, "feature_share": 0.0}
BASE, LATER = 120, 12
RANKS = {"f3crec": 60, "movietweetings": 120, "amazon-video": 160}
LENGTHS = {"f3crec": 50, "movietweetings": 30, "amazon-video": 20}
NONE: dict[str, Any] = {"base": {"rounds": 0}, "later": {"rounds": 0}}
LIKES = {"history_negatives": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "fine-tune": {"later": {"dropout": 0.0}, "local": LIKES},
    "dropout fine-tune": {"local": LIKES},
    "+ history-aware negatives": {},
    "EWC": {"ewc": {"strength": 0.03}},
    "distillation on the client": {"local": {"imitate": 0.5}},
    "replay": {"local": {"replay": 0.5}},
    "F3CRec's method": {"local": {"replay": 0.5, "replay_by_shift": True}, "item_mean": 0.01},
}
"""What later blocks do, on the base that all share; but for the first two all spare old likes and use dropout."""


def spectral(name: str) -> dict[str, Any]:
    """Return the cumulative statistic alone."""
    model = {"kind": "spectral", "item_rank": RANKS[name], **PRIOR}
    return {"model": model, "training": {"statistics": STATISTICS, **NONE}}


def fitted(name: str) -> dict[str, Any]:
    """Return the transformer that the rows of the literature fine-tune."""
    return {
        "model": {
            "kind": "transformer", "dim": 64, "length": LENGTHS[name],
            "softmax": {"kind": "sampled", "negatives": 128},
        },
        "training": {
            "average": 0.95, "cohort": {"kind": "poisson", "expected": 64},
            "server": {"kind": "adam", "learning_rate": 3e-3},
            "base": {"rounds": BASE, "warmup": 10, "final": 0.05},
            "later": {"rounds": LATER, "warmup": 3, "final": 0.1, "speed": 0.5},
        },
    }  # fmt: skip


def ours(name: str) -> dict[str, Any]:
    """Return the cumulative statistic as prior, and a transformer that starts from it, rehearses and is added."""
    fit = fitted(name)
    model = {
        "kind": "blend", "prior": {"item_rank": RANKS[name], **PRIOR}, "fitted": fit["model"],
        "weights": [0.2, 0.5, 1.0, 2.0],
    }  # fmt: skip
    return {"model": model, "training": {**fit["training"], "statistics": STATISTICS, "local": {"replay": 0.5}}}


def retrained(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a life that trains a new model on all blocks so far, as long as the base, at every block."""
    base = document["training"]["base"]
    return laid_over(
        document, {"split": {"refit": "fresh"}, "training": {"later": {**base, "speed": 1.0}, "local": {"replay": 0.0}}}
    )


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with its 95 % interval (Student), or a life without randomness with one over people.

    Attributes:
        mean: of the harmonic mean of learning and retained average.
        low: lower end.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def over_seeds(lives: Sequence[Lived]) -> Spread:
    """Return the harmonic mean of several seeds; of one seed an interval of no width."""
    values = np.array([one.life.harmonic for one in lives])
    half = STUDENT[len(values)] * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Spread(float(values.mean()), float(values.mean()) - half, float(values.mean()) + half)


def over_people(one: Lived) -> Spread:
    """Return the harmonic mean of one life with an interval over people: at most, as if all blocks erred together."""
    life, releases = one.life, one.releases
    cells = [[entry["all"]["metrics"][METRIC] for entry in release["life"]] for release in releases]
    n = len(cells)

    def half(pairs: Sequence[Mapping[str, float]]) -> float:
        return sum((pair["high"] - pair["low"]) / 2 for pair in pairs) / len(pairs)

    learning, retained = half([cells[i][i] for i in range(n)]), half(cells[-1])
    total = (life.learning + life.retained) ** 2
    width = 2 * (life.retained**2 * learning + life.learning**2 * retained) / total
    return Spread(life.harmonic, life.harmonic - width, life.harmonic + width)


def rows_of(name: str, what: str, lives: Sequence[Lived], spread: Spread) -> list[Row]:
    """Return the rows of one recommender."""
    means = {part: float(np.mean([getattr(one.life, part) for one in lives])) for part in PARTS}
    seconds = float(np.mean([sum(one.seconds) for one in lives]))
    beyond = [
        Row(f"{name}: {what}, {part}", float(np.mean([last_of(one, part) for one in lives])), unit)
        for part, unit in BEYOND.items()
    ]
    return [
        Row(f"{name}: {what}, harmonic mean", spread.mean, UNIT),
        Row(f"{name}: {what}, harmonic mean, low", spread.low, UNIT),
        Row(f"{name}: {what}, harmonic mean, high", spread.high, UNIT),
        *(Row(f"{name}: {what}, {words}", means[part], UNIT) for part, words in PARTS.items()),
        *beyond,
        Row(f"{name}: {what}, learning time", seconds, "s"),
    ]


PARTS = {
    "learning": "learning average", "retained": "retained average", "forgetting": "forgetting",
    "backward": "backward transfer", "forward": "served before it is learnt",
}  # fmt: skip
BEYOND = {"coverage": "share of items", "novelty@20": "bits"}


def last_of(one: Lived, metric: str) -> float:
    """Return a metric of the last release on its own block."""
    found = one.releases[-1]["rows"]["release"]["all"]["metrics"].get(metric, {}).get("value")
    return float("nan") if found is None else float(found)


def measure_one(name: str, quick: bool, hold: Hold, n_seeds: int) -> list[Row]:
    """Live all lives on one data set."""
    dataset = blocks_of(name, hold)
    seeds = SEEDS[: 1 if quick else n_seeds]
    short: dict[str, Any] = {"training": {"base": {"rounds": 6}, "later": {"rounds": 2}}} if quick else {}
    judge = unclaimed if quick or hold == "validation" else claim
    people = {"evaluation": {"replicates": 200}}
    found: dict[str, Spread] = {}
    seconds: dict[str, float] = {}
    rows: list[Row] = []

    def table(what: str, lives: Sequence[Lived], spread: Spread | None = None) -> None:
        found[what] = spread or over_seeds(lives)
        seconds[what] = float(np.mean([sum(one.seconds) for one in lives]))
        rows.extend(rows_of(name, what, lives, found[what]))
        print(f"{name}: {what}: {found[what].mean:.4f} NDCG@20, {seconds[what]:.1f} s", file=sys.stderr)

    for what, changes in (
        ("popularity", {"model": {"item_rank": 0, "popularity_weight": 1.0}}),
        ("cumulative statistic", {}),
    ):
        one = live(experiment_of(spectral(name), 1, laid_over(changes, people)), dataset)
        table(what, [one], over_people(one))
    mine: dict[str, list[Lived]] = {"ours": [], "ours without replay": []}
    for seed in progress(seeds, f"{name}: ours"):
        with shared_base(experiment_of(ours(name), seed, short), dataset) as (one, kept):
            mine["ours"].append(one)
            no_replay = experiment_of(ours(name), seed, laid_over(short, {"training": {"local": {"replay": 0.0}}}))
            mine["ours without replay"].append(forked(no_replay, dataset, one, kept))
    for what, lives in mine.items():
        table(what, lives)
    table_of_variants(name, dataset, seeds, short, table, rows)
    for what, document in (("full retraining", fitted(name)), ("full retraining of ours", ours(name))):
        again = retrained(laid_over(document, short))
        table(what, [live(experiment_of(again, s), dataset) for s in progress(seeds[:RETRAINED], f"{name}: {what}")])
    ceiling = max(("full retraining", "full retraining of ours"), key=lambda what: found[what].mean)
    rivals = ("fine-tune", "F3CRec's method")
    rows += [
        judge(
            f"{name}: ours over {rival}, ratio of harmonic means", found["ours"].mean / found[rival].mean, "x", ">=", 1
        )
        for rival in rivals
    ]
    rows += [
        judge(f"{name}: low end of ours less high end of {rival}", found["ours"].low - found[rival].high, UNIT, ">=", 0)
        for rival in rivals
    ]
    if name == "f3crec":
        rows.append(judge(f"{name}: ours, harmonic mean", found["ours"].mean, UNIT, ">=", 0.165))
    rows.append(judge(f"{name}: ours over {ceiling}", found["ours"].mean / found[ceiling].mean, "x", ">=", 0.97))
    rows.append(judge(f"{name}: learning time over {ceiling}", seconds["ours"] / seconds[ceiling], "x", "<=", 1 / 3))
    if name == "movietweetings":
        rows += private_rows(name, dataset, seeds, judge)
    return rows


def table_of_variants(
    name: str,
    dataset: Dataset,
    seeds: Sequence[int],
    short: Mapping[str, Any],
    table: Callable[[str, Sequence[Lived]], None],
    rows: list[Row],
) -> None:
    """Fine-tune one base per seed in every way, and add up the table."""
    lives: dict[str, list[Lived]] = {what: [] for what in ("frozen base", *VARIANTS)}
    for seed in progress(seeds, f"{name}: fine-tuning"):
        frozen = laid_over(short, {"training": {"later": {"rounds": 0}}})
        alone = {"evaluation": {"local_only": {"people": 200 if seed == seeds[0] else 0}}}
        with shared_base(experiment_of(fitted(name), seed, laid_over(frozen, alone)), dataset) as (base, kept):
            lives["frozen base"].append(base)
            for what, changes in VARIANTS.items():
                changed = laid_over(short, {"training": changes})
                lives[what].append(forked(experiment_of(fitted(name), seed, changed), dataset, base, kept))
        if seed == seeds[0]:
            local = [release["rows"]["local_only"]["all"]["metrics"][METRIC]["value"] for release in base.releases]
            rows.append(Row(f"{name}: local-only, learning average of 200 people", float(np.mean(local)), UNIT))
    for what, found in lives.items():
        table(what, found)


PRIVATE: dict[str, Any] = {
    "model": {"item_rank": 60, "popularity_weight": 0.6, "decay": 0.95},
    "privacy": {
        "mode": "central", "epsilon": 8.0, "metrics": "research", "noise": "seed", "statistics": 1.0, "count": 4.0,
        "count_clip": 4.0,
    },
}  # fmt: skip


def private_rows(name: str, dataset: Dataset, seeds: Sequence[int], judge: Callable[..., Row]) -> list[Row]:
    """Return what the statistic is worth at eps 8 over the whole life, beside counts that get the whole budget."""
    counted = {
        "model": {"kind": "factorisation", "dim": 2}, "training": NONE,
        "privacy": {"mode": "central", "epsilon": 8.0, "metrics": "research", "noise": "seed", "count_clip": 4.0},
    }  # fmt: skip
    release, popular, lives = [], [], []
    for seed in progress(seeds, f"{name}: eps 8"):
        lives.append(live(experiment_of(laid_over(spectral(name), PRIVATE), seed), dataset))
        other = live(experiment_of(counted, seed), dataset)
        release.append([r["rows"]["release"]["all"]["metrics"][METRIC]["value"] for r in lives[-1].releases])
        popular.append([r["rows"]["popularity"]["all"]["metrics"][METRIC]["value"] for r in other.releases])
    mine, theirs = np.mean(release, axis=0), np.mean(popular, axis=0)
    rows = rows_of(name, "ours at lifetime eps 8 (central, delta 1e-5)", lives, over_seeds(lives))
    rows += [Row(f"{name}: DP-popularity at eps 8, slice {i}", float(value), UNIT) for i, value in enumerate(theirs)]
    rows += [
        judge(f"{name}: ours over DP-popularity at lifetime eps 8, slice {i}", float(value), "x", ">=", 1.0)
        for i, value in enumerate(mine / theirs)
    ]
    spent = max(one.releases[-1]["epsilon"] for one in lives)
    return [*rows, judge(f"{name}: epsilon spent over the life", spent, "epsilon", "<=", 8.0)]


def main(argv: Sequence[str]) -> int:
    """Run what the arguments ask for."""
    hold: Hold = "validation" if "--validation" in argv else "test"
    rest = [argument for argument in argv if argument != "--validation"]
    names: Sequence[str] = DATASETS
    n_seeds = len(SEEDS)
    if "--seeds" in rest:
        place = rest.index("--seeds")
        given = "".join(rest[place + 1 : place + 2])
        n_seeds = int(given) if given.isdigit() else 0
        if not 1 <= n_seeds <= len(SEEDS):
            print(f"--seeds takes a number from 1 to {len(SEEDS)}.", file=sys.stderr)
            return 2
        del rest[place : place + 2]
    if "--only" in rest:
        place = rest.index("--only")
        names = [rest[place + 1]] if rest[place + 1 : place + 2] else []
        if not names or names[0] not in DATASETS:
            print(f"--only takes one of {', '.join(DATASETS)}.", file=sys.stderr)
            return 2
        del rest[place : place + 2]
    title = (__doc__ or "").split("\n")[0]
    measure = lambda quick: [row for name in names for row in measure_one(name, quick, hold, n_seeds)]  # noqa: E731
    return run("lifelong", title, measure, rest, argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
