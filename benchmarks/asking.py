"""Questions with one right answer, ranked among the whole catalogue, person by person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Row
from fedrec.data.batches import histories_of
from fedrec.data.cleaning import Dataset
from fedrec.models.build import restore
from fedrec.models.configs import AnyModelConfig
from fedrec.models.recommender import score_all
from fedrec.params import Params
from fedrec.random import Key

Scores = NDArray[np.float32]
K, REPLICATES = 10, 1000


class Questions(NamedTuple):
    """What is known of some people, and what they took next."""

    histories: list[list[int]]
    targets: list[int]


def leave_one_out(dataset: Dataset, skip: int = 0) -> Questions:
    """Return what everybody took last, after all before; with `skip`, as if so many of the newest were not there."""
    rows = [dataset.log.history(user).tolist() for user in range(dataset.log.n_users)]
    rows = [row[: len(row) - skip] for row in rows if len(row) > skip + 2]
    return Questions([row[:-1] for row in rows], [row[-1] for row in rows])


def scores_of(config: AnyModelConfig, params: Params, n_items: int, asked: Questions) -> Scores:
    """Return [q, n_items] scores of a model."""
    model = restore(config, n_items, params)
    return score_all(model, histories_of(asked.histories, model.spec))


def gains(scores: Scores, asked: Questions, among: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """Return [q] NDCG@10: what a person has is no candidate, ties count against the target.

    Args:
        scores: [q, n] of all items; unchanged.
        asked: the questions.
        among: numbers of the candidates; None: all items.
    """
    found = np.zeros(len(asked.targets))
    allowed = np.ones(scores.shape[1], np.bool_)
    if among is not None:
        allowed[:] = False
        allowed[among] = True
    for row, (history, target) in enumerate(zip(*asked, strict=True)):
        rivals = allowed.copy()
        rivals[history] = False
        rivals[target] = False
        rank = int((scores[row, rivals] >= scores[row, target]).sum())
        found[row] = 1.0 / np.log2(rank + 2) if rank < K else 0.0
    return found


def standardised(scores: Scores) -> Scores:
    """Return scores with mean 0 and spread 1 over the items for each person, so that they can be added up."""
    centred = scores - scores.mean(1, keepdims=True)
    return np.asarray(centred / np.maximum(centred.std(1, keepdims=True), 1e-9), np.float32)


def estimate(what: str, values: NDArray[np.float64], unit: str = "NDCG@10") -> list[Row]:
    """Return the mean over people and its 95 % bootstrap interval."""
    low, high = interval(values)
    return [Row(what, float(values.mean()), unit), *_ends(what, low, high, unit)]


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean, Poisson bootstrap over people.

    Args:
        values: [q] of people; or [s, q] of seeds and people, and seeds are drawn with replacement as well.
    """
    generator = Key.from_seed(0).child("bootstrap").numpy()
    draws = generator.poisson(1.0, (REPLICATES, values.shape[-1]))
    means = draws @ np.atleast_2d(values).T / np.maximum(draws.sum(1), 1)[:, None]  # [replicate, seed]
    seeds = generator.integers(0, means.shape[1], means.shape)
    means = np.take_along_axis(means, seeds, 1).mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def _ends(what: str, low: float, high: float, unit: str) -> list[Row]:
    return [Row(f"{what}, 95 % interval low", low, unit), Row(f"{what}, 95 % interval high", high, unit)]


def over_seeds(what: str, values: Sequence[float], unit: str) -> list[Row]:
    """Return the mean over seeds, and their standard deviation where there are several; the words say how many."""
    n = len(values)
    rows = [Row(f"{what} ({n} seed{'s' if n > 1 else ''})", float(np.mean(values)), unit)]
    return (
        rows if n == 1 else [*rows, Row(f"{what}, standard deviation over seeds", float(np.std(values, ddof=1)), unit)]
    )


def people(dataset: Dataset, share: float, seed: int) -> tuple[Any, Any]:
    """Return the numbers of a random share of all people, and of the others, each sorted."""
    order = Key.from_seed(seed).child("people").numpy().permutation(dataset.log.n_users)
    cut = round(len(order) * share)
    return np.sort(order[:cut]), np.sort(order[cut:])
