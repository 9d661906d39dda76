"""A life in four blocks on three data sets, everything known masked: what is learnt, what is retained, at what price.

Settings were chosen on validation parts (``--validation`` tests on those and leaves the tests out), never on a test.
``--only f3crec``, ``movietweetings`` or ``amazon-video`` runs one data set, ``--seeds N`` the first N of five seeds.
``--part main`` measures what claims are made about; ``--part rows`` other ways not to forget, ours without each
part, and F3CRec's published protocol. Time is processor time of this process, without
evaluation. ``--keep FOLDER`` keeps every life, so that a run that was stopped goes on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, claim, option, progress, run, unclaimed
from benchmarks.life_rows import (
    COUNTED,
    DISTILLED,
    MAIN_VARIANTS,
    PRIVATE,
    TIERED,
    VARIANTS,
    fitted,
    ours,
    parts_of_ours,
    retrained,
    spectral,
)
from benchmarks.lives import (
    DATASETS,
    METRIC,
    Hold,
    Kept,
    Lived,
    blocks_of,
    experiment_of,
    forked,
    laid_over,
    shared_base,
)
from fedrec.data.cleaning import Dataset
from fedrec.evaluation.continual import matrix, measure

SEEDS = (1, 2, 3, 4, 5)
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantiles of Student's t by the number of seeds."""
UNIT = "NDCG@20"


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
        *group_rows(name, what, lives),
        Row(f"{name}: {what}, processor time of learning", seconds, "s"),
    ]


def group_rows(name: str, what: str, lives: Sequence[Lived]) -> list[Row]:
    """Return what people and items got that came with a block, and people who were there before."""
    found = []
    for group, words in GROUPS.items():
        each = [measure(matrix(one.releases, METRIC, group)) for one in lives]
        for part in ("learning", "retained"):
            values = [getattr(life, part) for life in each]
            if not np.isnan(values).any():
                found.append(Row(f"{name}: {what}, {words}, {PARTS[part]}", float(np.mean(values)), UNIT))
    return found


GROUPS = {"returning": "returning people", "new": "new people", "new_items": "new items"}
PARTS = {
    "learning": "learning average", "retained": "retained average", "forgetting": "forgetting",
    "backward": "backward transfer", "forward": "served before it is learnt",
}  # fmt: skip
BEYOND = {"coverage": "share of items", "novelty@20": "bits"}


def last_of(one: Lived, metric: str) -> float:
    """Return a metric of the last release on its own block."""
    found = one.releases[-1]["rows"]["release"]["all"]["metrics"].get(metric, {}).get("value")
    return float("nan") if found is None else float(found)


