"""One whole run: a folder, a state to start or resume from, the stream, and the report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedrec import __version__
from fedrec.config import BlockSplit, Experiment, LeaveOneOutSplit, ScheduleSplit
from fedrec.data.blocks import block_slices
from fedrec.data.cleaning import Dataset
from fedrec.data.features import make_encoder
from fedrec.data.slices import TimeSlice, leave_one_out, schedule_slices, stream_slices, with_validation
from fedrec.errors import ConfigError, PrivacyError, RunError
from fedrec.evaluation.metrics import metric_names
from fedrec.models.build import build, trained
from fedrec.models.configs import BlendConfig, NearestConfig, SpectralConfig, TextTransformerConfig, TransformerConfig
from fedrec.privacy.accounting import check_delta
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.privacy.settings import NoPrivacy, UserLevelPrivacy
from fedrec.protocol.link import Link
from fedrec.server.drift import check_drift
from fedrec.server.files import load_last_good, make_folder, save_checkpoint
from fedrec.server.guard import Guard, guard_of, planned, populations, user_level
from fedrec.server.lifelong import run_stream
from fedrec.server.local import local_mode
from fedrec.server.publish import privacy
from fedrec.server.registry import Registry
from fedrec.server.round import Recipe, take_census
from fedrec.server.signed import SignedLink
from fedrec.server.start import carried, check_context, public_vectors, source_of
from fedrec.server.state import ServerState
from fedrec.server.student import check_student
from fedrec.server.teach import check_distil
from fedrec.server.tiers import check_tiers
from fedrec.server.trial_words import protocol
from fedrec.server.work import Desk, Event, Observer

MOST_PAIRED = 8_192
"""Items of which a statistic of all pairs is still gathered: 134 MB."""
MOST_PEOPLE = 10**9
"""Taken for their number where a server does not know it yet."""
VALIDATION = 0.1
"""Share of a slice's time that a blend keeps for validation."""
CHECKPOINT, REPORT, LEDGER = "state.fedrec", "report.html", "ledger.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps its checkpoint and its report.

    Attributes:
        path: ``<root>/<experiment name>/<number>``.
        name: ``<experiment name>/<number>``, which names the run in the registry.
    """

    path: Path
    name: str

    @classmethod
    def new(cls, root: Path, experiment: Experiment) -> RunFolder:
        """Make the folder of a new run, numbered after the ones that are there.

        Raises:
            RegistryError: the disk refuses.
        """
        number = max((n for n, _ in _numbered(root / experiment.name)), default=0) + 1
        folder = cls(root / experiment.name / f"{number:03d}", f"{experiment.name}/{number:03d}")
        make_folder(folder.path)
        return folder

    @classmethod
    def unfinished(cls, root: Path, experiment: Experiment) -> RunFolder:
        """Return the newest run of this experiment, to resume it.

        Raises:
            RunError: there is none, or it is complete.
        """
        found = cls.newest(root, experiment)
        if found is None:
            raise RunError(f"Nothing to resume: no run in '{root / experiment.name}'; start one without --resume.")
        if found.complete:
            raise RunError(f"Nothing to resume: run '{found.path}' is complete; start a new one without --resume.")
        return found

    @classmethod
    def newest(cls, root: Path, experiment: Experiment) -> RunFolder | None:
        """Return the newest run of this experiment, or None."""
        found = _numbered(root / experiment.name)
        return cls(found[-1][1], f"{experiment.name}/{found[-1][1].name}") if found else None

    @property
    def complete(self) -> bool:
        """Whether the run went to its end."""
        return (self.path / REPORT).is_file()


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    paths = folder.iterdir() if folder.is_dir() else []
    return sorted((int(path.name), path) for path in paths if path.name.isdigit() and path.is_dir())


def cut(experiment: Experiment, dataset: Dataset) -> tuple[TimeSlice, ...]:
    """Return the slices that the experiment asks for; where validation decides they keep a window for it."""
    slices = _cut(experiment, dataset)
    chooses = isinstance(experiment.model, BlendConfig) or experiment.training.stopping is not None
    keeps = chooses and not isinstance(experiment.split, BlockSplit)
    return with_validation(slices, VALIDATION) if keeps else slices


def _cut(experiment: Experiment, dataset: Dataset) -> tuple[TimeSlice, ...]:
    split = experiment.split
    if isinstance(split, LeaveOneOutSplit):
        return leave_one_out(dataset.catalog, split.test)
    if isinstance(split, BlockSplit):
        return block_slices(dataset, split.later + 1, split.refit, split.mask)
    if dataset.provenance.get("time_unit") == "blocks":
        raise RunError(f"'{experiment.data.source}' is laid out in blocks, without time; use split.kind = \"blocks\".")
    if dataset.provenance.get("time_unit") == "order":
        raise RunError(
            f"'{experiment.data.source}' knows only the order within each person, no global time; "
            'use split.kind = "leave_one_out".'
        )
    if isinstance(split, ScheduleSplit):
        return schedule_slices(dataset.catalog, split.start, split.interval_seconds, split.later, split.test)
    if not len(dataset.log):
        raise ConfigError(
            "The server knows the catalogue and no interactions, so it cannot cut by their times; set split.kind = "
            '"schedule".'
        )
    return stream_slices(dataset.log, dataset.catalog, split.base, split.later, split.holdout)


def check(experiment: Experiment, dataset: Dataset) -> None:
    """Raise what makes the experiment impossible on this data, while nothing is written yet.

    Raises:
        FedrecError: the data cannot be cut as asked, or settings contradict each other.
    """
    slices = cut(experiment, dataset)
    public_vectors(experiment, dataset.catalog, slices[0].n_items, source_of(experiment))
    metric_names(experiment.evaluation.ks)
    build(experiment.model, 1, ServerState.root_key(experiment))
    _check_statistics(experiment, dataset)
    check_context(experiment, dataset)
    check_distil(experiment)
    check_drift(experiment)
    check_tiers(experiment)
    check_student(experiment, cut(experiment, dataset)[0].n_items)
    if isinstance(experiment.privacy, UserLevelPrivacy):
        # A server that knows the catalogue alone learns at the census how many people there are.
        planned(experiment, populations(user_level(experiment), dataset.log.n_users or MOST_PEOPLE), 1.0)
    _check_promotion(experiment)
    _check_training(experiment)
    local_mode(experiment)


def _check_training(experiment: Experiment) -> None:
    """Refuse what the model or the mode would silently not do."""
    training, model = experiment.training, trained(experiment.model)
    local = training.local
    special = local.replay or not local.history_negatives or local.imitate or training.curriculum or training.ewc
    if experiment.privacy.mode == "local" and special:
        raise ConfigError(
            'In privacy.mode = "local" clients draw windows of their own; leave training.local.replay, imitate and '
            "history_negatives at their defaults, and training.ewc and training.curriculum out."
        )
    if experiment.privacy.mode == "local" and training.stopping is not None:
        raise ConfigError('In privacy.mode = "local" nobody pays for validation; leave [training.stopping] out.')
    made = isinstance(experiment.model, SpectralConfig | NearestConfig | BlendConfig)
    if experiment.evaluation.adapt is not None and made:
        raise ConfigError(
            f'A device cannot train a model of kind "{experiment.model.kind}" on its own; leave evaluation.adapt out.'
        )
    staged = training.base.dropout is not None or training.later.dropout is not None
    if staged and not isinstance(model, TransformerConfig | TextTransformerConfig):
        raise ConfigError(f'A model of kind "{model.kind}" has no dropout; leave it out of training.base and later.')


def _check_promotion(experiment: Experiment) -> None:
    """Refuse choices by exact metrics in a private run: what is promoted shows in every later release."""
    settings = experiment.privacy
    if isinstance(settings, NoPrivacy) or experiment.evaluation.promotion_margin is None:
        return
    if settings.metrics == "research":
        raise PrivacyError(
            "A promotion that is decided by exact metrics shows in later releases, and nobody pays for it; set "
            'privacy.metrics to "private" or leave evaluation.promotion_margin out.'
        )


def _check_statistics(experiment: Experiment, dataset: Dataset) -> None:
    training, statistics = experiment.training, experiment.training.statistics
    if isinstance(experiment.model, BlendConfig) and experiment.privacy.mode == "local":
        raise ConfigError(
            'The weight of a blend is chosen by validation, which nobody pays for in mode "local"; set model.kind to '
            '"spectral" or "transformer".'
        )
    if isinstance(experiment.model, BlendConfig) and statistics is None:
        raise ConfigError("The prior of a blend is made from statistics; add a table [training.statistics].")
    if isinstance(experiment.model, SpectralConfig) and statistics is None:
        raise ConfigError("A spectral model is made from statistics; add a table [training.statistics].")
    made = isinstance(experiment.model, SpectralConfig | NearestConfig)
    if made and (training.base.rounds or training.later.rounds):
        raise ConfigError(
            f"A {experiment.model.kind} model is not fitted; set training.base.rounds and training.later.rounds to 0."
        )
    if statistics is None:
        return
    n_items = len(dataset.catalog)
    if statistics.sketch == "pairs" and n_items > MOST_PAIRED:
        raise ConfigError(
            f"A statistic of pairs of {n_items:,} items has {n_items * (n_items + 1) // 2:,} numbers; set "
            'training.statistics.sketch = "features" and item_share = 0 for more than '
            f"{MOST_PAIRED:,} items."
        )
    if statistics.feature_share:
        make_encoder(statistics.features.encoder, statistics.features.path)


def run_experiment(
    experiment: Experiment,
    dataset: Dataset,
    link: Link,
    folder: RunFolder,
    registry: Registry,
    *,
    command: str = "",
    observe: Observer = lambda event: None,
    clock: Callable[[], float] = time.perf_counter,
    due: Callable[[TimeSlice], None] = lambda time_slice: None,
) -> dict[str, Any]:
    """Run the experiment from its checkpoint, or from the start, and return the report's document.

    Args:
        experiment: the settings.
        dataset: catalogue and cuts are taken from it; the interactions stay with the nodes.
        link: how to reach the nodes.
        folder: where checkpoint and report go.
        registry: where releases go.
        command: what the user typed, for the report.
        observe: is told what happens.
        clock: seconds, for measuring.
        due: returns when a slice may begin; a deployment waits in it.

    Raises:
        RunError: the checkpoint belongs to another experiment, or nodes fail.
        RegistryError: something cannot be written.
    """
    from fedrec.evaluation.report import write_report

    slices = cut(experiment, dataset)
    due(slices[0])
    source = source_of(experiment)
    recipe = Recipe(
        experiment, dataset.catalog.digest(), clock, local=local_mode(experiment),
        vectors=public_vectors(experiment, dataset.catalog, slices[0].n_items, source),
        carried=carried(experiment, source),
    )  # fmt: skip
    with ExitStack() as stack:
        if isinstance(experiment.privacy, UserLevelPrivacy):
            guard = _guard(experiment, folder, link, slices[0], recipe, observe)
            recipe = replace(recipe, guard=guard)
            stack.enter_context(guard.ledger)
        if isinstance(link, SignedLink):
            link.stand_for(folder.name, recipe.guard)
        if recipe.local is not None:
            warning = check_delta(recipe.local.settings.delta, dataset.log.n_users)
            if warning:
                observe(Event("note", {"text": warning}))
        path = folder.path / CHECKPOINT
        state = ServerState(folder.name, experiment.digest(), recipe.catalog_digest, len(dataset.catalog))
        if path.exists():
            header, tensors, note = load_last_good(path)
            if note:
                observe(Event("note", {"text": note}))
            state = ServerState.from_record(header, tensors)
            state = state.checked(experiment, dataset.catalog)
        else:
            save_checkpoint(path, *state.to_record())
        for done in state.releases:
            observe(Event("release", done))
        desk = Desk(registry, dataset.catalog, lambda now: save_checkpoint(path, *now.to_record()), observe, due)
        for reached, _ in run_stream(state, link, slices, recipe, desk):
            state = reached
        document = describe(state, experiment, dataset, command, recipe.guard)
    write_report(document, folder.path)
    return document


def _guard(
    experiment: Experiment, folder: RunFolder, link: Link, first: TimeSlice, recipe: Recipe, observe: Observer
) -> Guard:
    """Open the run's ledger, and plan the spending of its life."""
    settings = user_level(experiment)
    n_people = settings.population or max(1, take_census(link, first.train, recipe).n_clients)
    warning = check_delta(settings.delta, n_people)
    if warning:
        observe(Event("note", {"text": warning}))
    ledger = PrivacyLedger(folder.path / LEDGER, epsilon=settings.epsilon, delta=settings.delta)
    try:
        return guard_of(experiment, ledger, n_people)
    except PrivacyError:
        ledger.close()
        raise


