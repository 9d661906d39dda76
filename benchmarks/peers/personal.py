"""PFedRec, re-implemented without the leak: negatives know nothing of the held-out items."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from benchmarks.peers.people import Answers, Found, People, PersonalSettings, Samples
from fedrec.data.cleaning import Dataset
from fedrec.random import Key


@dataclass
class Personal:
    """All that the federation holds.

    Attributes:
        shared: [n, d] item vectors of the server.
        weights: [u, d] of everybody's scoring function ``sigmoid(w_u . e_i + b_u)``.
        biases: [u]
    """

    shared: Tensor
    weights: Tensor
    biases: Tensor

    @classmethod
    def start(cls, n_users: int, n_items: int, dim: int, draws: np.random.Generator) -> Personal:
        """Draw item vectors from N(0, 1), and one scoring function for all as PyTorch begins a linear layer."""
        bound = dim**-0.5
        first = torch.from_numpy(draws.uniform(-bound, bound, dim + 1).astype(np.float32))
        shared = torch.from_numpy(draws.standard_normal((n_items, dim), np.float32))
        return cls(shared, first[:dim].repeat(n_users, 1), first[dim].repeat(n_users))


def pfedrec(dataset: Dataset, c: PersonalSettings, seed: int = 1) -> Found:
    """Train PFedRec on all but the last two interactions of each person, and rank them.

    Each client keeps its scoring function and, after a round, its own copy of the item vectors; the server averages the
    copies. Whoever has nothing to train on takes no part, and scores the server's vectors by the function that all
    began with.

    Source: Zhang et al., IJCAI 2023, algorithm 1; beginnings, order of steps and rates are those of its published code.
    """
    draws = Key.from_seed(seed).child("personal").numpy()
    people = People(dataset, c)
    state = Personal.start(people.n_users, people.n_items, c.dim, draws)
    best: Found | None = None
    for number in range(1, c.rounds + 1):
        answers = Answers(people) if number % c.every == 0 or number == c.rounds else None
        play(state, people.samples(draws), c, answers)
        if answers is not None:
            best = answers.better(best, number)
    assert best is not None
    return best


def play(state: Personal, blocks: Iterable[Samples], c: PersonalSettings, answers: Answers | None = None) -> None:
    """Play one round, in place; `answers` gets everybody's scores, by their own copies of the item vectors.

    A copy differs from the server's vectors in the rows of its samples alone, so those are all that is held.
    """
    total, n = torch.zeros_like(state.shared), 0
    if answers is not None:
        for users in answers.idle():
            answers.take(users, state.weights[users] @ state.shared.T)
    for block in blocks:
        n += len(block.users)
        rows, places = _train(state, block, c, total)
        if answers is not None:
            own = state.weights[block.users]
            scores = own @ state.shared.T
            scores.scatter_(1, block.items, torch.bmm(rows, own[..., None])[..., 0].gather(1, places))
            answers.take(block.users, scores)
    state.shared += total / n


def _train(state: Personal, block: Samples, c: PersonalSettings, total: Tensor) -> tuple[Tensor, Tensor]:
    """Take one pass: each batch first moves the scoring function, then the item vectors.

    Returns [c, s, d] rows of the clients' own copies, and [c, s] at which of them each sample's item is; adds the
    change of all copies to `total`.
    """
    n_items = len(state.shared)
    rate = c.learning_rate * n_items * c.item_factor
    n, width = block.items.shape
    places = _places(block.items, n_items)
    rows = state.shared[block.items]
    flat, base = rows.view(n * width, c.dim), torch.arange(n)[:, None] * width
    w, b = state.weights[block.users], state.biases[block.users]
    for start in range(0, width, c.batch):
        part = slice(start, min(start + c.batch, width))
        place, label, valid = places[:, part], block.labels[:, part], block.valid[:, part]
        count = valid.sum(1, keepdim=True).clamp(min=1.0)
        where = (base + place).flatten()
        vectors = flat[where].view(n, -1, c.dim)
        off = _off(vectors, w, b, label, valid) / count
        w = w - c.learning_rate * torch.bmm(off[:, None], vectors)[:, 0]
        b = b - c.learning_rate * off.sum(1)
        off = _off(vectors, w, b, label, valid) / count
        summed = torch.zeros(n, width).scatter_add_(1, place, off).gather(1, place)
        flat[where] = torch.addcmul(vectors, summed[..., None], w[:, None], value=-rate).view(-1, c.dim)
        total.sub_(_by_item(block.items[:, part], off, w, n_items), alpha=rate)
    state.weights[block.users], state.biases[block.users] = w, b
    return rows, places


def _off(vectors: Tensor, w: Tensor, b: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Return [c, s] gradients of the binary cross-entropy by the logits."""
    return valid * (torch.sigmoid(torch.bmm(vectors, w[..., None])[..., 0] + b[:, None]) - label)


def _places(items: Tensor, n_items: int) -> Tensor:
    """Return [c, s] one place for each client's item: samples of the same item have the same place."""
    table = np.empty((len(items), n_items), np.int32)
    found = items.numpy()
    row, places = np.arange(len(items))[:, None], np.arange(items.shape[1], dtype=np.int32)
    table[row, found] = places
    return torch.from_numpy(table[row, found].astype(np.int64))


def _by_item(items: Tensor, off: Tensor, w: Tensor, n_items: int) -> Tensor:
    """Return [n, d] the sum over samples of ``off * w``, by item."""
    n, width = items.shape
    starts = np.arange(0, n * width + 1, width)
    by_client = csr_array((off.numpy().ravel(), items.numpy().ravel(), starts), (n, n_items))
    return torch.from_numpy(by_client.T @ w.numpy())
