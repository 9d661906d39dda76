"""Replay on the server: in later slices, rounds also learn from synthetic histories of the release they began with.

A synthetic history is trained on as a client's is, by the model's own loss, and nobody's data is read: it costs no
privacy. (Real histories are rehearsed where they are, by `training.local.replay`.)

Source: generative replay, Shin et al., NeurIPS 2017.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fedrec import params as named
from fedrec.data.batches import Cohort, draw
from fedrec.data.log import InteractionLog
from fedrec.models.build import restore
from fedrec.models.configs import AnyModelConfig
from fedrec.models.freeze import trainable
from fedrec.models.recommender import to_torch
from fedrec.models.transfer import RehearsalConfig
from fedrec.params import Array, Params
from fedrec.protocol.task import LocalTraining
from fedrec.random import Key
from fedrec.server.synthetic import Source, first_shares, sample_histories


def remembered(
    model: AnyModelConfig, released: Params, n_items: int, counts: Array, settings: RehearsalConfig, key: Key
) -> dict[str, Array]:
    """Return what a slice rehearses, to be kept in the state: ``{"items": [n, l]}`` drawn from the release before it.

    Args:
        model: of what rounds train.
        released: its parameters when the slice began, not grown yet.
        n_items: items that they know.
        counts: [n_items] how many people took each, as released.
        settings: how many histories.
        key: of the slice.
    """
    source = restore(model, n_items, released)
    length = settings.length or source.spec.length
    return {
        "items": sample_histories(
            Source(source), first_shares(counts), settings.histories, length, key.child("rehearsal")
        ).astype(np.int32)
    }


def rehearsed(
    mean: Params,
    params: Params,
    memories: Params,
    model: AnyModelConfig,
    settings: RehearsalConfig,
    local: LocalTraining,
    key: Key,
) -> dict[str, Array]:
    r"""Return the mean update with a share of it learnt from synthetic histories.

    .. math:: (1 - a) \bar\delta - a \, \eta k \, \nabla \mathrm{mean}_h \, loss(h)

    with eta and k the clients' learning rate and steps, so that both parts have one scale; the second is clipped as a
    client's update is.

    Args:
        mean: mean of new minus old over clients, of what rounds train.
        params: all parameters.
        memories: what `remembered` returned.
        model: settings of what rounds train.
        settings: a, and how many histories a round looks at.
        local: what clients do.
        key: of the round.
    """
    histories = memories["items"]
    n = len(histories)
    whole = restore(model, len(next(iter(_rows(params, model)))), params)
    chosen = (key.child("rehearsed").uniforms(np.arange(settings.batch), 1)[:, 0] * n).astype(np.int64)
    batch = to_torch(draw(cohort_of(histories, chosen), whole.spec, whole.n_items, key.child("rehearsal")))
    tensors = dict(whole.named_parameters())
    wanted = {name: tensors[name] for name in trainable(model, tensors)}
    gradients = torch.autograd.grad(whole(batch).mean(), list(wanted.values()), materialize_grads=True)
    scale = -local.learning_rate * local.steps
    own = {name: scale * gradient.numpy() for name, gradient in zip(wanted, gradients, strict=True)}
    own = named.scale(own, min(1.0, local.clip_norm / max(named.norm(own), 1e-12)))
    return {name: ((1 - settings.share) * mean[name] + settings.share * own[name]).astype(np.float32) for name in mean}


def cohort_of(histories: Array, chosen: NDArray[np.int64]) -> Cohort:
    """Return synthetic people as a cohort: all that each did is in the window."""
    n, length = histories.shape
    log = InteractionLog(
        np.arange(n + 1, dtype=np.int64) * length,
        histories.astype(np.int32).reshape(-1),
        np.zeros(n * length, np.int64),
        np.zeros(n * length, np.int8),
        np.zeros(n * length, np.float32),
        tuple(str(i) for i in range(n)),
    )
    places = np.arange(len(chosen), dtype=np.int64)
    return Cohort(log, chosen, places, np.zeros_like(chosen), np.full_like(chosen, length))


def _rows(params: Params, model: AnyModelConfig) -> list[Array]:
    from fedrec.models.build import MODELS

    return [params[name] for name in sorted(MODELS[type(model)].row_names & params.keys())]
