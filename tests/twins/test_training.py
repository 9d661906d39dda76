"""The batched local training, the loop, partitions, and plain centralised training all compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedrec import params as named
from fedrec.client.lesson import Lesson
from fedrec.client.pool import LogPool
from fedrec.client.rows import renumber
from fedrec.client.trained import Trained
from fedrec.client.trainer import step_batches, train_each
from fedrec.client.vectorised import train_batched
from fedrec.data.batches import START, Batch, Cohort, draw
from fedrec.data.catalog import ItemCatalog
from fedrec.data.features import FeatureSettings
from fedrec.data.slices import LastWindow, TimeWindow
from fedrec.learning import AdamConfig, SgdConfig
from fedrec.models.build import build, restore
from fedrec.models.configs import (
    AnyModelConfig,
    FactorisationConfig,
    FullSoftmax,
    GruConfig,
    LightGcnConfig,
    MachineConfig,
    NcfConfig,
    PopularityConfig,
    SampledSoftmax,
    TasksConfig,
    TextTransformerConfig,
    TransformerConfig,
)
from fedrec.models.freeze import PUBLIC, trainable
from fedrec.models.recommender import get_params, learnt, to_torch
from fedrec.params import Accumulator
from fedrec.privacy.clip import clip_factors
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import CountTask, EvaluateTask, FitTask, LocalTraining
from fedrec.server import optimizer
from tests.contracts.recommender import KEY, everybody, lively, uneven_log

N_ITEMS = 120
LENGTHS = (1, 200, 3, 50, 17, 2, 90, 8)
LOW = (0, 150, 2, 0, 10, 1, 0, 0)
CATALOG = ItemCatalog(
    tuple(map(str, range(N_ITEMS))), ("",) * N_ITEMS, (("a",), ("b",), ()) * (N_ITEMS // 3), np.zeros(N_ITEMS, np.int64)
)


def _text(**changes: Any) -> TextTransformerConfig:
    settings: dict[str, Any] = {"dim": 16, "length": 20, "dropout": 0.3, "residual": 4}
    settings |= {"features": FeatureSettings(rank=10, fourier=0), "softmax": SampledSoftmax(negatives=24)}
    return TextTransformerConfig(**settings | changes)


SEQUENCE: dict[str, Any] = {"dim": 16, "length": 20, "dropout": 0.3, "softmax": SampledSoftmax(negatives=24)}
MODELS: dict[str, AnyModelConfig] = {
    "popularity": PopularityConfig(),
    "factorisation": FactorisationConfig(dim=8, length=60, targets=8, negatives=16),
    "transformer": TransformerConfig(dim=16, length=20, dropout=0.3, softmax=SampledSoftmax(negatives=24)),
    "transformer, last window": TransformerConfig(
        dim=16, blocks=2, length=12, dropout=0.3, windows="last", horizon=1, softmax=SampledSoftmax(negatives=24)
    ),
    "transformer, full softmax": TransformerConfig(dim=16, length=20, dropout=0.3, softmax=FullSoftmax()),
    "gru": GruConfig(**SEQUENCE),
    "gru, many tasks": GruConfig(
        **SEQUENCE,
        tasks=TasksConfig(
            value_weight=0.5, value_range=(0.0, 1.0), event_weight=0.5, events=("click", "buy"), weights="learned"
        ),
    ),
    "ncf": NcfConfig(**SEQUENCE, hidden=5),
    "ncf, full softmax": NcfConfig(**{**SEQUENCE, "softmax": FullSoftmax()}, hidden=5),
    "factorisation machine": MachineConfig(**SEQUENCE),
    "lightgcn": LightGcnConfig(**SEQUENCE),
    "text transformer": _text(),
    "text transformer, full softmax": _text(softmax=FullSoftmax()),
    "text transformer, adapters": _text(lora=3, train="adapters"),
    "text transformer, adapters and all": _text(lora=3),
    "text transformer, top block": _text(blocks=2, train="top"),
    "text transformer, head": _text(train="head"),
}
models = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
LOCAL = LocalTraining(steps=4, learning_rate=0.1)


def cohort() -> Cohort:
    return everybody(uneven_log(LENGTHS, N_ITEMS, KEY), LOW)


def totals(trained: Trained, like: dict[str, Tensor], factors: np.ndarray) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(value) for name, value in like.items()}
    trained.add_to(sums, factors)
    return sums


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_tallies(one: Tally, other: Tally, tolerance: float = 2e-5) -> None:
    assert one.n_clients == other.n_clients
    assert one.stats == pytest.approx(other.stats, rel=tolerance, abs=tolerance)
    assert one.sums.keys() == other.sums.keys()
    for name, value in one.sums.items():
        np.testing.assert_allclose(value, other.sums[name], rtol=tolerance, atol=tolerance, err_msg=name)


def summed(tallies: Sequence[Tally]) -> Tally:
    sums, full = Accumulator(), [tally for tally in tallies if tally.n_clients]
    for tally in full:
        sums.fold(tally.sums)
    stats = {name: sum(tally.stats[name] for tally in full) for name in full[0].stats}
    return Tally(sums.value(), sum(tally.n_clients for tally in full), stats)


# Batched and one by one


@models
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"replay": 0.5, "replay_budget": 30, "history_negatives": False},
        {"replay": 0.9, "replay_by_shift": True},
    ],
    ids=str,
)
def test_batched_training_is_training_each(config: AnyModelConfig, steps: int, memory: dict[str, float]) -> None:
    model, people = lively(config, N_ITEMS), cohort()
    local = LocalTraining(steps=steps, learning_rate=0.1, **memory)
    before = named.digest(get_params(model))
    each, batched = train_each(model, people, local, KEY), train_batched(model, people, local, KEY)
    assert named.digest(get_params(model)) == before
    torch.testing.assert_close(batched.loss, each.loss, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(batched.norms(), each.norms(), rtol=1e-4)
    assert each.norms().min() > 0
    shared = {name: value.detach() for name, value in model.named_parameters()}
    for place in range(len(people)):
        own = each.client_params(shared, place)
        assert_close(batched.client_params(shared, place), own)
        assert any(not torch.equal(own[name], shared[name]) for name in shared)
    ones = np.ones(len(people), np.float32)
    assert_close(totals(batched, shared, ones), totals(each, shared, ones), 1e-4)


@models
def test_rows_of_items_are_shortened_alike_in_both_twins_and_none_is_longer(config: AnyModelConfig) -> None:
    model, people = lively(config, N_ITEMS), cohort()
    longest = max(
        float(part[0].reshape(N_ITEMS, -1).norm(dim=1).max())
        for part in train_each(model, people, LOCAL, KEY).alone(0).whole(learnt(model)).values()
        if part.dim() > 1 and part.shape[1] == N_ITEMS
    )
    local = LOCAL.model_copy(update={"item_clip": longest / 2})
    each, batched = (train(model, people, local, KEY) for train in (train_each, train_batched))
    shared = {name: value.detach() for name, value in learnt(model).items()}
    ones = np.ones(len(people), np.float32)
    assert_close(totals(batched, shared, ones), totals(each, shared, ones), 1e-4)
    found = [
        part.reshape(*part.shape[:2], -1).norm(dim=2)
        for part in batched.whole(shared).values()
        if part.dim() > 1 and part.shape[1] == N_ITEMS
    ]
    assert max(float(norms.max()) for norms in found) == pytest.approx(longest / 2, rel=1e-5)


TAUGHT = [name for name in MODELS if name != "popularity"]


@pytest.mark.parametrize("name", TAUGHT)
@pytest.mark.parametrize("steps", [1, 3])
def test_batched_imitation_is_imitation_one_by_one_and_pulls_towards_the_teacher(name: str, steps: int) -> None:
    config = MODELS[name]
    model, teacher, people = lively(config, N_ITEMS), lively(config, N_ITEMS, KEY.child("teacher")), cohort()
    local, lesson = LocalTraining(steps=steps, learning_rate=0.1, imitate=2.0), Lesson(teacher)
    each, batched = (train(model, people, local, KEY, lesson) for train in (train_each, train_batched))
    torch.testing.assert_close(batched.loss, each.loss, rtol=1e-5, atol=1e-5)
    shared = {name: value.detach() for name, value in model.named_parameters()}
    ones = np.ones(len(people), np.float32)
    assert_close(totals(batched, shared, ones), totals(each, shared, ones), 1e-4)
    alone = train_batched(model, people, local, KEY)
    assert (each.loss > alone.loss).all()
    if not isinstance(config, FactorisationConfig):  # without dropout, whoever imitates itself learns nothing by it
        model = lively(config.model_copy(update={"dropout": 0.0}), N_ITEMS)
    alone, itself = (train_batched(model, people, local, KEY, lesson) for lesson in (Lesson(), Lesson(model)))
    torch.testing.assert_close(itself.loss, alone.loss, rtol=1e-5, atol=1e-5)


@models
def test_items_that_are_not_frequent_are_no_targets_in_either_twin(config: AnyModelConfig) -> None:
    model, people = lively(config, N_ITEMS), cohort()
    frequent = np.arange(N_ITEMS) % 3 == 0
    lesson = Lesson(frequent=frequent)
    for drawn in step_batches(people, model, LOCAL, KEY, lesson):
        assert frequent[drawn.targets[drawn.target_mask]].all()
        assert drawn.target_mask.any()
    each, batched = (train(model, people, LOCAL, KEY, lesson) for train in (train_each, train_batched))
    shared = {name: value.detach() for name, value in model.named_parameters()}
    ones = np.ones(len(people), np.float32)
    assert_close(totals(batched, shared, ones), totals(each, shared, ones), 1e-4)


@models
def test_squares_are_squares_entry_by_entry_in_both_twins(config: AnyModelConfig) -> None:
    model, people = lively(config, N_ITEMS), cohort()
    local, ones = LocalTraining(), np.ones(len(people), np.float32)
    shared = {name: value.detach() for name, value in learnt(model).items()}
    each, batched = (train(model, people, local, KEY, Lesson(apart=True)) for train in (train_each, train_batched))
    wanted = {name: part.square().sum(0) for name, part in each.dense.items()}
    assert_close(totals(each.squared(), shared, ones), wanted)
    assert_close(totals(batched.squared(), shared, ones), wanted, 1e-4)


@models
def test_clipping_the_batched_is_clipping_each(config: AnyModelConfig) -> None:
    model, people = lively(config, N_ITEMS), cohort()
    shared = {name: value.detach() for name, value in model.named_parameters()}
    runs = train_each(model, people, LOCAL, KEY), train_batched(model, people, LOCAL, KEY)
    bound = float(np.median(runs[0].norms()))
    each, batched = (clip_factors(trained.norms(), bound) for trained in runs)
    assert 0 < (each < 1).sum() < len(people)
    np.testing.assert_allclose(batched, each, rtol=1e-4)
    assert_close(totals(runs[1], shared, batched), totals(runs[0], shared, each), 1e-4)


@models
def test_later_steps_use_fresh_batches_and_build_on_earlier_ones(config: AnyModelConfig) -> None:
    """Four steps of 0.1 are neither one step of 0.4 nor one step of 0.1, and the loss reported is the first step's."""
    model, people = lively(config, N_ITEMS), cohort()

    def trained(steps: int, rate: float) -> Trained:
        return train_batched(model, people, LocalTraining(steps=steps, learning_rate=rate), KEY)

    four, one, large = trained(4, 0.1), trained(1, 0.1), trained(1, 0.4)
    assert torch.equal(four.loss, one.loss)
    assert not np.allclose(four.norms(), one.norms(), rtol=1e-3)
    assert not np.allclose(four.norms(), large.norms(), rtol=1e-3)


