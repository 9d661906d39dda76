"""What was learnt in one domain says of another by text alone: at once, with one count, and after a few rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.asking import Questions, Scores, estimate, gains, interval, scores_of
from benchmarks.foundation import UNIT, Setting
from benchmarks.harness import Row
from benchmarks.kept import Made
from benchmarks.zoo import FEATURES, experiment_for
from fedrec.data.catalog import ItemCatalog
from fedrec.data.cleaning import Dataset
from fedrec.data.features import FeatureSettings, item_features
from fedrec.data.sources import load_dataset
from fedrec.models.freeze import PRIOR
from fedrec.random import Key

BUDGETS = (5, 20, 100)
"""Rounds here, of 96 people each."""
ELSEWHERE = 300
"""Rounds there; 1,000 are no better on the validation item here."""
MODEL: dict[str, Any] = {"popularity_weight": 1.0, "features": {**FEATURES, "spread": 0.5}}
"""Of both beginnings: what is learnt, there and here, is what popularity does not tell."""
CONFIDENCES = (1.0, 0.5, 0.33, 0.25, 0.2, 0.14, 0.1)
"""Factors on what was learnt elsewhere beside the logarithm of the counts; validation chooses."""
CONFIDENCE = 0.25
"""Of rounds here: what the row without any chooses."""
RATES = (3e-3, 1e-2)
"""Step sizes of rounds here for either beginning; validation chooses for each number of rounds, over all seeds."""
FIRST_SEED = 4
"""Of rounds here: 1 to 3 were seen when one seed still chose the step size (docs/models.md)."""
FOLDS, RIDGE = 5, 10.0
BLOCK = 4_000
"""People whose scores are in memory together."""


def transfer(source: str, elsewhere: str, setting: Setting) -> list[Row]:
    """Begin with a model of another data set: no round here, one count and no round, as many rounds as from scratch."""
    dataset = load_dataset(source)
    there = 60 if setting.quick else ELSEWHERE
    before = setting.shelf.run(
        experiment_for(elsewhere, "text_transformer", there, model=MODEL), load_dataset(elsewhere)
    )
    start = {"registry": str(before.registry), "ages": True}
    asked, counts = everybody(dataset), taken(dataset)
    popular = _of_counts(counts, asked)
    rows = estimate(f"{source}: popularity", popular)
    told = predicted(dataset.catalog, counts)
    rows += estimate(f"{source}: popularity as text, genres and year tell it, learnt here", _of_counts(told, asked))
    head = f"{source}: learnt on {elsewhere}"
    here = setting.shelf.run(experiment_for(source, "text_transformer", 0, model=MODEL, start=start), dataset)
    alone = _gains([_believed(here, 0.0)], dataset, asked)
    rows += estimate(f"{head}, no round and no count here", alone)
    bound = round(float(popular.mean()), 5)
    rows.append(
        setting.judge(f"{head}, no round and no count here, against popularity", float(alone.mean()), UNIT, ">=", bound)
    )
    rows += _counted(head, here, dataset, popular, setting)
    for n in BUDGETS[:1] if setting.quick else BUDGETS:
        rows += _after(source, head, n, start, dataset, setting)
    return rows


def _counted(head: str, here: Made, dataset: Dataset, popular: NDArray[np.float64], setting: Setting) -> list[Row]:
    """Give the model that no round trained here the counts that popularity is made of."""
    asked, before = everybody(dataset), everybody(dataset, skip=1)
    found = {c: float(_gains([_believed(here, c)], dataset, before).mean()) for c in CONFIDENCES}
    chosen = max(found, key=found.__getitem__)
    value = _gains([_believed(here, chosen)], dataset, asked)
    low, high = interval(value - popular)
    words = f"{head}, no round of training here, with the counts"
    return [
        Row(f"{words}: confidence, chosen by validation", chosen, "factor"),
        Row(f"{words}, where it is chosen", found[chosen], UNIT),
        *estimate(words, value),
        Row(f"{words}, minus popularity", float((value - popular).mean()), UNIT),
        setting.judge(f"{words}, minus popularity, 95 % interval low", low, UNIT, ">=", 0.0),
        Row(f"{words}, minus popularity, 95 % interval high", high, UNIT),
    ]


def _believed(made: Made, confidence: float) -> Made:
    """Return a model that began with confidence 1 as if with this one; items come in the same order. 0: no counts."""
    if confidence:
        return replace(made, model=made.model.model_copy(update={"popularity_weight": 1.0 / confidence}))
    params = {name: value for name, value in made.release.params.items() if name != PRIOR}
    model = made.model.model_copy(update={"popularity_weight": 0.0})
    return replace(made, model=model, release=replace(made.release, params=params))


def _after(source: str, head: str, n: int, start: dict[str, Any], dataset: Dataset, setting: Setting) -> list[Row]:
    """Train as many rounds from the other domain's weights and from fresh ones, each as validation says."""
    asked, before = everybody(dataset), everybody(dataset, skip=1)
    numbers = [FIRST_SEED - 1 + seed for seed in setting.seeds]
    seeds = f"{len(numbers)} seed{'s' if len(numbers) > 1 else ''}"
    rows, found = [], {}
    names = {"learnt": f"{head}, {n} rounds here", "scratch": f"{source}: {n} rounds from scratch"}
    for way, words in names.items():
        begin = {**start, "confidence": CONFIDENCE} if way == "learnt" else None
        made = {r: [setting.shelf.run(few(source, n, seed, begin, r), dataset) for seed in numbers] for r in RATES}
        values = {rate: float(_gains(own, dataset, before).mean()) for rate, own in made.items()}
        best = max(values, key=values.__getitem__)
        found[way] = _gains(made[best], dataset, asked)
        rows += [Row(f"{words}: step size, chosen by validation", best, "rate")]
        rows += [Row(f"{words}, where it is chosen", values[best], UNIT)]
        rows += estimate(f"{words} ({seeds})", found[way])
    unlike = found["learnt"] - found["scratch"]
    low, high = interval(unlike)
    words = f"{names['learnt']}, minus from scratch"
    return [
        *rows,
        Row(words, float(unlike.mean()), UNIT),
        setting.judge(f"{words}, 95 % interval low", low, UNIT, ">=", 0.0),
        Row(f"{words}, 95 % interval high", high, UNIT),
    ]


def few(source: str, n: int, seed: int, start: dict[str, Any] | None, rate: float) -> Any:
    """Return an experiment of a few rounds."""
    training: dict[str, Any] = {
        "average": 0.0,
        "cohort": {"kind": "poisson", "expected": 96.0},
        "server": {"kind": "adam", "learning_rate": rate},
        "base": {"rounds": n, "warmup": n // 4, "final": 0.01},
        "later": {"rounds": 0},
    }
    changes: dict[str, Any] = {} if start is None else {"start": start}
    return experiment_for(source, "text_transformer", n, seed=seed, model=MODEL, training=training, **changes)


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


def _scores(made: Made, dataset: Dataset, asked: Questions) -> Scores:
    return scores_of(made.model, made.release.params, len(dataset.catalog), asked)


def _blocks(asked: Questions) -> list[Questions]:
    starts = range(0, len(asked.targets), BLOCK)
    return [Questions(asked.histories[at : at + BLOCK], asked.targets[at : at + BLOCK]) for at in starts]
