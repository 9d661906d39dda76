"""DP-SGD over a client's own interactions: windows of its history are the examples, Opacus clips, adds up and accounts.

A window sees nothing of the other windows: neither their items, nor their negatives, nor how many they are. So one
interaction touches one example, which is what the clip bounds. How many windows there are is private, so the sum is
never divided by it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from torch import Tensor

from fedrec.client.vectorised import train_batched
from fedrec.data.batches import Cohort
from fedrec.data.log import InteractionLog
from fedrec.errors import PrivacyError
from fedrec.models.recommender import Recommender, learnt
from fedrec.params import Array
from fedrec.privacy.events import GaussianEvent
from fedrec.privacy.ledger import Charge
from fedrec.privacy.noise import NoiseSource
from fedrec.privacy.settings import WindowUnit
from fedrec.protocol.task import LocalTraining
from fedrec.random import Key

GRADIENT_BYTES = 32 << 20
"""What the gradients that are held at once may take: each window has one for every parameter of the model."""
_GRADIENT = LocalTraining(steps=1, learning_rate=1.0)


def window_event(unit: WindowUnit, noise_multiplier: float, steps: int) -> GaussianEvent:
    """Return what one participation costs a client that trains on windows."""
    return GaussianEvent(noise_multiplier=noise_multiplier, sampling=unit.sampling, count=steps)


def windows_of(person: Cohort, length: int) -> Cohort:
    """Cut one person's interactions in the cohort's window into stretches that stand alone, the last perhaps shorter.

    Args:
        person: a cohort of one.
        length: interactions of a window.

    Returns:
        A cohort of n windows over a log of its own, in which each is somebody with no other history.
    """
    first, n = int(person.log.offsets[person.users[0]]), int(person.high[0] - person.low[0])
    taken = slice(first + int(person.low[0]), first + int(person.high[0]))
    offsets = np.append(np.arange(0, n, length), n).astype(np.int64)
    log = person.log
    numbers = np.arange(len(offsets) - 1, dtype=np.int64)
    own = InteractionLog(
        offsets,
        log.item[taken],
        log.time[taken],
        log.event[taken],
        log.value[taken],
        ("",) * len(numbers),
        log.event_kinds,
    )
    return Cohort(own, numbers, numbers, np.zeros_like(numbers), np.diff(offsets))


def gradients(model: Recommender, windows: Cohort, key: Key) -> dict[str, Tensor]:
    """Return each window's own gradient: name to [n, *shape].

    A tied item table has one gradient, in which what comes from inputs, targets and negatives is added up before
    anything is measured; rows that a window does not name, padding among them, are zero. A window whose gradient is not
    finite gets zeros, for NaN passes any clip.
    """
    trained = train_batched(model, windows, _GRADIENT, key)
    found = {name: -part for name, part in trained.whole(dict(model.named_parameters())).items()}
    finite = torch.stack([part.flatten(1).isfinite().all(1) for part in found.values()]).all(0)
    if not finite.all():
        found = {name: part.masked_fill(~finite.view(-1, *[1] * (part.dim() - 1)), 0.0) for name, part in found.items()}
    return found


def fit_windows(
    model: Recommender,
    person: Cohort,
    local: LocalTraining,
    unit: WindowUnit,
    noise_multiplier: float,
    charge: Charge,
    source: NoiseSource,
    secret: Key,
) -> dict[str, Array]:
    r"""Train one client's copy of the model by DP-SGD, and return new minus old parameters.

    .. math:: \theta \leftarrow \theta - \eta \Big( \sum_{w \in S} g_w \min(1, C / |g_w|) + z C \mathcal{N}(0, I) \Big)

    in each local step, S a Poisson sample of the windows.

    Args:
        model: holds the shared parameters; not changed.
        person: a cohort of one.
        local: steps and learning rate.
        unit: length, clip norm and sampling rate of windows.
        noise_multiplier: z.
        charge: the client's own receipt for exactly these steps.
        source: where noise comes from.
        secret: known to this client alone, for windows, negatives and dropout: were they known, taking one window out
            would show in the others.

    Raises:
        PrivacyError: the charge is for something else, or Opacus' accountant saw other steps than were paid for.

    Source: Abadi et al., CCS 2016, algorithm 1, without the division by the number of examples.
    """
    if charge.entry.event != window_event(unit, noise_multiplier, local.steps):
        raise PrivacyError(f"'{charge.entry.name}' was charged for another event than these {local.steps} steps.")
    own = copy.deepcopy(model)
    optimizer = _Optimizer(learnt(own).values(), local.learning_rate, noise_multiplier, unit.clip_norm, charge, source)
    accountant = RDPAccountant()
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=unit.sampling))
    windows = windows_of(person, unit.length)
    for step in range(local.steps):
        key = secret.child("step", step)
        drawn = np.flatnonzero(key.child("windows").uniforms(windows.ids, 1)[:, 0] < unit.sampling)
        _step(own, optimizer, windows, drawn, key)
    if accountant.history != [(noise_multiplier, unit.sampling, local.steps)]:
        raise PrivacyError(f"'{charge.entry.name}' paid for other steps than were taken: {accountant.history}.")
    shared = dict(model.named_parameters())
    return {name: (value.detach() - shared[name].detach()).numpy() for name, value in learnt(own).items()}


def _step(model: Recommender, optimizer: _Optimizer, windows: Cohort, drawn: NDArray[np.int64], key: Key) -> None:
    """Take one step on the drawn windows, some at a time; with none there is a step of noise alone."""
    named = learnt(model)
    at_once = max(1, GRADIENT_BYTES // (4 * sum(value.numel() for value in named.values())))
    parts = [drawn[start : start + at_once] for start in range(0, len(drawn), at_once)] or [drawn]
    for number, part in enumerate(parts):
        if len(part):
            found = gradients(model, windows.take(part), key)
        else:
            found = {name: torch.zeros(0, *value.shape) for name, value in named.items()}
        for name, value in named.items():
            value.grad_sample = found[name]  # type: ignore[attr-defined]  # where Opacus looks for it
        optimizer.signal_skip_step(number < len(parts) - 1)
        optimizer.step()
        optimizer.zero_grad()


class _Optimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimizer with our sources of noise, since its own secure mode needs a package that is not to be had."""

    def __init__(
        self,
        params: Iterable[Tensor],
        learning_rate: float,
        noise_multiplier: float,
        clip_norm: float,
        charge: Charge,
        source: NoiseSource,
    ) -> None:
        super().__init__(
            torch.optim.SGD(params, lr=learning_rate),
            noise_multiplier=noise_multiplier,
            max_grad_norm=clip_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._charge, self._source = charge, source

    def add_noise(self) -> None:
        self._charge.use(self.noise_multiplier, self.max_grad_norm)
        deviation = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            summed: Any = p.summed_grad
            noise = torch.from_numpy(deviation * self._source.normal(tuple(p.shape)))
            p.grad = (summed.double() + noise).to(summed.dtype)