def test_dropout_is_on_while_training() -> None:
    config = MODELS["transformer"]
    people = cohort()
    without = config.model_copy(update={"dropout": 0.0})
    losses = [train_batched(lively(c, N_ITEMS), people, LOCAL, KEY).loss for c in (config, without)]
    assert not torch.allclose(losses[0], losses[1], rtol=1e-3)


def test_a_batched_client_holds_only_rows_that_it_touches() -> None:
    model, people = lively(MODELS["transformer"], N_ITEMS), cohort()
    batches = step_batches(people, model, LOCAL, KEY)
    trained = train_batched(model, people, LOCAL, KEY)
    for place in range(len(people)):
        parts = [p[place] for b in batches for p in (b.inputs, b.targets, b.negatives)]
        assert set(trained.rows[place].tolist()) <= {0, *np.maximum(np.concatenate(parts), 0).tolist()}
    assert trained.rows.shape[1] < N_ITEMS
    assert trained.sparse.keys() == {"item"}
    assert "item" not in trained.dense


def test_renumbered_batches_name_the_same_items() -> None:
    model, people = lively(MODELS["transformer"], N_ITEMS), cohort()
    batches = step_batches(people, model, LOCAL, KEY)
    rows, local = renumber(batches)
    for old, new in zip(batches, local, strict=True):
        for name in ("inputs", "targets", "negatives"):
            was, now = getattr(old, name), getattr(new, name)
            back = np.where(now == START, START, np.take_along_axis(rows, np.maximum(now, 0), axis=1))
            assert np.array_equal(back, was), name
        for name in ("input_mask", "target_mask", "negative_since", "seeds"):
            assert getattr(new, name) is getattr(old, name)
    ends = [np.flatnonzero(np.diff(own) <= 0) for own in rows]  # sorted and unique up to the padding
    assert all((own[end[0] + 1 :] == 0).all() if len(end) else True for own, end in zip(rows, ends, strict=True))