def describe(
    state: ServerState, experiment: Experiment, dataset: Dataset, command: str, guard: Guard | None = None
) -> dict[str, Any]:
    """Return everything about a run as one JSON-able document; the HTML report is made from it."""
    parts = ("seconds", "bytes_down", "bytes_up")
    spent = {part: sum(r[part] + r["overhead"][part] for r in state.releases) for part in parts}
    return {
        "fedrec": __version__,
        "name": experiment.name,
        "run": state.run,
        "command": command,
        "complete": True,
        "experiment": experiment.model_dump(mode="json"),
        "experiment_digest": experiment.digest(),
        "machine": machine(experiment.runtime.threads),
        "data": {
            "name": dataset.name,
            "n_users": dataset.log.n_users,
            "n_items": len(dataset.catalog),
            "n_interactions": len(dataset.log),
            "digest": dataset.log.digest(),
            "catalog_digest": dataset.catalog.digest(),
            "cleaning": dataset.report.to_dict(),
            "terms": dataset.provenance.get("terms"),
        },
        "protocol": protocol(experiment),
        "privacy": privacy(experiment, guard),
        "offences": dict(state.offences),
        "quarantined": sorted(state.quarantined(experiment.training.quarantine_after)),
        "releases": list(state.releases),
        "rounds": list(state.rounds),
        "totals": {
            "seconds": round(spent["seconds"], 3),
            "bytes_down": spent["bytes_down"],
            "bytes_up": spent["bytes_up"],
            "epsilon": None if guard is None else guard.ledger.spent(),
            "rounds": len(state.rounds),
        },
    }


def machine(threads: int) -> dict[str, Any]:
    """Return what a reader needs to judge the timings."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": threads,
    }
    for package in ("torch", "flwr", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
