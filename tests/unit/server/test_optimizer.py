"""The server's step is torch's own, whatever is carried through documents in between."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedrec.learning import AdamConfig, SgdConfig, StageConfig
from fedrec.params import Params
from fedrec.protocol import wire
from fedrec.random import Key
from fedrec.server.optimizer import averaged, grow_memory, speed, step
from tests.support import same_bytes

SHAPES = {"item": (6, 3), "bias": (5,), "scale": ()}
ADAM = AdamConfig(learning_rate=0.03, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.1)
CONFIGS = [
    (SgdConfig(learning_rate=0.7), lambda tensors: torch.optim.SGD(tensors, lr=0.7)),
    (SgdConfig(learning_rate=0.7, momentum=0.9), lambda tensors: torch.optim.SGD(tensors, lr=0.7, momentum=0.9)),
    (ADAM, lambda tensors: torch.optim.AdamW(tensors, lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)),
]


def numbers(*path: str | int) -> dict[str, np.ndarray]:
    random = Key.from_seed(2).child(*path).numpy()
    return {name: np.asarray(random.normal(size=shape), np.float32) for name, shape in SHAPES.items()}


def carried(memory: Params) -> Params:
    """Return the memory as it comes back from a checkpoint."""
    return wire.unpack("memory", wire.pack("memory", {}, {name: np.asarray(v) for name, v in memory.items()}))[1]


@pytest.mark.parametrize(("config", "optimizer"), CONFIGS)
def test_a_step_is_that_of_torch_with_its_memory_carried_through_documents(
    config: SgdConfig | AdamConfig, optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer]
) -> None:
    factors = [1.0, 0.5, 2.0, 1.0, 0.1]
    tensors = {name: torch.from_numpy(value.copy()) for name, value in numbers("start").items()}
    plain = optimizer(list(tensors.values()))
    rate = plain.param_groups[0]["lr"]
    params: Params = numbers("start")
    memory: Params = {}
    for number, factor in enumerate(factors):
        delta = numbers("delta", number)
        for name, tensor in tensors.items():
            tensor.grad = torch.from_numpy(np.asarray(-delta[name]))
        plain.param_groups[0]["lr"] = rate * factor
        plain.step()
        params, memory = step(config, params, carried(memory), delta, factor)
        for name, shape in SHAPES.items():
            assert params[name].shape == shape
            np.testing.assert_array_equal(params[name], tensors[name].numpy())


def test_sgd_at_rate_one_adds_the_mean_update_which_is_fedavg() -> None:
    params, delta = numbers("start"), numbers("delta")
    after, memory = step(SgdConfig(learning_rate=1.0), params, {}, delta, 1.0)
    assert memory == {}
    for name in SHAPES:
        np.testing.assert_array_equal(after[name], params[name] + delta[name])


def test_a_step_changes_nothing_that_it_was_given() -> None:
    params, delta = numbers("start"), numbers("delta")
    _, memory = step(ADAM, params, {}, delta, 1.0)
    before = {name: value.copy() for name, value in memory.items()}
    step(ADAM, params, memory, delta, 1.0)
    assert same_bytes(params, numbers("start"))
    assert same_bytes(delta, numbers("delta"))
    assert same_bytes(memory, before)


def test_adam_keeps_its_step_count_as_a_number_without_axes() -> None:
    memory: Params = {}
    for _ in range(3):
        _, memory = step(ADAM, numbers("start"), memory, numbers("delta"), 1.0)
    assert memory.keys() == {f"{name}/{slot}" for name in SHAPES for slot in ("step", "exp_avg", "exp_avg_sq")}
    for name, shape in SHAPES.items():
        assert (memory[f"{name}/step"].shape, float(memory[f"{name}/step"])) == ((), 3.0)
        assert memory[f"{name}/exp_avg"].shape == shape


def test_memory_grows_with_zero_rows_and_the_old_rows_go_on_as_before() -> None:
    config = SgdConfig(learning_rate=0.5, momentum=0.9)
    start, delta = numbers("start"), numbers("delta")
    small, memory = step(config, start, {}, delta, 1.0)
    larger = {
        name: np.concatenate([v, np.ones((2, 3), np.float32)]) if name == "item" else v for name, v in small.items()
    }
    grown = grow_memory(memory, larger)
    assert grown["item/momentum_buffer"].shape == (8, 3)
    assert not grown["item/momentum_buffer"][6:].any()
    assert same_bytes({"a": grown["bias/momentum_buffer"]}, {"a": memory["bias/momentum_buffer"]})

    wide = delta | {"item": np.concatenate([delta["item"], np.full((2, 3), 2.0, np.float32)])}
    after, _ = step(config, larger, grown, wide, 1.0)
    expected, _ = step(config, small, memory, delta, 1.0)
    np.testing.assert_array_equal(after["item"][:6], expected["item"])
    np.testing.assert_array_equal(after["item"][6:], 1.0 + 0.5 * np.full((2, 3), 2.0, np.float32))


def test_adams_memory_grows_and_its_step_count_stays() -> None:
    _, memory = step(ADAM, numbers("start"), {}, numbers("delta"), 1.0)
    grown = grow_memory(memory, numbers("start") | {"item": np.zeros((9, 3), np.float32)})
    assert {path: value.shape for path, value in grown.items() if path.startswith("item/")} == {
        "item/step": (), "item/exp_avg": (9, 3), "item/exp_avg_sq": (9, 3)
    }  # fmt: skip
    assert all(grown[path].dtype == memory[path].dtype for path in memory)


def test_speed_rises_in_a_line_and_falls_along_a_cosine() -> None:
    stage = StageConfig(rounds=13, warmup=4, final=0.2, speed=0.5)
    rates = [speed(stage, number) for number in range(13)]
    np.testing.assert_allclose(rates[:4], [0.125, 0.25, 0.375, 0.5])
    cosine = 0.5 * (0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * np.arange(9) / 8)))
    np.testing.assert_allclose(rates[4:], cosine)
    assert rates[4] == 0.5
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(("rounds", "warmup"), [(1, 0), (1, 1), (2, 2), (3, 2), (2, 5)])
def test_speed_of_short_stages_is_never_zero_nor_above_full(rounds: int, warmup: int) -> None:
    stage = StageConfig(rounds=rounds, warmup=warmup, final=0.0)
    assert speed(stage, 0) > 0
    assert all(0 <= speed(stage, number) <= 1 for number in range(rounds))


def test_a_stage_without_warmup_and_decay_runs_at_full_speed() -> None:
    assert {speed(StageConfig(rounds=7), number) for number in range(7)} == {1.0}


def test_the_average_is_a_moving_one_that_follows_faster_at_first() -> None:
    values = [{"w": np.full(2, float(number), np.float32)} for number in range(120)]
    average: Params = {}
    expected = np.zeros(2)
    for number, params in enumerate(values):
        average = averaged(average, params, 0.9, number)
        d = min(0.9, (1 + number) / (10 + number))
        expected = d * expected + (1 - d) * params["w"] if number else params["w"].astype(float)
        np.testing.assert_allclose(average["w"], expected, rtol=1e-5, atol=1e-6)
        assert average["w"].dtype == np.float32
    assert float(average["w"][0]) == pytest.approx(119 - 9, abs=0.1)  # a ramp is followed 1 / (1 - d) - 1 rounds behind


def test_no_average_is_kept_where_none_is_wanted() -> None:
    assert averaged({}, numbers("start"), 0.0, 3) == {}
