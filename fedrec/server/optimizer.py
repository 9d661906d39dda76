"""The server's step: any `torch.optim` optimizer, applied to the mean update as a pure function."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fedrec.learning import AdamConfig, SgdConfig, StageConfig
from fedrec.params import Array, Params


def step(
    config: SgdConfig | AdamConfig, params: Params, memory: Params, delta: Params, speed: float
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the new parameters and the optimizer's new memory.

    The mean client update counts as minus a gradient, so SGD at learning rate 1 adds it: FedAvg; Adam is FedAdam.

    Args:
        config: which optimizer.
        params: the shared parameters.
        memory: the optimizer's state, ``"<parameter>/<slot>"`` to tensor; empty at first.
        delta: mean of new minus old over clients.
        speed: factor on the learning rate in this round.

    Source: Reddi et al., ICLR 2021, algorithm 2.
    """
    tensors = {name: torch.from_numpy(value.copy()) for name, value in params.items()}
    for name, tensor in tensors.items():
        tensor.grad = -torch.from_numpy(np.array(delta[name]))
    optimizer = _make(config, list(tensors.values()), config.learning_rate * speed)
    for path, value in memory.items():
        name, slot = path.rsplit("/", 1)
        optimizer.state[tensors[name]][slot] = torch.from_numpy(value.copy())
    optimizer.step()
    slots = {
        f"{name}/{slot}": value.numpy()
        for name, tensor in tensors.items()
        for slot, value in optimizer.state.get(tensor, {}).items()
        if isinstance(value, torch.Tensor)
    }
    return {name: tensor.numpy() for name, tensor in tensors.items()}, slots


def _make(config: SgdConfig | AdamConfig, tensors: list[torch.Tensor], rate: float) -> torch.optim.Optimizer:
    if isinstance(config, SgdConfig):
        return torch.optim.SGD(tensors, lr=rate, momentum=config.momentum)
    return torch.optim.AdamW(
        tensors, lr=rate, betas=(config.beta1, config.beta2), eps=config.epsilon, weight_decay=config.weight_decay
    )


def averaged(average: Params, params: Params, decay: float, round_number: int) -> dict[str, Array]:
    """Return the moving average after one more round: ``a <- d a + (1 - d) w``, d smaller in the first rounds.

    Source: the warm-up ``d = min(decay, (1 + t) / (10 + t))`` is that of TensorFlow's ExponentialMovingAverage.
    """
    if not decay:
        return {}
    d = min(decay, (1 + round_number) / (10 + round_number))
    return {
        name: (d * average[name] + (1.0 - d) * value).astype(value.dtype) if average else value
        for name, value in params.items()
    }


def grow_memory(memory: Params, params: Params) -> dict[str, Array]:
    """Return the memory with zero rows added where item tables have grown."""
    grown: dict[str, Any] = {}
    for path, value in memory.items():
        shape = params[path.rsplit("/", 1)[0]].shape
        missing = shape[0] - value.shape[0] if value.shape[1:] == shape[1:] and value.shape else 0
        grown[path] = np.concatenate([value, np.zeros((missing, *shape[1:]), value.dtype)]) if missing else value
    return grown


def speed(stage: StageConfig, round_number: int) -> float:
    """Return the factor on the learning rate in this round: linear warm-up, then a cosine down to `final`."""
    if round_number < stage.warmup:
        return stage.speed * (round_number + 1) / stage.warmup
    progress = (round_number - stage.warmup) / max(1, stage.rounds - stage.warmup - 1)
    return stage.speed * (stage.final + (1.0 - stage.final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))
