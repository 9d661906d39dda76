"""The student comes to say what its teachers say, and teachers count where they know something."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedrec.models.build import build
from fedrec.models.configs import SampledSoftmax, TransformerConfig
from fedrec.models.recommender import Recommender, get_params
from fedrec.models.transfer import DistilConfig
from fedrec.random import Key
from fedrec.server.distil import Teacher, distilled, entropy, had_before, lesson, matched_temperature, mixed, soft_loss
from fedrec.server.synthetic import Source, sample_histories

KEY = Key.from_seed(3)
N = 20
CONFIG = TransformerConfig(dim=8, heads=2, expand=1, length=8, dropout=0.0, softmax=SampledSoftmax(negatives=4))
SETTINGS = DistilConfig(steps=60, batch=16, places=4, learning_rate=0.02)
EVERYTHING = np.ones(N, np.float32)


def lively(name: str, scale: float = 1.0) -> Recommender:
    model = build(CONFIG, N, KEY.child(name))
    with torch.no_grad():
        model.get_parameter("item").mul_(50.0 * scale)
    return model.eval()


def histories(model: Recommender) -> np.ndarray:
    return sample_histories(Source(model), np.full(N, 1 / N), 64, 7, KEY.child("histories"))


def test_a_student_learns_what_its_teacher_says_and_is_a_function_of_the_key() -> None:
    teacher = Teacher("one", lively("teacher"), 1.0, EVERYTHING)
    transfer = histories(teacher.model)
    found, again = build(CONFIG, N, KEY), build(CONFIG, N, KEY)
    losses = [now.loss for now in distilled(found, [teacher], transfer, KEY, SETTINGS)]
    assert [now.loss for now in distilled(again, [teacher], transfer, KEY, SETTINGS)] == losses
    assert all((get_params(found)[name] == value).all() for name, value in get_params(again).items())
    one = lesson(transfer, [teacher], SETTINGS, KEY.child("fresh"), N)
    ideal = float(-(one.targets * one.targets.clamp(min=1e-30).log()).sum(-1).mean())
    untaught = float(soft_loss(build(CONFIG, N, KEY), one).detach())
    assert float(soft_loss(found, one).detach()) - ideal < 0.3 * (untaught - ideal)
    assert losses[-1] < losses[0]


def test_the_loss_is_least_for_the_teacher_itself() -> None:
    model = lively("teacher")
    one = lesson(histories(model), [Teacher("one", model, 1.0, EVERYTHING)], SETTINGS, KEY, N)
    ideal = float(-(one.targets * one.targets.clamp(min=1e-30).log()).sum(-1).mean())
    assert float(soft_loss(model, one).detach()) == pytest.approx(ideal, abs=1e-5)
    assert float(soft_loss(lively("other"), one).detach()) > ideal + 0.1


def test_what_a_person_has_is_neither_target_nor_candidate() -> None:
    items, places = torch.tensor([[3, 5, 7], [2, 4, 6]]), torch.tensor([[0, 2], [3, 1]])
    had = had_before(items, places, N)
    assert [row.nonzero().flatten().tolist() for row in had] == [[], [3, 5], [2, 4, 6], [2]]
    teacher = Teacher("one", lively("teacher"), 1.0, EVERYTHING)
    shares = mixed([teacher.log_shares(items, places, had)], [teacher], 1.0)
    assert (shares[had] == 0).all()
    assert shares.sum(-1) == pytest.approx(np.ones(4), abs=1e-5)


def test_about_an_item_that_only_one_teacher_knows_only_that_one_is_heard() -> None:
    half = np.where(np.arange(N) < N // 2, 1.0, 0.0).astype(np.float32)
    old, new = Teacher("old", lively("a"), 5.0, half), Teacher("new", lively("b"), 1.0, EVERYTHING)
    items, places = torch.tensor([[1, 2, 3]]), torch.tensor([[3]])
    had = had_before(items, places, N)
    logs = [one.log_shares(items, places, had) for one in (old, new)]
    shares = mixed(logs, [old, new], 0.0)[0].log()
    fresh = slice(N // 2, N)
    own = logs[1][0][fresh]
    assert (shares[fresh] - own).std() < 0.05 * own.std()
    known = [i for i in range(N // 2) if not had[0, i]]
    assert (shares[known] - logs[0][0][known]).std() < (shares[known] - logs[1][0][known]).std()


def test_a_surer_teacher_counts_more_only_where_confidence_is_asked_for() -> None:
    sure = Teacher("sure", lively("a", 3.0), 1.0, EVERYTHING)
    unsure = Teacher("dull", lively("b", 0.01), 1.0, EVERYTHING)
    items, places = torch.tensor([[1, 2, 3]]), torch.tensor([[3]])
    logs = [one.log_shares(items, places, had_before(items, places, N)) for one in (sure, unsure)]

    def distance(confidence: float) -> float:
        shares = mixed(logs, [sure, unsure], confidence)
        return float((shares - logs[0].exp()).abs().sum())

    assert distance(4.0) < distance(1.0) < distance(0.0)


def test_temperatures_match_entropies() -> None:
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=(50, N)).astype(np.float32))
    scores[:, 3] = float("-inf")
    for wanted in (0.5, 2.0, 2.9):
        assert entropy(scores, matched_temperature(scores, wanted)) == pytest.approx(wanted, abs=1e-3)
