"""The personal peers of the quality table take the steps of their published code, client by client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.peers import graph, personal
from benchmarks.peers.people import Answers, People, PersonalSettings, Samples
from fedrec.data.cleaning import Dataset
from fedrec.data.synthetic import sequential
from fedrec.random import Key
from tests.support import dataset_of

SMALL = PersonalSettings(rounds=2, every=1, dim=4, batch=8, item_factor=3.0)


def data() -> Dataset:
    """People of unlike activity; the last has nothing to train on."""
    whole = sequential(7, 30, 12, Key.from_seed(5))
    rows = [(f"u{u}", f"i{i}", t) for u in range(7) for t, i in enumerate(whole.log.history(u)[: 4 + u])]
    return dataset_of([*rows, ("z", "i1", 0), ("z", "i2", 1)])


def one_by_one(block: Samples) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Give each client's own samples."""
    for row, user in enumerate(block.users.tolist()):
        own = block.valid[row] > 0
        yield user, block.items[row][own], block.labels[row][own]


class Linear(nn.Module):
    def __init__(self, table: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.items = nn.Embedding.from_pretrained(table.clone(), freeze=False)
        self.output = nn.Linear(table.shape[1], 1)
        with torch.no_grad():
            self.output.weight[0] = weight
            self.output.bias[0] = bias

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.output(self.items(items)))[:, 0]


class Noted(Answers):
    def __init__(self, people: People) -> None:
        super().__init__(people)
        self.kept: dict[int, np.ndarray] = {}

    def take(self, users: torch.Tensor, scores: torch.Tensor) -> None:
        self.kept.update(zip(users.tolist(), scores.numpy().copy(), strict=True))
        super().take(users, scores)


def test_pfedrec_is_its_published_loop_over_clients_with_whole_tables() -> None:
    draws, people = np.random.default_rng(1), People(data(), SMALL)
    state = personal.Personal.start(people.n_users, people.n_items, SMALL.dim, draws)
    weights, biases, shared = state.weights.clone(), state.biases.clone(), state.shared.clone()
    for _ in range(2):
        blocks = list(people.samples(draws))
        assert max(block.items.shape[1] for block in blocks) > SMALL.batch
        answers = Noted(people)
        tables: dict[int, torch.Tensor] = {}
        for block in blocks:
            for user, items, labels in one_by_one(block):
                model = Linear(shared, weights[user], biases[user])
                scoring = torch.optim.SGD(model.output.parameters(), SMALL.learning_rate)
                rate = SMALL.learning_rate * people.n_items * SMALL.item_factor
                moving = torch.optim.SGD(model.items.parameters(), rate)
                for start in range(0, len(items), SMALL.batch):
                    part = slice(start, start + SMALL.batch)
                    for optimizer in (scoring, moving):
                        model.zero_grad()
                        nn.functional.binary_cross_entropy(model(items[part]), labels[part]).backward()
                        optimizer.step()
                tables[user] = model.items.weight.detach()
                weights[user], biases[user] = model.output.weight.detach()[0], model.output.bias.detach()[0]
        before = shared
        shared = torch.stack(list(tables.values())).mean(0)
        personal.play(state, blocks, SMALL, answers)
        torch.testing.assert_close(state.shared, shared, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state.weights, weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state.biases, biases, rtol=1e-4, atol=1e-5)
        for user in range(people.n_users):
            wanted = tables.get(user, before) @ weights[user]
            np.testing.assert_allclose(answers.kept[user], wanted, rtol=1e-3, atol=1e-4)


class Deep(nn.Module):
    def __init__(self, state: graph.Tables, user: int) -> None:
        super().__init__()
        self.items = nn.Embedding.from_pretrained(state.shared.clone(), freeze=False)
        self.user = nn.Parameter(state.users[user].clone())
        self.layers = nn.ParameterList([one[user].clone() for one in state.layers])

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.user.expand(len(items), -1), self.items(items)], -1)
        for place in range(0, len(self.layers), 2):
            x = nn.functional.linear(x, self.layers[place], self.layers[place + 1])
            x = torch.relu(x) if place + 2 < len(self.layers) else torch.sigmoid(x)
        return x[:, 0]


