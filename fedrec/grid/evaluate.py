"""How good a release is on the data at hand: the questions of its run, asked again of any release on any slice."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from fedrec.client.pool import count
from fedrec.config import DataConfig, Experiment
from fedrec.data.batches import Cohort
from fedrec.data.cleaning import Dataset
from fedrec.data.slices import TimeSlice, resolve
from fedrec.data.sources import load_dataset
from fedrec.errors import ConfigError
from fedrec.grid.simulate import over_grid
from fedrec.models.configs import AnyModelConfig, ModelConfig
from fedrec.params import Params
from fedrec.protocol.task import CountTask
from fedrec.server.judge import Contender, judge, popularity_contender
from fedrec.server.release import Release
from fedrec.server.round import Recipe
from fedrec.server.run import cut
from fedrec.server.start import public_vectors, source_of

STATEMENT = "Not private: these are exact metrics of the data on this machine, for whoever may see that data."


def evaluate(
    release: Release,
    *,
    source: str | None = None,
    index: int | None = None,
    student: bool = False,
    dataset: Dataset | None = None,
    say: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Rank what people took next among all that they did not know, by a release and by popularity.

    The split, the cut-offs and the bootstrap are those of the release's experiment, so on the slice after which it
    was made the figures are those of its report. Popularity is counted exactly, as in a run without privacy.

    Args:
        release: what is judged.
        source: a data set, or a folder of ``fedrec data import``; None: that of the experiment.
        index: the slice whose test is asked; None: that of the release.
        student: judge its small student for devices as well.
        dataset: the interactions, if they are loaded already.
        say: gets notes about where data came from.

    Returns:
        ``release``, ``slice``, ``learnt`` ("before" or "after" what is tested), ``data``, ``rows`` and ``differences``
        as `fedrec.server.judge.judge` returns them, ``seconds``, ``bytes_down``, ``bytes_up``, ``privacy``.

    Raises:
        ConfigError: the data has another catalogue, or the run no such slice; the release has no student.
        FedrecError: whatever else went wrong, in one sentence.
    """
    experiment = Experiment.parse(release.manifest.experiment)
    if source is not None:
        experiment = experiment.model_copy(update={"data": DataConfig(source=source)})
    data = load_dataset(experiment.data.source, say=say) if dataset is None else dataset
    _check_catalog(release, data)
    slices = cut(experiment, data)
    time_slice = _slice(slices, release.manifest.slice if index is None else index, release.manifest.n_items)
    contenders = _contenders(release, student)
    recipe = Recipe(
        experiment, data.catalog.digest(), time.perf_counter,
        vectors=public_vectors(experiment, data.catalog, slices[0].n_items, source_of(experiment)),
    )  # fmt: skip
    counts = _popularity(data, slices[: time_slice.index + 1], time_slice.n_items_test)
    contenders["popularity"] = popularity_contender(counts)
    began = time.perf_counter()
    verdict = over_grid(lambda link: judge(contenders, time_slice, link, recipe, counts), experiment, data, None)
    wanted = ("rows", "differences", "bytes_down", "bytes_up")
    return {
        "release": release.version,
        "slice": time_slice.index,
        "learnt": "before" if release.manifest.slice <= time_slice.index else "after",
        "data": {"name": data.name, "digest": data.log.digest(), "n_users": data.log.n_users},
        **{name: verdict[name] for name in wanted},
        "seconds": round(time.perf_counter() - began, 3),
        "privacy": STATEMENT,
    }


def _check_catalog(release: Release, data: Dataset) -> None:
    n = release.manifest.n_items
    if data.catalog.ids[:n] != release.catalog.ids[:n]:
        raise ConfigError(
            f"Release {release.version} knows another catalogue than '{data.name}': its first {n:,} items differ; "
            "evaluate on data of the catalogue that it was made with, or of one that has grown from it."
        )


def _slice(slices: Sequence[TimeSlice], index: int, n_items: int) -> TimeSlice:
    """Return a slice whose test ranks all items of its time, and all that the release knows."""
    if not 0 <= index < len(slices):
        raise ConfigError(
            f"There is no slice {index}: this release's experiment cuts into slices 0 to {len(slices) - 1}."
        )
    return replace(slices[index], life=(), n_items_test=max(slices[index].n_items_test, n_items))


def _contenders(release: Release, student: bool) -> dict[str, Contender]:
    adapter: TypeAdapter[AnyModelConfig] = TypeAdapter(ModelConfig)
    found = {"release": Contender(adapter.validate_python(release.manifest.model), release.params)}
    if not student:
        return found
    if release.manifest.student is None or release.student is None:
        raise ConfigError(f"Release {release.version} has no student; leave --student out.")
    small = adapter.validate_python(release.manifest.student["model"])
    return {**found, "student": Contender(small, release.student)}


def _popularity(data: Dataset, slices: Sequence[TimeSlice], n_items: int) -> Params:
    """Return {"counts": [n_items]} what the run counted without privacy: of every slice, who took each item."""
    sums, users = np.zeros(n_items, np.float32), np.arange(data.log.n_users)
    for one in slices:
        everybody = Cohort(data.log, users, users, *resolve(data.log, one.train))
        sums += count(CountTask(window=one.train), everybody, n_items).sums["counts"]
    return {"counts": sums}
