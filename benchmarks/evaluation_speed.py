"""Full ranking of people and items in the shape of MovieLens-1M, against a bare matmul and topk, on one thread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import Row, claim, run, unclaimed
from benchmarks.speed import timed
from fedrec.client.evaluator import people_at_once
from fedrec.evaluation.metrics import evaluate_people
from fedrec.evaluation.ranking import Candidates, ItemLists
from fedrec.models.recommender import SCORED
from fedrec.random import Key

N_USERS, N_ITEMS, DIM, N_KNOWN, N_ATTRIBUTES, K = 6_040, 3_706, 64, 165, 18, 10
KEY = Key.from_seed(1).child("evaluation speed")
OWN = people_at_once(N_ITEMS)
"""How many people a node judges at once."""


class People:
    """Vectors of people and items, what each person knows, and one held-out item each that is not known."""

    def __init__(self, n_users: int) -> None:
        """Draw everything."""
        random = KEY.numpy()
        self.n_users = n_users
        self.users = random.standard_normal((n_users, DIM), np.float32)
        self.items = random.standard_normal((N_ITEMS, DIM), np.float32)
        picked = np.argpartition(random.random((n_users, N_ITEMS), np.float32), N_KNOWN + 1, axis=1)
        self.picked = picked[:, : N_KNOWN + 1].astype(np.int64)
        self.attributes = (random.random((N_ITEMS, N_ATTRIBUTES)) < 0.1).astype(np.float32)
        self.popularity = random.integers(1, 3_000, N_ITEMS).astype(np.float32)

    def blocks(self, block: int) -> Iterator[slice]:
        """Yield the people in blocks."""
        for start in range(0, self.n_users, block):
            yield slice(start, min(start + block, self.n_users))

    def lists(self, of: slice) -> tuple[ItemLists, ItemLists]:
        """Return what the people of a block know, and their held-out items."""
        known, target = self.picked[of, :-1], self.picked[of, -1:]
        return _lists(known), _lists(target)


def _lists(items: NDArray[np.int64]) -> ItemLists:
    n, width = items.shape
    return ItemLists(np.arange(0, n * width + 1, width), items.ravel())


def bare(people: People, block: int) -> None:
    """The floor: scores, and the ten largest of each row; nothing masked, nothing ranked."""
    items = torch.from_numpy(people.items).T
    for part in people.blocks(block):
        torch.topk(torch.from_numpy(people.users[part]) @ items, K)


def bare_sorted_out(people: People, block: int) -> None:
    """The floor with what people know masked, and the rank of the held-out item: the least that evaluation needs."""
    items = torch.from_numpy(people.items).T
    for part in people.blocks(block):
        scores = torch.from_numpy(people.users[part]) @ items
        target = torch.from_numpy(people.picked[part, -1:])
        scores.scatter_(1, torch.from_numpy(people.picked[part, :-1]), float("-inf"))
        (scores >= scores.gather(1, target)).sum(1)
        torch.topk(scores, K)


def parts(people: People) -> dict[str, Callable[[], Any]]:
    """Return what fedrec's path consists of, each on scores and candidates that are there already."""
    scores = [_scores(people, part, np.empty((OWN, N_ITEMS), np.float32)) for part in people.blocks(OWN)]
    buffer = np.empty((OWN, N_ITEMS), np.float32)
    lists = [people.lists(part) for part in people.blocks(OWN)]
    masked = [Candidates.of(s, known) for s, (known, _) in zip(scores, lists, strict=True)]
    both = list(zip(masked, lists, strict=True))
    return {
        "scores": lambda: _each(_scores(people, part, buffer) for part in people.blocks(OWN)),
        "masking": lambda: _each(Candidates.of(s, known) for s, (known, _) in zip(scores, lists, strict=True)),
        "ranks": lambda: _each(candidates.rank(targets) for candidates, (_, targets) in both),
        "lists": lambda: _each(candidates.top_k(K, targets) for candidates, (_, targets) in both),
    }


def _each(results: Iterable[Any]) -> None:
    """Compute every result and keep none."""
    for _ in results:
        pass


def _scores(people: People, part: slice, out: NDArray[np.float32]) -> NDArray[np.float32]:
    """Score a block of people as `score_all` does: a few at a time, into memory that is there already."""
    items = torch.from_numpy(people.items).T
    rows = range(part.start, part.stop, SCORED)
    for row in rows:
        end = min(row + SCORED, part.stop)
        place = torch.from_numpy(out[row - part.start : end - part.start])
        torch.mm(torch.from_numpy(people.users[row:end]), items, out=place)
    return out[: part.stop - part.start]


def fedrec_path(people: People) -> None:
    """What a node does for each block of people once it has user vectors: scores, masking, ranks, lists, metrics."""
    buffer = np.empty((OWN, N_ITEMS), np.float32)
    for part in people.blocks(OWN):
        known, targets = people.lists(part)
        evaluate_people(
            _scores(people, part, buffer),
            known,
            targets,
            N_ITEMS,
            (K,),
            attributes=people.attributes,
            popularity=people.popularity,
            overwrite=True,
        )


def ranking_only(people: People) -> None:
    """Scores, masking, ranks and lists, without metrics: what the bare contender computes, and the ranks."""
    buffer = np.empty((OWN, N_ITEMS), np.float32)
    for part in people.blocks(OWN):
        known, targets = people.lists(part)
        candidates = Candidates.of(_scores(people, part, buffer), known)
        candidates.rank(targets)
        candidates.top_k(K, targets)


def measure(quick: bool) -> list[Row]:
    """Time the paths and the parts, taking turns."""
    torch.set_num_threads(1)
    people = People(1_000 if quick else N_USERS)
    sizes = (64, OWN)
    contenders: dict[str, Callable[[], Any]] = {
        "whole": lambda: fedrec_path(people),
        "ranking": lambda: ranking_only(people),
        **{f"bare, blocks of {size}": partial(bare, people, size) for size in sizes},
        "least": lambda: bare_sorted_out(people, 64),
        **parts(people),
    }
    repeats = 5 if quick else 9
    seconds = {name: statistics.median(v) for name, v in timed(contenders, repeats, "full ranking").items()}
    best = min((name for name in seconds if name.startswith("bare")), key=seconds.__getitem__)
    reach = unclaimed if quick else claim
    n = people.n_users
    what = f"{n:,} people x {N_ITEMS:,} items, k = {K}"
    accounted = sum(seconds[name] for name in ("scores", "masking", "ranks", "lists"))
    return [
        Row(f"{what}: fedrec, scores to metrics and lists", seconds["whole"], "s"),
        Row(f"{what}: fedrec, without metrics", seconds["ranking"], "s"),
        Row(f"{what}: torch matmul + topk, {best}", seconds[best], "s"),
        Row(f"{what}: torch matmul + mask + rank of the target + topk", seconds["least"], "s"),
        *(Row(f"part of fedrec: {name}", seconds[name], "s") for name in ("scores", "masking", "ranks", "lists")),
        Row("part of fedrec: metrics and the rest", seconds["whole"] - accounted, "s"),
        Row("fedrec without metrics / matmul + topk", seconds["ranking"] / seconds[best], "x"),
        reach("fedrec / matmul + topk", seconds["whole"] / seconds[best], "x", "<=", 1.3),
    ]


if __name__ == "__main__":
    raise SystemExit(run("evaluation_speed", __doc__ or "", measure))
