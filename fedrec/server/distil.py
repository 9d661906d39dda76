"""Distillation on the server: a student learns from teachers that the server already has, on synthetic histories.

Teachers are made of noised sums and of the models fitted to them, the histories are drawn from those, and no client
takes part: post-processing, which costs no privacy.

Source: Hinton, Vinyals and Dean, 2015 (soft targets); ensemble distillation of federated models: Lin et al., NeurIPS
2020 (FedDF), here on histories that nobody lived.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fedrec.learning import AdamConfig
from fedrec.models.freeze import trainable
from fedrec.models.recommender import Recommender, get_params, set_params
from fedrec.models.transfer import DistilConfig
from fedrec.params import Array, Params
from fedrec.random import Key
from fedrec.server import optimizer

UNKNOWN = 1e-3
"""What a teacher's word counts about an item that it knows nothing of: only where nobody knows more."""

MOST_SCORES = 1 << 25
"""Scores that one step computes of each model, 128 MB: in a large catalogue fewer places are asked."""


@dataclass(frozen=True)
class Teacher:
    """A model that is listened to.

    Attributes:
        name: in reports.
        model: the recommender.
        weight: how much it counts.
        known: [n_items] in [0, 1], how far it knows each item.
        temperature: its scores are divided by it before they are a softmax.
    """

    name: str
    model: Recommender
    weight: float
    known: NDArray[np.float32]
    temperature: float = 1.0

    @torch.no_grad()
    def log_shares(
        self, items: Int[Tensor, "b l"], places: Int[Tensor, "b p"], had: Bool[Tensor, "q n"]
    ) -> Float[Tensor, "q n"]:
        """Return the log-probabilities of the next item at b p places; of what a person has it is -inf."""
        scores = self.model.score(self.model.states(items, places).flatten(0, 1)) / self.temperature
        known = torch.from_numpy(self.known).clamp(min=UNKNOWN).log()
        return (scores + known).masked_fill(had, float("-inf")).log_softmax(-1) - known


@dataclass(frozen=True)
class Lesson:
    """What a student looks at in one step.

    Attributes:
        items: [b, l] histories.
        places: [b, p] where it is asked for what comes next.
        had: [b p, n] what is no candidate there.
        targets: [b p, n] the teachers' probabilities, 0 for what is no candidate.
    """

    items: Tensor
    places: Tensor
    had: Tensor
    targets: Tensor


def entropy(scores: Float[Tensor, "q n"], temperature: float) -> float:
    """Return the mean entropy of softmaxes in nats; scores of -inf are no candidates."""
    log_shares = (scores / temperature).log_softmax(-1)
    return float(-(log_shares.exp() * log_shares.clamp(min=-1e30)).sum(-1).mean())


def matched_temperature(scores: Float[Tensor, "q n"], wanted: float) -> float:
    """Return the temperature at which the scores' softmax has this mean entropy, between 1e-4 and 1e4.

    >>> scores = torch.tensor([[0.0, 1.0, 2.0]])
    >>> round(entropy(scores, matched_temperature(scores, 1.0)), 6)
    1.0
    """
    low, high = math.log(1e-4), math.log(1e4)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy(scores, math.exp(middle)) < wanted else (low, middle)
    return math.exp((low + high) / 2)


def had_before(items: Int[Tensor, "b l"], places: Int[Tensor, "b p"], n_items: int) -> Bool[Tensor, "q n"]:
    """Return which items stand before each place."""
    b, p = places.shape
    had = torch.zeros(b * p, n_items, dtype=torch.bool)
    before = torch.arange(items.shape[1]) < places.flatten()[:, None]
    rows = torch.arange(b * p)[:, None].expand_as(before)
    had[rows[before], items.repeat_interleave(p, 0)[before]] = True
    return had


