"""PFedRec and GPFedRec, re-implemented without the leak: negatives know nothing of the held-out items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.zoo import quality_of
from fedrec.data.cleaning import Dataset
from fedrec.random import Key

CLIENTS = 256
"""Clients whose own tables are in memory together."""


@dataclass(frozen=True)
class PersonalSettings:
    """Settings of the papers' published code.

    Attributes:
        rounds: in each, everybody takes part.
        dim: length of item vectors.
        negatives: for each positive, uniform over all items outside the client's training set.
        learning_rate: of the scoring function.
        item_factor: the item vectors' rate is the learning rate times the number of items times this.
        batch: samples of one step.
        graph: GPFedRec: next round each client starts from the mean over clients whose tables are like its own.
    """

    rounds: int = 100
    dim: int = 32
    negatives: int = 4
    learning_rate: float = 0.1
    item_factor: float = 80.0
    batch: int = 256
    graph: bool = False


def personal(dataset: Dataset, settings: PersonalSettings) -> tuple[float, float]:
    """Return NDCG@10 and HR@10 on the last interaction of each person, ranked among all items not taken before.

    The last two interactions are never trained on. Each client keeps its scoring function ``sigmoid(w_u . e_i + b_u)``
    and its own copy of the item vectors after a round; the server averages the copies.

    Source: Zhang et al., IJCAI 2023 (PFedRec, algorithm 1); Zhang et al., KDD 2024 (GPFedRec, equations 4-6).
    """
    log, n_items = dataset.log, len(dataset.catalog)
    histories = [log.history(user) for user in range(log.n_users)]
    trained = [np.unique(history[:-2]) for history in histories]
    draws = Key.from_seed(1).child("personal").numpy()
    shared = torch.from_numpy(draws.normal(0, 0.01, (n_items, settings.dim)).astype(np.float32))
    weights = torch.from_numpy(draws.uniform(-0.18, 0.18, (log.n_users, settings.dim)).astype(np.float32))
    biases = torch.zeros(log.n_users)
    starts: Tensor | None = None
    lists: list[list[int]] = []
    for number in range(settings.rounds):
        total, copies = torch.zeros_like(shared), []
        last = number == settings.rounds - 1
        for first in range(0, log.n_users, CLIENTS):
            block = slice(first, min(first + CLIENTS, log.n_users))
            own = (shared.expand(block.stop - first, *shared.shape) if starts is None else starts[block]).clone()
            items, labels, mask = _samples(trained[block], n_items, settings.negatives, draws)
            _train(own, weights[block], biases[block], items, labels, mask, settings, n_items)
            total += own.sum(0)
            if settings.graph:
                copies.append(own)
            if last:
                scores = torch.einsum("cnd,cd->cn", own, weights[block]).numpy()
                lists += _best(scores, histories[block])
        shared = total / log.n_users
        if settings.graph and not last:
            starts = _by_likeness(torch.cat(copies))
    targets = [int(history[-1]) for history in histories]
    hits = float(np.mean([item in own for own, item in zip(lists, targets, strict=True)]))
    return quality_of(lists, targets), hits


def _samples(
    trained: list[np.ndarray], n_items: int, negatives: int, draws: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [c, s] items, labels and validity, shuffled for each client."""
    width = max(len(own) for own in trained) * (1 + negatives)
    items = np.zeros((len(trained), width), np.int64)
    labels, mask = np.zeros((len(trained), width), np.float32), np.zeros((len(trained), width), np.float32)
    for row, own in enumerate(trained):
        outside = np.setdiff1d(np.arange(n_items), own, assume_unique=True)
        n = len(own) * (1 + negatives)
        drawn = np.concatenate([own, draws.choice(outside, len(own) * negatives)])
        order = draws.permutation(n)
        items[row, :n], mask[row, :n] = drawn[order], 1.0
        labels[row, :n] = (order < len(own)).astype(np.float32)
    return torch.from_numpy(items), torch.from_numpy(labels), torch.from_numpy(mask)


def _train(
    own: Tensor, w: Tensor, b: Tensor, items: Tensor, labels: Tensor, mask: Tensor, c: PersonalSettings, n_items: int
) -> None:
    """Take one pass, in place: each batch first moves the scoring function, then the item vectors."""
    rate = c.learning_rate * n_items * c.item_factor
    client = torch.arange(len(own))[:, None]
    for start in range(0, items.shape[1], c.batch):
        part = slice(start, start + c.batch)
        number, label, valid = items[:, part], labels[:, part], mask[:, part]
        count = valid.sum(1, keepdim=True).clamp(min=1.0)
        vectors = own[client, number]  # [c s d]
        off = valid * (torch.sigmoid((vectors * w[:, None]).sum(-1) + b[:, None]) - label) / count
        w -= c.learning_rate * torch.einsum("cs,csd->cd", off, vectors)
        b -= c.learning_rate * off.sum(1)
        off = valid * (torch.sigmoid((vectors * w[:, None]).sum(-1) + b[:, None]) - label) / count
        step = rate * off[..., None] * w[:, None]
        own.index_put_((client.expand_as(number), number), -step, accumulate=True)


def _by_likeness(copies: Tensor) -> Tensor:
    """Return each client's mean over the clients whose tables are more like its own than is usual."""
    flat = torch.nn.functional.normalize((copies - copies.mean(0)).flatten(1), dim=1)
    likeness = flat @ flat.T
    near = (likeness > likeness.mean(1, keepdim=True)).float()
    return ((near / near.sum(1, keepdim=True)) @ copies.flatten(1)).view_as(copies)


def _best(scores: np.ndarray, histories: list[np.ndarray]) -> list[list[int]]:
    for row, history in enumerate(histories):
        scores[row, history[:-1]] = -np.inf
    found: list[list[int]] = np.argsort(-scores, axis=1, kind="stable")[:, :10].tolist()
    return found