@dataclass
class Table:
    """The rows of one data set as they come in.

    Attributes:
        name: of the data set.
        dataset: its blocks.
        kept: lives that were lived before.
        seeds: which are run.
        short: changes that make a quick run short.
        rows: so far.
        found: recommender to its spread.
        seconds: recommender to its mean processor time.
    """

    name: str
    dataset: Dataset
    kept: Kept
    seeds: Sequence[int]
    short: Mapping[str, Any]
    rows: list[Row]
    found: dict[str, Spread]
    seconds: dict[str, float]

    def add(self, what: str, lives: Sequence[Lived], spread: Spread | None = None) -> None:
        """Add the rows of a recommender."""
        self.found[what] = spread or over_seeds(lives)
        self.seconds[what] = float(np.mean([sum(one.seconds) for one in lives]))
        self.rows.extend(rows_of(self.name, what, lives, self.found[what]))
        shown = f"{self.found[what].mean:.4f} NDCG@20, {self.seconds[what]:.1f} s"
        print(f"{self.name}: {what}: {shown}", file=sys.stderr, flush=True)

    def lives(self, what: str, document: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> None:
        """Live one life per seed, and add them."""
        whole = laid_over(document, laid_over(self.short, changes or {}))
        seeds = progress(self.seeds, f"{self.name}: {what}")
        self.add(what, [self.kept.live(experiment_of(whole, seed), self.dataset) for seed in seeds])

    def variants(self, which: Sequence[str], alone: int = 0) -> None:
        """Fine-tune one base per seed in each of these ways."""
        lives: dict[str, list[Lived]] = {what: [] for what in ("frozen base", *which)}
        local = []
        for seed in progress(self.seeds, f"{self.name}: fine-tuning"):
            for what, one in self._forks(seed, which, alone if seed == self.seeds[0] else 0).items():
                lives[what].append(one)
            if seed == self.seeds[0] and alone:
                base = lives["frozen base"][0]
                local = [one["rows"]["local_only"]["all"]["metrics"][METRIC]["value"] for one in base.releases]
        if local:
            words = f"{self.name}: local-only, learning average of {alone} people"
            self.rows.append(Row(words, float(np.mean(local)), UNIT))
        for what, found in lives.items():
            self.add(what, found)

    def _forks(self, seed: int, which: Sequence[str], alone: int) -> dict[str, Lived]:
        """Return the lives of one seed that share a base, the frozen one among them."""
        frozen = {"training": {"later": {"rounds": 0}}, "evaluation": {"local_only": {"people": alone}}}
        changes = {"frozen base": frozen, **{what: {"training": VARIANTS[what]} for what in which}}
        document = fitted(self.name)
        wanted = {what: experiment_of(document, seed, laid_over(self.short, one)) for what, one in changes.items()}
        found = {what: self.kept.find(one, self.dataset) for what, one in wanted.items()}
        if None in found.values():
            with shared_base(wanted["frozen base"], self.dataset) as (base, kept):
                found["frozen base"] = self.kept.put(wanted["frozen base"], self.dataset, base)
                for what, one in wanted.items():
                    if found[what] is None:
                        found[what] = self.kept.put(one, self.dataset, forked(one, self.dataset, base, kept))
        return {what: one for what, one in found.items() if one is not None}


def measure_one(name: str, part: str, quick: bool, hold: Hold, n_seeds: int, kept: Kept) -> list[Row]:
    """Live all lives of a part on one data set."""
    short: dict[str, Any] = {"training": {"base": {"rounds": 6}, "later": {"rounds": 2}}} if quick else {}
    table = Table(name, blocks_of(name, hold), kept, SEEDS[: 1 if quick else n_seeds], short, [], {}, {})
    judge = unclaimed if quick or hold == "validation" else claim
    if part == "main":
        main_rows(table, judge)
    else:
        other_rows(table)
    return table.rows


def main_rows(table: Table, judge: Callable[..., Row]) -> None:
    """Add what claims are made about, and the claims."""
    name, people = table.name, {"evaluation": {"replicates": 200}}
    popular = {"model": {"item_rank": 0, "popularity_weight": 1.0}, "training": {"statistics": {"recency": 1.0}}}
    for what, changes in (("popularity", popular), ("cumulative statistic", {})):
        one = table.kept.live(experiment_of(spectral(name), 1, laid_over(changes, people)), table.dataset)
        table.add(what, [one], over_people(one))
    table.lives("ours", ours(name))
    table.variants(MAIN_VARIANTS, alone=200)
    table.lives(CEILING, retrained(ours(name)))
    found, seconds, mine = table.found, table.seconds, table.found["ours"]
    for rival in MAIN_VARIANTS:
        ratio = mine.mean / found[rival].mean
        table.rows.append(judge(f"{name}: ours over {rival}, ratio of harmonic means", ratio, "x", ">=", 1))
        gap = mine.low - found[rival].high
        table.rows.append(judge(f"{name}: low end of ours less high end of {rival}", gap, UNIT, ">=", 0))
    if name == "f3crec":
        table.rows.append(judge(f"{name}: ours, harmonic mean", mine.mean, UNIT, ">=", 0.165))
    table.rows.append(judge(f"{name}: ours over {CEILING}", mine.mean / found[CEILING].mean, "x", ">=", 0.97))
    price = seconds["ours"] / seconds[CEILING]
    table.rows.append(judge(f"{name}: processor time over {CEILING}", price, "x", "<=", 1 / 3))
    table.rows += private_rows(table, judge if name == "movietweetings" else unclaimed)


CEILING = "full retraining of ours"


def other_rows(table: Table) -> None:
    """Add the other ways not to forget, ours without each part, and on the F3CRec blocks their own protocol."""
    name = table.name
    table.variants([what for what in VARIANTS if what not in MAIN_VARIANTS])
    for what, changes in parts_of_ours(name).items():
        table.lives(f"ours, {what}", ours(name), changes)
    table.lives("full retraining", retrained(fitted(name)))
    if name == "f3crec":
        for what, training in {"distilled": DISTILLED, "distilled, two tiers of devices": TIERED}.items():
            table.lives(what, fitted(name), {"training": training})
        theirs = {"split": {"mask": "block"}}
        for what, document in {
            "frozen base": laid_over(fitted(name), {"training": {"later": {"rounds": 0}}}),
            **{what: laid_over(fitted(name), {"training": VARIANTS[what]}) for what in MAIN_VARIANTS},
            "cumulative statistic": spectral(name),
            "ours": ours(name),
        }.items():
            table.lives(f"published mask: {what}", document, theirs)


def private_rows(table: Table, judge: Callable[..., Row]) -> list[Row]:
    """Return what the statistic is worth at eps 8 over the whole life, beside counts that get the whole budget."""
    name, dataset, seeds = table.name, table.dataset, table.seeds
    release, popular, lives = [], [], []
    for seed in progress(seeds, f"{name}: eps 8"):
        lives.append(table.kept.live(experiment_of(laid_over(spectral(name), PRIVATE), seed), dataset))
        other = table.kept.live(experiment_of(COUNTED, seed), dataset)
        release.append([r["rows"]["release"]["all"]["metrics"][METRIC]["value"] for r in lives[-1].releases])
        popular.append([r["rows"]["popularity"]["all"]["metrics"][METRIC]["value"] for r in other.releases])
    mine, theirs = np.mean(release, axis=0), np.mean(popular, axis=0)
    rows = rows_of(name, "ours at lifetime eps 8 (central, delta 1e-5)", lives, over_seeds(lives))
    rows += [Row(f"{name}: DP-popularity at eps 8, slice {i}", float(value), UNIT) for i, value in enumerate(theirs)]
    rows += [
        judge(f"{name}: ours over DP-popularity at lifetime eps 8, slice {i}", float(value), "x", ">=", 1.0)
        for i, value in enumerate(mine / theirs)
    ]
    if len(seeds) > 1:
        worst = np.min(np.divide(release, popular), axis=0)
        rows += [
            Row(f"{name}: the same, slice {i}, least of {len(seeds)} seeds", float(value), "x")
            for i, value in enumerate(worst)
        ]
    spent = max(one.releases[-1]["epsilon"] for one in lives)
    return [*rows, judge(f"{name}: epsilon spent over the life", spent, "epsilon", "<=", 8.0)]


def main(argv: Sequence[str]) -> int:
    """Run what the arguments ask for."""
    hold: Hold = "validation" if "--validation" in argv else "test"
    rest = [argument for argument in argv if argument != "--validation"]
    try:
        n_seeds = int(option(rest, "--seeds", [str(n) for n in range(1, len(SEEDS) + 1)], str(len(SEEDS))))
        keep = option(rest, "--keep", None, "")
        only = option(rest, "--only", DATASETS, "")
        part = option(rest, "--part", ("main", "rows"), "")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    kept = Kept(Path(keep) if keep else None)
    typed = [one for i, one in enumerate(argv) if one != "--keep" and argv[max(0, i - 1)] != "--keep"]
    names, parts = [only] if only else DATASETS, [part] if part else ("main", "rows")
    title = (__doc__ or "").split("\n")[0]

    def measured(quick: bool) -> list[Row]:
        return [row for name in names for one in parts for row in measure_one(name, one, quick, hold, n_seeds, kept)]

    return run("lifelong", title, measured, rest, typed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