# Engines, blocks and partitions


def fit_plan(
    config: AnyModelConfig, slots: np.ndarray, window: LastWindow | TimeWindow, clip_norm: float = 0.5
) -> RoundPlan:
    params = get_params(lively(config, N_ITEMS))
    task = FitTask(window=window, local=LOCAL.model_copy(update={"clip_norm": clip_norm}))
    return RoundPlan(0, 0, task, config, N_ITEMS, params, KEY, CATALOG.digest(), slots)


@models
def test_engines_and_block_sizes_give_the_same_tally(config: AnyModelConfig) -> None:
    log, window = uneven_log(LENGTHS, N_ITEMS, KEY), LastWindow(skip=1, take=30)
    slots = np.array([0, 1, 2, 4, 5, 6])
    norms = train_each(lively(config, N_ITEMS), everybody(log), LOCAL, KEY).norms()
    plan = fit_plan(config, slots, window, clip_norm=float(np.median(norms)))
    each = LogPool(log, CATALOG, engine="each").run(plan)
    assert each.n_clients == len(slots)
    assert 0 < each.stats["clipped"] < len(slots)
    for block in (1, 2, 5, 64):
        assert_same_tallies(LogPool(log, CATALOG, block=block).run(plan), each)
    assert_same_tallies(LogPool(log, CATALOG, engine="each", block=3).run(plan), each)


