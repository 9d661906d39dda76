"""What is asked of personal peers, and the samples that their clients train on: without the leak."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrec.data.cleaning import Dataset

SAMPLES, CLIENTS = 65_536, 1_024
"""Samples, and clients, that are in memory together."""
K = 10


@dataclass(frozen=True)
class PersonalSettings:
    """Settings of the published code of PFedRec and GPFedRec.

    Attributes:
        rounds: at most; in each, everybody takes part. The one that is best on the validation item is tested.
        every: rounds between two looks at the validation item.
        dim: length of item vectors.
        negatives: for each positive, uniform over all items outside the client's training set.
        learning_rate: of the scoring function.
        item_factor: the item vectors' rate is the learning rate times the number of items times this.
        batch: samples of one step.
    """

    rounds: int = 100
    every: int = 5
    dim: int = 32
    negatives: int = 4
    learning_rate: float = 0.1
    item_factor: float = 80.0
    batch: int = 256


class Found(NamedTuple):
    """What a peer reached after the round that was best on the validation item.

    Attributes:
        gains: [u] everybody's NDCG@10 on the last interaction, ranked among all items not taken before.
        chosen: mean NDCG@10 on the interaction before the last.
        round: after how many rounds.
    """

    gains: NDArray[np.float64]
    chosen: float
    round: int


class Samples(NamedTuple):
    """One round's [c, s] samples of some clients.

    Attributes:
        users: [c] user numbers.
        items: item numbers; padding repeats items of the client.
        labels: 1 for what was taken.
        valid: 1, or 0 for padding, which is last where there is more than one batch.
    """

    users: Tensor
    items: Tensor
    labels: Tensor
    valid: Tensor


class People:
    """Everybody's training items, all but the last two interactions."""

    def __init__(self, dataset: Dataset, c: PersonalSettings) -> None:
        """Lay out the training items, clients with like numbers of them together."""
        log = dataset.log
        self.n_users, self.n_items, self.c = log.n_users, len(dataset.catalog), c
        self.histories = [np.asarray(log.history(user)) for user in range(log.n_users)]
        own = [np.unique(history[:-2]) for history in self.histories]
        counts = np.array([len(items) for items in own])
        self.trained = np.flatnonzero(counts)[np.argsort(counts[counts > 0], kind="stable")]
        """Numbers of those who have something to train on."""
        self.taken = np.zeros((self.n_users, self.n_items), np.bool_)
        for user, items in enumerate(own):
            self.taken[user, items] = True
        self.blocks = [(users, _padded([own[user] for user in users])) for users in self._together(counts)]

    def _together(self, counts: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Give the numbers of clients that are in memory together."""
        start, each = 0, 1 + self.c.negatives
        for stop in range(1, len(self.trained) + 1):
            full = stop == len(self.trained) or stop - start == CLIENTS
            if full or (stop + 1 - start) * counts[self.trained[stop]] * each > SAMPLES:
                yield self.trained[start:stop]
                start = stop

    def samples(self, draws: np.random.Generator) -> Iterator[Samples]:
        """Draw one round's samples of everybody who has something to train on."""
        for users, own in self.blocks:
            there = own >= 0
            positives = np.where(there, own, own[:, :1])
            negatives = self._negatives(users, (len(users), own.shape[1] * self.c.negatives), draws)
            items = np.concatenate([positives, negatives], 1)
            labels = np.concatenate([there, np.zeros(negatives.shape)], 1).astype(np.float32)
            valid = np.concatenate([there, np.repeat(there, self.c.negatives, 1)], 1).astype(np.float32)
            if items.shape[1] > self.c.batch:
                order = np.argsort(np.where(valid > 0, draws.random(items.shape, np.float32), 2.0), 1)
                items, labels, valid = (np.take_along_axis(one, order, 1) for one in (items, labels, valid))
            yield Samples(*(torch.from_numpy(one) for one in (users, items, labels, valid)))

    def _negatives(self, users: NDArray[np.int64], shape: tuple[int, int], draws: np.random.Generator) -> NDArray[Any]:
        """Return items that the clients do not train on: those that they do are drawn again."""
        found = draws.integers(0, self.n_items, shape)
        rows, columns = np.nonzero(self.taken[users[:, None], found])
        while len(rows):
            found[rows, columns] = draws.integers(0, self.n_items, len(rows))
            again = self.taken[users[rows], found[rows, columns]]
            rows, columns = rows[again], columns[again]
        return found


def _padded(rows: list[NDArray[np.int32]]) -> NDArray[np.int64]:
    """Return [c, p] items; -1 is padding."""
    items = np.full((len(rows), max(len(row) for row in rows)), -1, np.int64)
    for place, row in enumerate(rows):
        items[place, : len(row)] = row
    return items


class Answers:
    """Everybody's answers after one round."""

    def __init__(self, people: People) -> None:
        """Know nothing yet."""
        self.people = people
        self.gains, self.before = np.zeros(people.n_users), np.full(people.n_users, np.nan)

    def idle(self) -> Iterator[Tensor]:
        """Give the numbers of those who have nothing to train on."""
        users = np.setdiff1d(np.arange(self.people.n_users), self.people.trained)
        for start in range(0, len(users), CLIENTS):
            yield torch.from_numpy(users[start : start + CLIENTS])

    def take(self, users: Tensor, scores: Tensor) -> None:
        """Take [c, n] scores of some people, which are changed."""
        for row, user in zip(scores.numpy(), users.tolist(), strict=True):
            history = self.people.histories[user]
            wanted = row[history[-2:]]  # a copy
            row[history[:-1]] = -np.inf
            if len(history) > 1:
                self.before[user] = _gain(row, wanted[0])
            row[history[-1]] = -np.inf
            self.gains[user] = _gain(row, wanted[-1])

    def better(self, best: Found | None, number: int) -> Found:
        """Return this round's answers, or those before if they were better on the validation item."""
        chosen = float(np.nanmean(self.before))
        return Found(self.gains, chosen, number) if best is None or chosen > best.chosen else best


def _gain(rivals: NDArray[np.float32], wanted: float) -> float:
    """Return NDCG@10; ties count against the target."""
    rank = int(np.count_nonzero(rivals >= wanted))
    return float(1 / np.log2(rank + 2)) if rank < K else 0.0
