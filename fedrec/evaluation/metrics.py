"""How well the held-out items are ranked, person by person and for groups of people.

One array of metrics per group, one row per person: nothing here is averaged, because a client contributes sums (see
`fedrec.evaluation.intervals`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import ConfigError
from fedrec.evaluation.beyond import diversity, novelty
from fedrec.evaluation.ranking import Candidates, ItemLists, Known, RankedTargets, Targets, sampled_ranks
from fedrec.random import Key

ALL = "all"
GROUPS = (ALL, "returning", "new", "new_items")
"""All people; those with a history, those without; and how well new items are found, among people who chose one."""
SAMPLED = "sampled"
"""All people once more, ranked against a few random items: there only if asked for, to compare with old papers."""


@dataclass(frozen=True, eq=False)
class Group:
    """The people of one group.

    Attributes:
        people: [p] int64, their rows among the b people that were evaluated.
        values: [p, M] float64, a row of metrics for each.
    """

    people: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PeopleMetrics:
    """What evaluating b people gave.

    Attributes:
        names: [M] names of the metrics, the same for every group.
        groups: every name in `GROUPS`, possibly with nobody in it; `SAMPLED` if it was asked for.
        lists: [p, K] int64 the K best items, K the largest cut-off, of the people of group ``all``; -1 where there are
            fewer.
        n_people: b, those without a target included.
        n_items: size of the catalogue that was ranked.
    """

    names: tuple[str, ...]
    groups: Mapping[str, Group]
    lists: NDArray[np.int64]
    n_people: int
    n_items: int


def metric_names(ks: Sequence[int]) -> tuple[str, ...]:
    """Return the names of all metrics per person for these cut-offs, in the order of the columns.

    >>> metric_names([10])[:4]
    ('hr@10', 'ndcg@10', 'recall@10', 'precision@10')

    Raises:
        ConfigError: there is no cut-off, one below 1, or one given twice.
    """
    if not ks or min(ks) < 1 or len(set(ks)) != len(ks):
        raise ConfigError(f"The cut-offs of the metrics must be different whole numbers from 1, not {list(ks)}.")
    ranked = [f"{name}@{k}" for k in ks for name in ("hr", "ndcg", "recall", "precision", "mrr")]
    return (*ranked, "mrr", "auc", *(f"{name}@{k}" for k in ks for name in ("novelty", "diversity")))


def private_names(ks: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the metrics that a private evaluation asks for: few, and each in [0, 1] for a person.

    >>> private_names([10])
    ('ndcg@10', 'hr@10', 'recall@10')
    """
    return tuple(f"{name}@{k}" for k in ks for name in ("ndcg", "hr", "recall"))


def private_norm(ks: Sequence[int]) -> float:
    """Return the L2 bound of one person's row of `private_names` and the 1 that counts the person."""
    return math.sqrt(len(private_names(ks)) + 1.0)


def per_person(ranked: RankedTargets, ks: Sequence[int]) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.bool_]]:
    r"""Return the ranking metrics of each person, and who has any.

    With T a person's targets and r their ranks, n candidates of which :math:`n - |T|` are no target, and
    :math:`T_k = \{t : r_t \le k\}`:

    .. math::
        hr@k &= [T_k \ne \emptyset] \qquad recall@k = |T_k| / |T| \qquad precision@k = |T_k| / k \\
        ndcg@k &= \sum_{t \in T_k} \log_2^{-1} (r_t + 1) \Big/ \sum_{i=1}^{\min(k, |T|)} \log_2^{-1} (i + 1) \\
        mrr &= 1 / \min_t r_t \qquad mrr@k = [T_k \ne \emptyset] \; mrr \\
        auc &= \frac{1}{|T|} \sum_t \frac{|\{i \notin T : s_i < s_t\}|}{n - |T|}

    The auc of a person all of whose candidates are targets is 1: nothing could be ranked wrongly.

    Args:
        ranked: the ranks of b people's held-out items.
        ks: cut-offs.

    Returns:
        Metrics by name, [b] float64 each, NaN for people without a target; and [b] who has a target.

    Source: nDCG: Jarvelin and Kekalainen, TOIS 2002; auc: Rendle et al., UAI 2009, section 4.1.1.
    """
    rows, ranks, places, n_targets = ranked.targets.rows, ranked.ranks, ranked.places, ranked.targets.counts
    judged = n_targets > 0
    divisor = np.where(judged, n_targets, np.nan)
    ones = np.where(judged, 1.0, np.nan)

    def summed(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.asarray(np.bincount(rows, weights=values, minlength=len(n_targets)), np.float64)

    gains = 1.0 / np.log2(ranks + 1.0)
    reciprocal = summed((places == 1) / ranks) * ones
    values: dict[str, NDArray[np.float64]] = {}
    for k in ks:
        inside = ranks <= k
        hits = summed(inside) * ones
        ideal = np.concatenate(([0.0], np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))))
        values[f"hr@{k}"] = np.minimum(hits, 1.0)
        values[f"ndcg@{k}"] = summed(gains * inside) / (ideal[np.minimum(k, n_targets)] * ones)
        values[f"recall@{k}"] = hits / divisor
        values[f"precision@{k}"] = hits / k
        values[f"mrr@{k}"] = reciprocal * values[f"hr@{k}"]
    values["mrr"] = reciprocal
    n_others = (ranked.n_candidates - n_targets)[rows]
    n_above = ranks - places
    values["auc"] = summed(np.where(n_others > 0, 1.0 - n_above / np.maximum(n_others, 1), 1.0)) / divisor
    return values, judged


