"""Public pre-training: the server trains on public data by itself; federated rounds elsewhere begin there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fedrec.config import Experiment
from fedrec.data.batches import Cohort, draw
from fedrec.data.cleaning import Dataset
from fedrec.data.slices import resolve
from fedrec.errors import ConfigError, RunError
from fedrec.models.adapters import laid
from fedrec.models.build import restore
from fedrec.models.configs import SequenceConfig, TextTransformerConfig
from fedrec.models.recommender import learnt, to_torch
from fedrec.params import Array, Params
from fedrec.random import Key
from fedrec.server import optimizer
from fedrec.server.judge import initial
from fedrec.server.popular import with_popularity
from fedrec.server.registry import Registry
from fedrec.server.release import Release
from fedrec.server.round import Recipe
from fedrec.server.run import cut
from fedrec.server.sampling import sample
from fedrec.server.start import carried, public_vectors, source_of
from fedrec.server.state import ServerState

ASKED, BLOCK = 1024, 64
"""People whose gradient lays the adapters, and how many at once."""
STATEMENT = "Trained by the server on public data, which nothing protects: no client took part."


def pretrain(
    experiment: Experiment,
    dataset: Dataset,
    registry: Registry,
    say: Callable[[int, float], None] = lambda step, loss: None,
) -> Release:
    """Train centrally on the first slice of a public data set, and publish what was learnt as a release.

    One step is what one federated round with a single local step of rate 1 and no clipping would be: the people of a
    cohort, one batch of each, the server's optimizer. It costs less, for no person's gradient is made alone.

    Of a text transformer with adapters (`model.lora`) and train = "all" the weights are trained; the adapters are then
    laid where the same data would move the weights if the items were unknown, see `fedrec.models.adapters`.

    Args:
        experiment: the same settings as for `fedrec simulate`; `training.base.rounds` counts steps.
        dataset: public interactions.
        registry: takes the release; `[start]` of another experiment names its folder.
        say: is told each step's number and mean loss.

    Raises:
        ConfigError: the model is not one of sequences, the experiment is private, or adapters are to have more
            directions than there are.
        RunError: nobody has anything to train on, or the loss is not finite.
    """
    asked, experiment = experiment, _without_adapters(experiment)
    config, training = experiment.model, experiment.training
    if not isinstance(config, SequenceConfig):
        raise ConfigError(f'Pre-training fits models of sequences; model.kind = "{config.kind}" is not one of them.')
    if experiment.privacy.mode != "none":
        raise ConfigError(
            'Pre-training is for public data and adds no noise; set privacy.mode to "none", or run `fedrec simulate`.'
        )
    first = cut(experiment, dataset)[0]
    source = source_of(experiment)
    recipe = Recipe(
        experiment, dataset.catalog.digest(), lambda: 0.0,
        vectors=public_vectors(experiment, dataset.catalog, first.n_items, source),
        carried=carried(experiment, source),
    )  # fmt: skip
    params: Params = {**initial(config, first.n_items, recipe), **recipe.carried}
    low, high = resolve(dataset.log, first.train)
    eligible = np.flatnonzero(high > low)
    if len(eligible) == 0:
        raise RunError("Nobody has an interaction in the first slice, so there is nothing to pre-train on.")
    everyone = Cohort(dataset.log, eligible, eligible, low[eligible], high[eligible])
    taken = np.concatenate([np.unique(dataset.log.history(int(user))[low[user] : high[user]]) for user in eligible])
    params = with_popularity(config, params, np.bincount(taken, minlength=first.n_items).astype(np.float32))
    model = restore(config, first.n_items, params).train()
    own = learnt(model)
    memory: dict[str, Array] = {}
    average: dict[str, Array] = {}
    key = ServerState.root_key(experiment).child("pretrain")
    for step in range(training.base.rounds):
        at = key.child("step", step)
        cohort = everyone.take(sample(training.cohort, len(eligible), at.child("cohort")))
        if len(cohort) == 0:
            continue
        model.zero_grad()
        loss = model(to_torch(draw(cohort, model.spec, model.n_items, at))).mean()
        loss.backward()
        if not torch.isfinite(loss):
            raise RunError(f"The loss of step {step} is not finite; lower training.server.learning_rate.")
        down = {n: np.zeros(v.shape, np.float32) if v.grad is None else -v.grad.numpy() for n, v in own.items()}
        before = {name: value.detach().numpy() for name, value in own.items()}
        new, memory = optimizer.step(training.server, before, memory, down, optimizer.speed(training.base, step))
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(torch.from_numpy(new[name]))
        average = optimizer.averaged(average, new, training.average, step)
        say(step, float(loss.detach()))
    params = {**params, **(average or {name: value.detach().numpy() for name, value in own.items()})}
    beside = asked.model
    if isinstance(beside, TextTransformerConfig) and isinstance(config, TextTransformerConfig) and beside != config:
        params = laid(beside, params, _gradient(config, params, everyone, key.child("adapters")))
    return registry.publish(
        params,
        dataset.catalog.prefix(first.n_items),
        run=f"pretrain-{asked.name}-{asked.digest()[:8]}",
        slice=0,
        parent=None,
        model=asked.model.model_dump(mode="json"),
        experiment=asked.model_dump(mode="json"),
        experiment_digest=asked.digest(),
        metrics={},
        privacy={"statement": STATEMENT, "unit": None, "epsilon": None, "delta": None},
    )


def _without_adapters(experiment: Experiment) -> Experiment:
    """Return the experiment as its weights are trained; itself if no adapters are to be laid beside them."""
    model = experiment.model
    if not isinstance(model, TextTransformerConfig) or not model.lora or model.train != "all":
        return experiment
    most = min(model.dim, model.features.rank)
    if max(model.lora, model.residual) > most:
        raise ConfigError(
            f"Adapters are laid along at most {most} directions here, the smaller of model.dim and features.rank, "
            f"but lora is {model.lora} and residual {model.residual}."
        )
    return experiment.model_copy(update={"model": model.model_copy(update={"lora": 0})})


def _gradient(config: TextTransformerConfig, params: Params, everyone: Cohort, key: Key) -> Params:
    """Return the mean gradient of the loss where no item has numbers of its own: as where nothing is known of them."""
    unknown = {**params, "residual": np.zeros_like(params["residual"])}
    model = restore(config, len(params["residual"]), unknown).train()
    some = np.sort(key.child("people").numpy().permutation(len(everyone))[:ASKED])
    for start in range(0, len(some), BLOCK):
        batch = draw(everyone.take(some[start : start + BLOCK]), model.spec, model.n_items, key.child("batch", start))
        (model(to_torch(batch)).sum() / len(some)).backward()
    return {name: value.grad.numpy() for name, value in learnt(model).items() if value.grad is not None}
