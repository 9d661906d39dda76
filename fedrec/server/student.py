"""A small recommender for devices: what a release says, in at most a tenth of its parameters.

It begins with the statistic, which was released before, and is taught by the release on histories that are drawn from
it: post-processing, so it costs no privacy.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from fedrec import params as named
from fedrec.config import Experiment
from fedrec.errors import ConfigError
from fedrec.models.build import build, restore
from fedrec.models.configs import AnyModelConfig, SpectralConfig
from fedrec.models.portable import expected_shapes
from fedrec.models.recommender import Recommender, get_params, set_params
from fedrec.models.sequence import NextItem
from fedrec.models.transfer import StudentConfig
from fedrec.params import Array, Params
from fedrec.random import Key
from fedrec.server.adopt import release_of
from fedrec.server.begin import statistic_features
from fedrec.server.distil import Teacher, distilled, had_before, matched_temperature
from fedrec.server.popular import with_popularity
from fedrec.server.release import Student
from fedrec.server.spectral import popularity, spectral_params
from fedrec.server.synthetic import Source, first_shares, sample_histories
from fedrec.server.work import Work

PROBED = 64
"""Histories on which the temperature is found."""


def n_params(config: AnyModelConfig, n_items: int) -> int:
    """Return how many parameters a model of these settings has.

    >>> n_params(SpectralConfig(item_rank=2, feature_rank=0), 10)
    34
    """
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in expected_shapes(config, n_items).values())


def check_student(experiment: Experiment, n_items: int) -> None:
    """Raise what makes a device student impossible.

    Raises:
        ConfigError: it is larger than its settings allow.
    """
    settings = experiment.training.student
    if settings is None:
        return
    own, whole = n_params(settings.model, n_items), n_params(experiment.model, n_items)
    if own > settings.share * whole:
        raise ConfigError(
            f"The device student would have {own:,} parameters, {own / whole:.1%} of the release's {whole:,} where "
            f"training.student.share allows {settings.share:.0%}; make it narrower, or raise the share."
        )


def make(work: Work) -> Work:
    """Make the release's device student, a function of the state; with tiers the small devices go on from it."""
    settings, recipe, state = work.recipe.experiment.training.student, work.recipe, work.state
    if settings is None:
        return work
    tiers, model, n_items = recipe.experiment.training.tiers, recipe.experiment.model, work.time_slice.n_items
    student = device_student(
        model,
        release_of(state, model),
        state.counts["counts"],
        settings,
        n_items,
        work.key.child("student"),
        state.small or _of_statistic(work, settings.model),
        0.0 if tiers is None else tiers.own,
    )
    return replace(work if tiers is None else work.advanced(small=student.params), student=student)


def _of_statistic(work: Work, config: AnyModelConfig) -> Params:
    """Return the statistic cut to the student's ranks; empty where there is none, or the student is no such model."""
    statistic = work.state.statistic
    if not isinstance(config, SpectralConfig) or "items" not in statistic:
        return {}
    features = statistic_features(work, statistic["popular"])
    return spectral_params(statistic, statistic["counts"], config, features, work.time_slice.n_items)


