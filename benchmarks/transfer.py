"""What was learnt in one domain says of another by text alone: at once, with one count, and after a few rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.asking import Questions, Scores, estimate, gains, interval, scores_of, standardised
from benchmarks.foundation import UNIT, Setting
from benchmarks.harness import Row
from benchmarks.kept import Made
from benchmarks.zoo import FEATURES, experiment_for
from fedrec.data.catalog import ItemCatalog
from fedrec.data.cleaning import Dataset
from fedrec.data.features import FeatureSettings, item_features
from fedrec.data.sources import load_dataset
from fedrec.random import Key

BUDGETS = (5, 20, 100)
"""Rounds here, of 96 people each."""
FEW: dict[str, Any] = {
    "average": 0.0,
    "cohort": {"kind": "poisson", "expected": 96.0},
    "server": {"kind": "adam", "learning_rate": 1e-2},
    "later": {"rounds": 0},
}
"""The same for both beginnings, and chosen for the one from scratch on the validation item: step sizes of 1e-2 and 3e-2
are alike after 5 and 20 rounds (.062 and .062, .081 and .082), and 2e-3 with a moving average is worse after 100 (.086
against .088)."""
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Of a model's scores beside the logarithm of the counts; validation chooses."""
FOLDS, RIDGE = 5, 10.0
BLOCK = 4_000
"""People whose scores are in memory together."""


def transfer(source: str, elsewhere: str, setting: Setting) -> list[Row]:
    """Begin with a model of another data set: no round here, one count and no round, as many rounds as from scratch."""
    dataset = load_dataset(source)
    before = setting.shelf.run(
        experiment_for(elsewhere, "text_transformer", setting.rounds(elsewhere)), load_dataset(elsewhere)
    )
    plain = {"registry": str(before.registry)}
    start = {**plain, "ages": True}
    asked, counts = everybody(dataset), taken(dataset)
    popular = _of_counts(counts, asked)
    rows = estimate(f"{source}: popularity", popular)
    told = predicted(dataset.catalog, counts)
    rows += estimate(f"{source}: popularity as text, genres and year tell it, learnt here", _of_counts(told, asked))
    head = f"{source}: learnt on {elsewhere}"
    for words, begin in (("years as they are", plain), ("years as ages", start)):
        here = setting.shelf.run(experiment_for(source, "text_transformer", 0, start=begin), dataset)
        rows += estimate(f"{head}, no round here, {words}", _gains([here], dataset, asked))
    bound = round(float(popular.mean()), 5)
    value = next(row.value for row in rows if row.what == f"{head}, no round here, years as ages")
    rows.append(setting.judge(f"{head}, no round here, against popularity", value, UNIT, ">=", bound))
    rows += _counted(head, here, dataset, counts, setting)
    for n in BUDGETS[:1] if setting.quick else BUDGETS:
        rows += _after(source, head, n, start, dataset, setting)
    return rows


def _counted(head: str, here: Made, dataset: Dataset, counts: NDArray[np.int64], setting: Setting) -> list[Row]:
    """Add the scores of the model that no round trained to the logarithm of the counts that popularity is made of."""
    tried = _with_counts(here, dataset, counts, everybody(dataset, skip=1), WEIGHTS)
    weight = max(tried, key=lambda weight: float(tried[weight].mean()))
    asked = everybody(dataset)
    both = _with_counts(here, dataset, counts, asked, (0.0, weight))
    low, high = interval(both[weight] - both[0.0])
    words = f"{head}, no round of training here, with the counts"
    return [
        Row(f"{words}: weight, chosen by validation", weight, "weight"),
        *estimate(words, both[weight]),
        setting.judge(f"{words}, minus popularity, 95 % interval low", low, UNIT, ">=", 0.0),
        Row(f"{words}, minus popularity, 95 % interval high", high, UNIT),
    ]