def test_gpfedrec_is_its_published_loop_over_clients() -> None:
    draws, people = np.random.default_rng(2), People(data(), SMALL)
    state = graph.Tables.start(people.n_users, people.n_items, SMALL.dim, draws)
    state.likes += 0.1 * torch.randn(state.likes.shape, generator=torch.Generator().manual_seed(1))
    blocks = list(people.samples(draws))
    models: dict[int, Deep] = {}
    for block in blocks:
        for user, items, labels in one_by_one(block):
            model = models[user] = Deep(state, user)
            rate, factor = SMALL.learning_rate, SMALL.item_factor
            optimizer = torch.optim.SGD(
                [
                    {"params": model.layers.parameters(), "lr": rate},
                    {"params": [model.user], "lr": rate * (factor - 1)},
                    {"params": model.items.parameters(), "lr": rate * people.n_items * factor - rate},
                ]
            )
            for start in range(0, len(items), SMALL.batch):
                part = slice(start, start + SMALL.batch)
                model.zero_grad()
                loss = nn.functional.binary_cross_entropy(model(items[part]), labels[part])
                (loss + nn.functional.mse_loss(model.items.weight, state.likes[user])).backward()
                optimizer.step()
    tables = torch.stack([model.items.weight.detach() for model in models.values()])
    cosines = nn.functional.cosine_similarity(tables.flatten(1)[:, None], tables.flatten(1)[None], dim=-1)
    likes = torch.stack([tables[row > cosines.mean()].mean(0) for row in cosines])
    idle = state.likes[people.n_users - 1].clone()
    assert people.n_users - 1 not in models
    graph.play(state, blocks, SMALL)
    torch.testing.assert_close(state.likes[list(models)], likes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.shared, likes.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.likes[people.n_users - 1], idle)
    for user, model in models.items():
        torch.testing.assert_close(state.users[user], model.user.detach(), rtol=1e-4, atol=1e-5)
        for whole, one in zip(state.layers, model.layers, strict=True):
            torch.testing.assert_close(whole[user], one.detach(), rtol=1e-4, atol=1e-5)


def test_held_out_items_are_negatives_as_often_as_any_other() -> None:
    people = People(data(), SMALL)
    draws, user = np.random.default_rng(3), 0
    history = people.histories[user]
    counts = np.zeros(people.n_items)
    for _ in range(2000):
        for block in people.samples(draws):
            row = (block.users == user).nonzero()
            if len(row):
                negative = (block.valid[row[0, 0]] > 0) & (block.labels[row[0, 0]] == 0)
                counts += np.bincount(block.items[row[0, 0]][negative], minlength=people.n_items)
    assert counts[history[:-2]].sum() == 0
    others = np.delete(counts, history[:-2])
    assert others.sum() == 2000 * SMALL.negatives * len(history[:-2])
    np.testing.assert_allclose(counts[history[-2:]], others.mean(), rtol=0.15)


@pytest.mark.parametrize("peer", [personal.pfedrec, graph.gpfedrec])
def test_the_round_is_chosen_on_the_item_before_the_last(
    peer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []
    better = Answers.better

    def noting(self: Answers, best: Any, number: int) -> Any:
        seen.append((float(np.nanmean(self.before)), float(self.gains.mean())))
        return better(self, best, number)

    monkeypatch.setattr(Answers, "better", noting)
    found = peer(data(), PersonalSettings(rounds=6, every=2, dim=4, batch=8, item_factor=3.0))
    assert len(seen) == 3
    best = max(range(3), key=lambda place: seen[place][0])
    assert found.round == 2 * best + 2
    assert (found.chosen, found.gains.mean()) == seen[best]


def test_answers_leave_out_what_was_taken_before() -> None:
    people = People(dataset_of([("a", f"i{n}", n) for n in range(5)] + [("b", "i0", 9)]), SMALL)
    answers = Answers(people)
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0], [3.0, 2.0, 1.0, 4.0, 0.0]])
    answers.take(torch.tensor([0, 1]), scores)
    assert answers.gains[0] == 1.0  # four better items were taken before
    assert answers.before[0] == 1.0
    assert answers.gains[1] == pytest.approx(1 / np.log2(3))  # one item is better
    assert np.isnan(answers.before[1])
