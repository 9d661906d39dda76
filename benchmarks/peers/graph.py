"""GPFedRec, re-implemented without the leak: negatives know nothing of the held-out items."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.peers.people import Answers, Found, People, PersonalSettings, Samples
from fedrec.data.cleaning import Dataset
from fedrec.random import Key

WIDTHS = (32, 16, 8, 1)
"""Of the scoring function's layers, after the user vector and the item vector side by side."""
PULL = 1.0
"""Weight of the mean squared distance to the table of those who are like the client."""


@dataclass
class Tables:
    """All that the federation holds.

    Attributes:
        shared: [n, d] item vectors that everybody's round begins with.
        likes: [u, n, d] for each client the mean table of the clients that are like it.
        users: [u, d] user vectors.
        layers: weights [u, out, in] and biases [u, out] of everybody's scoring function, by turns.
    """

    shared: Tensor
    likes: Tensor
    users: Tensor
    layers: list[Tensor] = field(default_factory=list)

    @classmethod
    def start(cls, n_users: int, n_items: int, dim: int, draws: np.random.Generator) -> Tables:
        """Draw vectors from N(0, 1), and one scoring function for all as PyTorch begins linear layers."""
        shared, user = (torch.from_numpy(draws.standard_normal((n, dim), np.float32)) for n in (n_items, 1))
        layers = []
        for last, width in pairwise((2 * dim, *WIDTHS)):
            bound = last**-0.5
            for shape in ((width, last), (width,)):
                one = torch.from_numpy(draws.uniform(-bound, bound, shape).astype(np.float32))
                layers.append(one.expand(n_users, *shape).clone())
        return cls(shared, shared.expand(n_users, -1, -1).clone(), user.repeat(n_users, 1), layers)


def gpfedrec(dataset: Dataset, c: PersonalSettings, seed: int = 1) -> Found:
    """Train GPFedRec on all but the last two interactions of each person, and rank them.

    Everybody's round begins with the mean table of all, and is pulled towards the mean table of those whose tables were
    like the client's own after the round before: cosine likeness above the mean of all pairs. It holds a
    table for each client several times over, which is what bounds how many there can be.

    Source: Zhang et al., KDD 2024; model, beginnings and rates are those of its published code. That code compares
    cosine distances where the paper says likeness; the paper is followed here.
    """
    draws = Key.from_seed(seed).child("graph").numpy()
    people = People(dataset, c)
    state = Tables.start(people.n_users, people.n_items, c.dim, draws)
    best: Found | None = None
    for number in range(1, c.rounds + 1):
        answers = Answers(people) if number % c.every == 0 or number == c.rounds else None
        play(state, people.samples(draws), c, answers)
        if answers is not None:
            best = answers.better(best, number)
    assert best is not None
    return best


def play(state: Tables, blocks: Iterable[Samples], c: PersonalSettings, answers: Answers | None = None) -> None:
    """Play one round, in place; `answers` gets everybody's scores, by their own tables."""
    trained, tables = [], []
    if answers is not None:
        for users in answers.idle():
            answers.take(users, _everything(state, users, state.shared.expand(len(users), -1, -1)))
    for block in blocks:
        own = _train(state, block, c)
        trained.append(block.users)
        tables.append(own)
        if answers is not None:
            answers.take(block.users, _everything(state, block.users, own))
    by_likeness = _by_likeness(torch.cat(tables))
    state.likes[torch.cat(trained)] = by_likeness
    state.shared = by_likeness.mean(0)


def _train(state: Tables, block: Samples, c: PersonalSettings) -> Tensor:
    """Take one pass and return [c, n, d] the clients' own tables."""
    n_items = len(state.shared)
    item_rate = c.learning_rate * (n_items * c.item_factor - 1)
    user_rate = c.learning_rate * (c.item_factor - 1)
    pull = PULL * item_rate * 2 / state.shared.numel()
    likes, client = state.likes[block.users], torch.arange(len(block.users))[:, None]
    own = state.shared.expand_as(likes).clone()
    user, layers = state.users[block.users], [one[block.users] for one in state.layers]
    for start in range(0, block.items.shape[1], c.batch):
        part = slice(start, start + c.batch)
        number, label, valid = block.items[:, part], block.labels[:, part], block.valid[:, part]
        count = valid.sum(1)
        moved = [user, own[client, number], *layers]
        for one in moved:
            one.requires_grad_(True)
        loss = binary_cross_entropy_with_logits(_logits(*moved), label, reduction="none") * valid
        slopes = torch.autograd.grad((loss.sum(1) / count.clamp(min=1.0)).sum(), moved)
        with torch.no_grad():
            user = user - user_rate * slopes[0]
            layers = [one - c.learning_rate * slope for one, slope in zip(layers, slopes[2:], strict=True)]
            own.lerp_(likes, pull * (count > 0)[:, None, None])
            own.index_put_((client.expand_as(number), number), -item_rate * slopes[1], accumulate=True)
    state.users[block.users] = user
    for whole, one in zip(state.layers, layers, strict=True):
        whole[block.users] = one
    return own


def _logits(user: Tensor, items: Tensor, *layers: Tensor) -> Tensor:
    """Return [c, s] logits of items [c, s, d] for users [c, d]."""
    x = torch.cat([user[:, None].expand_as(items), items], -1)
    for place in range(0, len(layers), 2):
        x = x.relu() if place else x
        x = torch.baddbmm(layers[place + 1][:, None], x, layers[place].transpose(1, 2))
    return x[..., 0]


def _everything(state: Tables, users: Tensor, tables: Tensor) -> Tensor:
    """Return [c, n] logits of all items in the clients' tables."""
    layers = [one[users] for one in state.layers]
    return torch.cat([_logits(state.users[users], part, *layers) for part in torch.split(tables, 1024, 1)], 1)


def _by_likeness(tables: Tensor) -> Tensor:
    """Return each client's mean table over the clients that are more like it than clients are on average."""
    flat = tables.flatten(1)
    likeness = flat @ flat.T
    length = likeness.diagonal().sqrt()
    likeness /= length[:, None] * length
    near = (likeness > likeness.mean()).float()
    return ((near / near.sum(1, keepdim=True)) @ flat).view_as(tables)
