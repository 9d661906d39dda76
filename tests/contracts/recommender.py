"""What every recommender is held to: the models, data of a known shape, and federated training in a few lines.

A new model joins the suite by one more entry in `RECOMMENDERS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrec import params as named
from fedrec.client.pool import LogPool
from fedrec.data.batches import Batch, Cohort, draw
from fedrec.data.cleaning import Dataset
from fedrec.data.features import FeatureSettings, item_features
from fedrec.data.log import InteractionLog
from fedrec.data.slices import LastWindow
from fedrec.learning import AdamConfig, SgdConfig
from fedrec.models.blend import blended
from fedrec.models.build import build, restore
from fedrec.models.configs import (
    AnyModelConfig,
    BlendConfig,
    FactorisationConfig,
    FullSoftmax,
    GruConfig,
    LightGcnConfig,
    MachineConfig,
    NcfConfig,
    NearestConfig,
    PopularityConfig,
    SampledSoftmax,
    SpectralConfig,
    TasksConfig,
    TextTransformerConfig,
    TransformerConfig,
)
from fedrec.models.freeze import PUBLIC, trainable
from fedrec.models.recommender import Recommender, get_params, set_params, to_torch
from fedrec.params import Params
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Expectation
from fedrec.protocol.task import CooccurrenceTask, CountTask, FitTask, LocalTraining
from fedrec.random import Key
from fedrec.server import optimizer
from fedrec.server.spectral import projected, spectral_params

KEY = Key.from_seed(11)
EVERYTHING = LastWindow(skip=0)


@dataclass(frozen=True)
class Entry:
    """A model in the suite, and what it takes to learn data with a known answer.

    Attributes:
        config: small settings; `length` leaves room for padding beyond the longest history of the suite.
        rounds: rounds in which everybody takes part.
        server: optimizer of the mean update.
        local: what a client does in a round.
        sequential: whether it learns what comes next.
    """

    config: AnyModelConfig
    rounds: int = 0
    server: SgdConfig | AdamConfig = field(default_factory=lambda: AdamConfig(learning_rate=0.02))
    local: LocalTraining = field(default_factory=LocalTraining)
    sequential: bool = False


def _transformer(softmax: FullSoftmax | SampledSoftmax) -> TransformerConfig:
    return TransformerConfig(dim=16, heads=2, expand=2, length=16, dropout=0.1, softmax=softmax)


def _text(**changes: Any) -> TextTransformerConfig:
    settings: dict[str, Any] = {"dim": 16, "heads": 2, "expand": 2, "length": 16, "dropout": 0.1, "residual": 8}
    settings |= {"features": FeatureSettings(rank=12, fourier=0), "softmax": SampledSoftmax(negatives=16)}
    return TextTransformerConfig(**settings | changes)


SEQUENCE: dict[str, Any] = {"dim": 16, "length": 16, "dropout": 0.1, "softmax": SampledSoftmax(negatives=16)}
RECOMMENDERS: dict[str, Entry] = {
    "popularity": Entry(PopularityConfig()),
    "spectral": Entry(SpectralConfig(item_rank=6, feature_rank=4, length=16), rounds=1),
    "factorisation": Entry(
        FactorisationConfig(dim=8, length=16, targets=8, negatives=16), rounds=60, server=AdamConfig(learning_rate=0.05)
    ),
    "blend": Entry(
        BlendConfig(
            prior=SpectralConfig(item_rank=6, feature_rank=4, length=16, feature_decay=0.6, item_weight=0.5),
            fitted=_transformer(SampledSoftmax(negatives=16)),
        ),
        rounds=120,
        sequential=True,
    ),
    "transformer": Entry(_transformer(SampledSoftmax(negatives=16)), rounds=120, sequential=True),
    "transformer, full softmax": Entry(_transformer(FullSoftmax()), rounds=120, sequential=True),
    "transformer, many tasks": Entry(
        TransformerConfig(**SEQUENCE, heads=2, expand=2, tasks=TasksConfig(value_weight=0.5, value_range=(0.0, 1.0))),
        rounds=120,
        sequential=True,
    ),
    "transformer, popularity": Entry(
        TransformerConfig(**SEQUENCE, heads=2, expand=2, popularity_weight=0.5), rounds=120, sequential=True
    ),
    "gru": Entry(GruConfig(**SEQUENCE), rounds=120, sequential=True),
    "ncf": Entry(NcfConfig(**SEQUENCE, hidden=8), rounds=120),
    "ncf, full softmax": Entry(NcfConfig(**{**SEQUENCE, "softmax": FullSoftmax()}, hidden=8), rounds=120),
    "factorisation machine": Entry(MachineConfig(**SEQUENCE), rounds=120),
    "lightgcn": Entry(LightGcnConfig(**SEQUENCE), rounds=120),
    "nearest": Entry(NearestConfig(features=FeatureSettings(rank=12, fourier=0), length=16), rounds=1),
    "text transformer": Entry(_text(), rounds=120, sequential=True),
    "text transformer, full softmax": Entry(_text(softmax=FullSoftmax()), rounds=120, sequential=True),
    "ncf, popularity": Entry(NcfConfig(**SEQUENCE, hidden=8, popularity_weight=1.0), rounds=120),
    "machine, full softmax, popularity": Entry(
        MachineConfig(**{**SEQUENCE, "softmax": FullSoftmax()}, popularity_weight=1.0), rounds=120
    ),
    "text transformer, adapters": Entry(
        _text(lora=8, train="adapters", residual=16),
        rounds=150,
        server=AdamConfig(learning_rate=0.05),
        sequential=True,
    ),
    "text transformer, top block": Entry(_text(blocks=2, train="top"), rounds=200, sequential=True),
}


def uneven_log(lengths: Sequence[int], n_items: int, key: Key) -> InteractionLog:
    """Return people with histories of these lengths; items are uniform, repeats included."""
    user = np.repeat(np.arange(len(lengths)), lengths)
    item = np.floor(key.child("items").uniforms(np.arange(len(user)), 1)[:, 0] * n_items).astype(np.int64)
    people = tuple(f"u{i}" for i in range(len(lengths)))
    value = key.child("values").uniforms(np.arange(len(user)), 1)[:, 0].astype(np.float32)
    value[::5] = np.nan  # not everything has a value
    event = (item % 3).astype(np.int8)
    kinds = ("click", "buy", "other")
    return InteractionLog.from_rows(user, item, np.arange(len(user)), people, event, value, kinds)


def everybody(log: InteractionLog, low: Sequence[int] | None = None) -> Cohort:
    """Return all people of the log, their whole history (from place `low` on) in the window."""
    users = np.arange(log.n_users, dtype=np.int64)
    first = np.zeros(log.n_users, np.int64) if low is None else np.asarray(low, np.int64)
    return Cohort(log, users, users + 100, first, log.counts.astype(np.int64))


def lively(config: AnyModelConfig, n_items: int, key: Key = KEY) -> Recommender:
    """Return a model of which every parameter is away from its initial value, zeros and ones included."""
    model = build(config, n_items, key)
    params = get_params(model)
    set_params(
        model,
        {
            name: value + (0.3 * key.child("lively", name).numpy().random(value.shape)).astype(value.dtype)
            for name, value in params.items()
        },
    )
    return model.eval()


def drawn(model: Recommender, cohort: Cohort, key: Key = KEY) -> Batch:
    """Return the batch that the cohort would train on."""
    return to_torch(draw(cohort, model.spec, model.n_items, key))


def federate(
    entry: Entry, dataset: Dataset, window: LastWindow = EVERYTHING, config: AnyModelConfig | None = None
) -> Recommender:
    """Return the entry's model, trained by everybody together through a pool, tallies and the server's optimizer."""
    wanted, n_items = config or entry.config, len(dataset.catalog)
    pool = LogPool(dataset.log, dataset.catalog)
    digest = dataset.catalog.digest()
    slots = np.arange(pool.census(window, digest), dtype=np.int64)
    task = FitTask(window=window, local=entry.local)
    params: Params = get_params(build(wanted, n_items, KEY.child("model")))
    if isinstance(wanted, TextTransformerConfig):
        params = {**params, PUBLIC: item_features(dataset.catalog, wanted.features)}
    learnt = trainable(wanted, params)
    shapes = {name: (params[name].shape, params[name].dtype) for name in learnt}
    expected = Expectation(shapes, len(slots), task.local.clip_norm)
    memory: Params = {}
    if isinstance(wanted, SpectralConfig) and entry.rounds:
        return restore(wanted, n_items, counted(wanted, pool, window, slots))
    if isinstance(wanted, NearestConfig):
        return restore(wanted, n_items, {PUBLIC: tastes(n_items) if entry.rounds else params[PUBLIC]})
    if isinstance(wanted, BlendConfig) and entry.rounds:
        prior = counted(wanted.prior, pool, window, slots)
        fitted = federate(replace(entry, config=wanted.fitted), dataset, window)
        return restore(wanted, n_items, blended(prior, get_params(fitted), 10.0))
    for number in range(entry.rounds):
        plan = RoundPlan(0, number, task, wanted, n_items, params, KEY.child("round", number), digest, slots)
        tally = pool.run(plan)
        expected.check(tally)
        mean = named.scale(tally.sums, 1.0 / tally.n_clients)
        stepped, memory = optimizer.step(entry.server, {name: params[name] for name in learnt}, memory, mean, 1.0)
        params = {**params, **stepped}
    return restore(wanted, n_items, params)


def tastes(n_items: int) -> NDArray[np.float32]:
    """Return public vectors that tell the three tastes of the suite's checkerboard, and little else."""
    taste = np.eye(12, dtype=np.float32)[np.arange(n_items) % 3]
    return taste + KEY.child("tastes").numpy().normal(0.0, 0.1, taste.shape).astype(np.float32)


def counted(config: SpectralConfig, pool: LogPool, window: LastWindow, slots: NDArray[np.int64]) -> Params:
    """Return the parameters of the model that is made from one statistic of everybody."""
    n_items, digest = len(pool.catalog), pool.catalog.digest()
    features = item_features(pool.catalog, FeatureSettings(rank=config.feature_rank, fourier=0))
    task = CooccurrenceTask(window=window)
    plan = RoundPlan(
        0, 0, task, PopularityConfig(), n_items, {}, KEY.child("statistic"), digest, slots, {"features": features}
    )
    tally = pool.run(plan)
    statistic = projected(features, tally.sums, tally.n_clients)
    counts = pool.run(replace(plan, task=CountTask(window=window))).sums["counts"]
    return spectral_params(statistic, counts, config, features, n_items)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    """Assert that two tensors are alike in shape, dtype and, up to rounding, in values."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