TASKS = {
    "count": CountTask(window=LastWindow(skip=1), clip_norm=2.0),
    "evaluate": EvaluateTask(window=LastWindow(skip=0, take=3), probes=2, n_known_items=100, replicates=5, ks=(10,)),
    "evaluate, sampled": EvaluateTask(
        window=LastWindow(skip=0, take=1), n_known_items=100, replicates=5, ks=(10,), sampled_negatives=20
    ),
    "local only": EvaluateTask(
        window=LastWindow(skip=0, take=1),
        n_known_items=100,
        replicates=5,
        ks=(10,),
        personalise=FitTask(window=LastWindow(skip=1), local=LOCAL),
    ),
}


def over_partitions(plan: RoundPlan, n_partitions: int, users: Sequence[int] = LENGTHS) -> Tally:
    log = uneven_log(users, N_ITEMS, KEY)
    tallies = []
    for index in range(n_partitions):
        pool = LogPool.partition(log, CATALOG, index, n_partitions)
        n = pool.census(plan.task.window, CATALOG.digest())
        tallies.append(pool.run(replace(plan, slots=np.arange(n))))
    return summed(tallies)


@models
def test_it_does_not_matter_which_node_hosts_whom(config: AnyModelConfig) -> None:
    plan = fit_plan(config, np.array([], np.int64), LastWindow(skip=0))
    one = over_partitions(plan, 1)
    assert one.n_clients == len(LENGTHS)
    for n_partitions in (2, 5):
        assert_same_tallies(over_partitions(plan, n_partitions), one, 1e-4)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_counts_and_metrics_do_not_depend_on_the_partition_either(task: CountTask | EvaluateTask) -> None:
    popularity = {"popularity": np.arange(N_ITEMS, dtype=np.float32)}
    plan = replace(fit_plan(MODELS["transformer"], np.array([]), LastWindow(skip=0)), task=task, inputs=popularity)
    one = over_partitions(plan, 1)
    for n_partitions in (2, 5):
        assert_same_tallies(over_partitions(plan, n_partitions), one)