def mixed(
    log_shares: Sequence[Float[Tensor, "q n"]], teachers: Sequence[Teacher], confidence: float, sharpness: float = 1.0
) -> Float[Tensor, "q n"]:
    r"""Return the teachers' common probabilities: the weighted geometric mean of theirs.

    .. math:: \log p_i = \frac{\sum_t w_{ti} \log p_{ti}}{\sum_t w_{ti}} + c, \qquad
              w_{ti} = w_t \, k_{ti} \, e^{\gamma (1 - H_t / \log n)}

    with k what the teacher knows of the item and H its entropy about this history: who is surer counts more.

    Args:
        log_shares: of each teacher; -inf for what is no candidate.
        teachers: as many.
        confidence: gamma; 0 listens to all alike.
        sharpness: factor on the common logits.
    """
    out = torch.isinf(log_shares[0])
    total, weights = torch.zeros_like(log_shares[0]), torch.zeros_like(log_shares[0])
    for one, teacher in zip(log_shares, teachers, strict=True):
        finite = one.masked_fill(out, 0.0)
        known = torch.from_numpy(teacher.known).clamp(min=UNKNOWN)
        unsure = -(one.exp() * finite).sum(-1, keepdim=True) / math.log(max(2, one.shape[1]))
        weight = teacher.weight * known * torch.exp(confidence * (1.0 - unsure))
        total, weights = total + weight * finite, weights + weight
    return (sharpness * total / weights).masked_fill(out, float("-inf")).softmax(-1)


def lesson(
    histories: NDArray[np.int64], teachers: Sequence[Teacher], settings: DistilConfig, key: Key, n_items: int
) -> Lesson:
    """Draw histories and places, and ask the teachers.

    Args:
        histories: [n, l] the transfer set.
        teachers: who is asked.
        settings: how many.
        key: of this step.
        n_items: size of the catalogue.
    """
    b, p = settings.batch, max(1, min(settings.places, MOST_SCORES // (settings.batch * n_items)))
    chosen = (key.child("histories").uniforms(np.arange(b, dtype=np.int64), 1)[:, 0] * len(histories)).astype(np.int64)
    items = torch.from_numpy(histories[chosen])
    drawn = key.child("places").uniforms(np.arange(b, dtype=np.int64), p) * (histories.shape[1] + 1)
    places = torch.from_numpy(drawn.astype(np.int64))
    had = had_before(items, places, n_items)
    targets = mixed(
        [one.log_shares(items, places, had) for one in teachers], teachers, settings.confidence, settings.sharpness
    )
    return Lesson(items, places, had, targets)


def soft_loss(student: Recommender, one: Lesson) -> Float[Tensor, ""]:
    """Return the cross-entropy ``-sum_i p_i log q_i`` of the student q to the teachers p, the mean over all places."""
    scores = student.score(student.states(one.items, one.places).flatten(0, 1))
    total = torch.logsumexp(scores.masked_fill(one.had, float("-inf")), -1)
    return (total - (one.targets * scores).sum(-1)).mean()


def step(
    student: Recommender, memory: Params, one: Lesson, settings: DistilConfig, number: int
) -> tuple[dict[str, Array], dict[str, Array], float]:
    """Return the student's parameters and its optimizer's memory after one more step, and the loss before it.

    Args:
        student: as the step before left it.
        memory: of `fedrec.server.optimizer.step`, empty at first.
        one: what it looks at.
        settings: the learning rate.
        number: of the step, from 0.
    """
    named = dict(student.named_parameters())
    named = {name: named[name] for name in trainable(student.config, named)}
    loss = soft_loss(student, one)
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    params = get_params(student)
    downhill = {
        name: np.zeros_like(params[name]) if gradient is None else -gradient.numpy()
        for name, gradient in zip(named, gradients, strict=True)
    }
    speed = 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * number / settings.steps))
    adam = AdamConfig(learning_rate=settings.learning_rate)
    moved, memory = optimizer.step(adam, {name: params[name] for name in named}, memory, downhill, speed)
    return params | moved, memory, float(loss.detach())


@dataclass(frozen=True)
class Taught:
    """A student after so many steps.

    Attributes:
        done: how many.
        params: its parameters.
        memory: of its optimizer.
        loss: before the last step.
    """

    done: int
    params: dict[str, Array]
    memory: dict[str, Array]
    loss: float


def distilled(
    student: Recommender,
    teachers: Sequence[Teacher],
    histories: NDArray[np.int64],
    key: Key,
    settings: DistilConfig,
    done: int = 0,
    memory: Params | None = None,
) -> Iterator[Taught]:
    """Teach a student in place, and yield how it stands after each step: a function of the key and of where it stood.

    Args:
        student: with the parameters that `done` steps left.
        teachers: who is asked.
        histories: [n, l] the transfer set.
        key: where all randomness comes from.
        settings: how many steps, and how long they are.
        done: steps that were taken before.
        memory: of the optimizer after those.
    """
    memory = memory or {}
    for number in range(done, settings.steps):
        one = lesson(histories, teachers, settings, key.child("step", number), student.n_items)
        params, memory, loss = step(student, memory, one, settings, number)
        set_params(student, params)
        yield Taught(number + 1, params, memory, loss)