def evaluate_people(
    scores: NDArray[np.float32],
    known: Known,
    targets: Targets,
    n_known_items: int,
    ks: Sequence[int],
    *,
    attributes: NDArray[np.floating[Any]],
    popularity: NDArray[np.number[Any]],
    returning: NDArray[np.bool_] | None = None,
    sampled: tuple[int, NDArray[np.int64], Key] | None = None,
    overwrite: bool = False,
) -> PeopleMetrics:
    """Evaluate one recommender on b people.

    A target that the person already knows is dropped, and people with no target left are in no group. In group
    ``new_items`` only new items count as targets and a person's other targets are no candidates. Novelty and diversity
    are in every group those of the list that the person would see.

    Args:
        scores: [b, n_items] float32.
        known: items that each person knew before; they are no candidates.
        targets: held-out items of each person.
        n_known_items: size of the catalogue at training time; items from this number on are new.
        ks: cut-offs.
        attributes: [n_items, n_attributes] for diversity; a row of zeros where an item has none.
        popularity: [n_items] or shorter, public or released counts for novelty.
        returning: [b] who counts as returning; those with anything known if not given.
        sampled: how many items to draw, [b] client numbers and the stream of the draws: adds the group ``sampled``; see
            `sampled_ranks`.
        overwrite: the scores are not needed afterwards; their memory is used, which saves a copy.

    Raises:
        ConfigError: the cut-offs make no sense.
        DataError: shapes do not fit together, or a number is out of range.
    """
    names = metric_names(ks)
    candidates = Candidates.of(scores, known, overwrite=overwrite)
    b, n_items = scores.shape
    ranked = candidates.rank(targets)
    accuracy, judged = per_person(ranked, ks)
    lists = candidates.top_k(max(ks), ranked.targets)[judged]
    people = np.flatnonzero(judged)
    columns = {name: column[people] for name, column in accuracy.items()}
    columns |= {f"novelty@{k}": novelty(lists[:, :k], popularity, n_items) for k in ks}
    columns |= {f"diversity@{k}": diversity(lists[:, :k], attributes, n_items) for k in ks}
    values = _replaced(np.empty((len(people), len(names))), names, columns)
    back = (ranked.n_candidates < n_items if returning is None else returning)[people]
    finders, found = _new_item_metrics(candidates, ranked.targets, n_known_items, ks)
    groups = {
        ALL: Group(people, values),
        "returning": Group(people[back], values[back]),
        "new": Group(people[~back], values[~back]),
        "new_items": Group(finders, _replaced(values[np.searchsorted(people, finders)], names, found)),
    }
    if sampled is not None:
        n_sampled, clients, key = sampled
        few, _ = per_person(sampled_ranks(scores, known, ranked.targets, clients, key, n_sampled=n_sampled), ks)
        groups[SAMPLED] = Group(people, _replaced(values, names, {name: few[name][judged] for name in few}))
    return PeopleMetrics(names, groups, lists, b, n_items)


def average_people(metrics: PeopleMetrics, owner: NDArray[np.int64], n_people: int) -> PeopleMetrics:
    """Return the metrics of people who were asked several times, each the mean over their own rows.

    Args:
        metrics: of b rows.
        owner: [b] which of the people each row is about.
        n_people: how many people there are.
    """

    def mean(group: Group) -> Group:
        own = owner[group.people]
        people, place, count = np.unique(own, return_inverse=True, return_counts=True)
        sums = np.zeros((len(people), group.values.shape[1]))
        np.add.at(sums, place, group.values)
        return Group(people, sums / np.maximum(count, 1)[:, None])

    groups = {name: mean(group) for name, group in metrics.groups.items()}
    return PeopleMetrics(metrics.names, groups, metrics.lists, n_people, metrics.n_items)


def _replaced(
    values: NDArray[np.float64], names: tuple[str, ...], columns: Mapping[str, NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Return the [p, M] values with some of the named columns, [p] each, put in place of the old ones."""
    values = values.copy()
    for name, column in columns.items():
        values[:, names.index(name)] = column
    return values


def _new_item_metrics(
    candidates: Candidates, targets: Targets, n_known_items: int, ks: Sequence[int]
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Return who has a new item among the `targets`, [p], and the ranking metrics of these items alone, [p] each."""
    rows, is_new = targets.rows, targets.items >= n_known_items
    people = np.unique(rows[is_new])
    if len(people) == 0:
        return people, {}  # the common case where no item is new
    among = np.isin(rows, people)
    row_of = np.searchsorted(people, rows)
    new, old = among & is_new, among & ~is_new
    scores = candidates.scores[people]
    scores[row_of[old], targets.items[old]] = -np.inf
    wanted = ItemLists.from_pairs(row_of[new], targets.items[new], len(people))
    return people, per_person(Candidates(scores).rank(wanted), ks)[0]