def test_more_partitions_than_people_leave_some_pools_empty() -> None:
    plan = fit_plan(MODELS["factorisation"], np.array([]), LastWindow(skip=0))
    assert_same_tallies(over_partitions(plan, 5, LENGTHS[:3]), over_partitions(plan, 1, LENGTHS[:3]))


# Federated and centralised


def first(config: AnyModelConfig) -> named.Params:
    """Return fresh parameters, with public vectors where the model wants them."""
    params = get_params(build(config, N_ITEMS, KEY))
    if PUBLIC in params:
        params[PUBLIC] = KEY.child("text").numpy().normal(0.0, 0.3, params[PUBLIC].shape).astype(np.float32)
    return params


def centralised(
    config: AnyModelConfig, server: SgdConfig | AdamConfig, people: Cohort, rounds: int
) -> list[dict[str, Tensor]]:
    """Return the parameters after each step of plain training on the mean loss over people, by `torch.optim` alone."""
    model = restore(config, N_ITEMS, first(config))
    own = list(learnt(model).values())
    if isinstance(server, SgdConfig):
        steps: torch.optim.Optimizer = torch.optim.SGD(own, server.learning_rate, server.momentum)
    else:
        steps = torch.optim.Adam(own, server.learning_rate, (server.beta1, server.beta2), server.epsilon)
    states = []
    for number in range(rounds):
        key = KEY.child("round", number).child("step", 0)
        batch: Batch = to_torch(draw(people, model.spec, N_ITEMS, key))
        steps.zero_grad()
        model.loss(batch).mean().backward()
        steps.step()
        states.append({name: value.detach().clone() for name, value in model.named_parameters()})
    return states


SERVERS = {
    "sgd": SgdConfig(learning_rate=1.0),
    "sgd with momentum": SgdConfig(learning_rate=0.5, momentum=0.9),
    "adam": AdamConfig(learning_rate=0.01, epsilon=1e-3),
}


FEWER = {
    name: MODELS[name]
    for name in (
        "popularity",
        "factorisation",
        "transformer",
        "transformer, last window",
        "transformer, full softmax",
        "ncf",
        "text transformer",
        "text transformer, adapters",
    )
}


@pytest.mark.parametrize("config", FEWER.values(), ids=FEWER.keys())
@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS.keys())
def test_one_local_step_each_is_centralised_training(config: AnyModelConfig, server: SgdConfig | AdamConfig) -> None:
    """Epsilon 1e-3: at 1e-8 Adam's step is the sign of a gradient, also of one that is nothing but rounding."""
    log, rounds = uneven_log(LENGTHS, N_ITEMS, KEY), 6
    everyone = everybody(log)
    expected = centralised(config, server, replace(everyone, ids=everyone.users), rounds)
    local = LocalTraining(steps=1, learning_rate=1.0, clip_norm=1e6)
    pools = [LogPool.partition(log, CATALOG, index, 2) for index in range(2)]
    task = FitTask(window=LastWindow(skip=0), local=local)
    params: named.Params = first(config)
    memory: named.Params = {}
    names = trainable(config, params)
    moved = 0.0
    for number in range(rounds):
        key = KEY.child("round", number)
        plan = RoundPlan(0, number, task, config, N_ITEMS, params, key, CATALOG.digest(), np.arange(4))
        tally = summed([pool.run(plan) for pool in pools])
        assert tally.n_clients == len(LENGTHS)
        assert tally.stats["clipped"] == 0
        before = params
        mean = named.scale(tally.sums, 1 / tally.n_clients)
        stepped, memory = optimizer.step(server, {name: params[name] for name in names}, memory, mean, 1.0)
        params = {**params, **stepped}
        moved += named.norm(named.add(params, before, -1.0))
        assert_close({name: torch.from_numpy(value) for name, value in params.items()}, expected[number], 1e-4)
    assert moved > 0.01