def _after(source: str, head: str, n: int, start: dict[str, Any], dataset: Dataset, setting: Setting) -> list[Row]:
    """Train as many rounds from the other domain's weights and from fresh ones."""
    asked = everybody(dataset)
    begun, scratch = (
        _gains([setting.shelf.run(few(source, n, seed, begin), dataset) for seed in setting.seeds], dataset, asked)
        for begin in (start, None)
    )
    low, high = interval(begun - scratch)
    seeds = f"{len(setting.seeds)} seed{'s' if len(setting.seeds) > 1 else ''}"
    words = f"{head}, {n} rounds here"
    return [
        *estimate(f"{words} ({seeds})", begun),
        *estimate(f"{source}: {n} rounds from scratch ({seeds})", scratch),
        Row(f"{words}, minus from scratch", float((begun - scratch).mean()), UNIT),
        setting.judge(f"{words}, minus from scratch, 95 % interval low", low, UNIT, ">=", 0.0),
        Row(f"{words}, minus from scratch, 95 % interval high", high, UNIT),
    ]


def few(source: str, n: int, seed: int, start: dict[str, Any] | None) -> Any:
    """Return an experiment of a few rounds."""
    training = {**FEW, "base": {"rounds": n, "warmup": n // 4, "final": 0.01}}
    changes: dict[str, Any] = {} if start is None else {"start": start}
    return experiment_for(source, "text_transformer", n, seed=seed, training=training, **changes)


def everybody(dataset: Dataset, skip: int = 0) -> Questions:
    """Return what everybody took last, also those of whom nothing else is known; with `skip`, what they took before."""
    rows = [dataset.log.history(user).tolist() for user in range(dataset.log.n_users)]
    rows = [row[: len(row) - skip] for row in rows if len(row) > skip]
    return Questions([row[:-1] for row in rows], [row[-1] for row in rows])


def taken(dataset: Dataset) -> NDArray[np.int64]:
    """Return [n] how often each item was taken, without anybody's last two interactions."""
    kept = np.concatenate([dataset.log.history(user)[:-2] for user in range(dataset.log.n_users)])
    return np.bincount(kept, minlength=len(dataset.catalog))


def predicted(catalog: ItemCatalog, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return [n] the logarithm of each item's count, as ridge regression on the other items' public vectors tells it.

    It knows the counts of four fifths of the items here, so it bounds what a model of text can know of popularity.
    """
    vectors = item_features(catalog, FeatureSettings(**{**FEATURES, "spread": 0.5}))
    known = np.c_[vectors, np.ones(len(vectors))].astype(np.float64)
    wanted, found = np.log(counts + 0.5), np.zeros(len(counts))
    fold = Key.from_seed(0).child("folds").numpy().integers(0, FOLDS, len(counts))
    for one in range(FOLDS):
        there = known[fold != one]
        weights = np.linalg.solve(there.T @ there + RIDGE * np.eye(there.shape[1]), there.T @ wanted[fold != one])
        found[fold == one] = known[fold == one] @ weights
    return found


def _of_counts(counts: NDArray[Any], asked: Questions) -> NDArray[np.float64]:
    """Return [q] gains of one score for each item, the same for everybody."""
    scores = counts.astype(np.float32)
    return np.concatenate([gains(np.tile(scores, (len(own.targets), 1)), own) for own in _blocks(asked)])


def _gains(made: Sequence[Made], dataset: Dataset, asked: Questions) -> NDArray[np.float64]:
    """Return [q] mean gains over runs."""
    found = [[gains(_scores(one, dataset, own), own) for own in _blocks(asked)] for one in made]
    mean: NDArray[np.float64] = np.mean([np.concatenate(parts) for parts in found], axis=0)
    return mean


def _with_counts(
    made: Made, dataset: Dataset, counts: NDArray[np.int64], asked: Questions, weights: Sequence[float]
) -> dict[float, NDArray[np.float64]]:
    """Return [q] gains for each weight of the model beside the logarithm of the counts."""
    found: dict[float, list[NDArray[np.float64]]] = {weight: [] for weight in weights}
    popular = standardised(np.log(counts + 0.5)[None].astype(np.float32))
    for own in _blocks(asked):
        scores = standardised(_scores(made, dataset, own))
        for weight, parts in found.items():
            parts.append(gains(popular + np.float32(weight) * scores, own))
    return {weight: np.concatenate(parts) for weight, parts in found.items()}


def _scores(made: Made, dataset: Dataset, asked: Questions) -> Scores:
    return scores_of(made.model, made.release.params, len(dataset.catalog), asked)


def _blocks(asked: Questions) -> list[Questions]:
    starts = range(0, len(asked.targets), BLOCK)
    return [Questions(asked.histories[at : at + BLOCK], asked.targets[at : at + BLOCK]) for at in starts]