def device_student(
    model: AnyModelConfig,
    params: Params,
    counts: Array,
    settings: StudentConfig,
    n_items: int,
    key: Key,
    start: Params | None = None,
    own: float = 0.0,
) -> Student:
    """Teach a student what a release says.

    Args:
        model: the release's settings.
        params: its parameters.
        counts: [n_items] how many people took each item, as released: the first items of histories follow them.
        settings: the student's form and how it is taught.
        n_items: size of the catalogue.
        key: where all randomness comes from.
        start: parameters to begin with: what small devices trained, or the statistic; without any, `begun` makes them.
        own: how much it then listens to what it was, beside the release with weight 1.
    """
    release = restore(model, n_items, params)
    first = first_shares(counts)
    everything = np.ones(n_items, np.float32)
    probe = sample_histories(Source(None), first, PROBED, settings.length, key.child("probe"))
    temperature = _temperature(release, probe, settings.entropy)
    # Histories of a plausible kind are drawn first; the temperature that counts is found on those.
    probe = sample_histories(Source(release, temperature), first, PROBED, settings.length, key.child("probe"))
    temperature = _temperature(release, probe, settings.entropy)
    histories = sample_histories(
        Source(release, temperature), first, settings.histories, settings.length, key.child("histories")
    )
    student = build(settings.model, n_items, key.child("student"))
    set_params(student, start or begun(student, release, histories[:512], counts))
    teachers = [Teacher("release", release, 1.0, everything, temperature)]
    if start and own:
        before = restore(settings.model, n_items, start)
        teachers.append(Teacher("itself", before, own, everything, _temperature(before, probe, settings.entropy)))
    losses = [now.loss for now in distilled(student, teachers, histories, key, settings.lessons())]
    found = get_params(student)
    own, whole = named.n_bytes(found), named.n_bytes(params)
    facts = {
        "n_params": sum(value.size for value in found.values()),
        "bytes": own,
        "share_of_params": sum(v.size for v in found.values()) / sum(v.size for v in params.values()),
        "share_of_bytes": own / whole,
        "temperature": round(temperature, 6),
        "steps": settings.steps,
        "loss": [round(losses[0], 6), round(losses[-1], 6)],
        "epsilon": 0.0,
    }
    return Student(settings.model.model_dump(mode="json"), found, facts)


@torch.no_grad()
def _temperature(release: Recommender, histories: NDArray[np.int64], share: float) -> float:
    items = torch.from_numpy(histories)
    places = torch.arange(1, items.shape[1] + 1, max(1, items.shape[1] // 6)).expand(len(items), -1)
    had = had_before(items, places, release.n_items)
    scores = release.score(release.states(items, places).flatten(0, 1)).masked_fill(had, float("-inf"))
    return matched_temperature(scores, share * float(np.log(release.n_items)))


@torch.no_grad()
def begun(student: Recommender, release: Recommender, histories: NDArray[np.int64], counts: Array) -> Params:
    r"""Return the parameters that a student begins with: item vectors that lie to each other as the release's do.

    With R the release's item rows and u its user vectors on the histories, they are the leading principal directions of
    :math:`R \, \mathrm{diag}(\mathrm{sd}(u))`, the score's own geometry.
    """
    found = get_params(student)
    items = torch.from_numpy(histories)
    users = release.states(items, torch.full((len(items), 1), items.shape[1]))[:, 0]
    scores = release.score(torch.eye(users.shape[1]))
    if isinstance(release, NextItem) and release.settings.popularity_weight:
        scores = scores - release.prior()
    rows = scores.T * users.std(0)
    name = "items" if isinstance(student.config, SpectralConfig) else "item"
    reduced = _reduced(rows.double(), found[name].shape[1])
    if isinstance(student.config, SpectralConfig):
        table = reduced / max(float(np.abs(reduced).max()), 1e-12)
        centred = table - table.mean(0)
        found |= {
            "items": table,
            "popularity": popularity(counts),
            "item_spread": (centred.T @ centred / np.float32(len(table))).astype(np.float32),
        }
    else:
        found["item"] = reduced * np.float32(found["item"].std() / max(float(reduced.std()), 1e-12))
    return dict(with_popularity(student.config, found, counts))


def _reduced(rows: Float[Tensor, "n d"], dim: int) -> NDArray[np.float32]:
    """Return [n, dim] coordinates of the rows along their leading directions; zeros where there are fewer."""
    _, directions = torch.linalg.eigh(rows.T @ rows)
    lead = directions.flip(1)[:, :dim]
    out = np.zeros((len(rows), dim), np.float32)
    out[:, : lead.shape[1]] = (rows @ lead).numpy()
    return out
