"""Lives for the lifelong benchmark: three data sets in blocks, experiments over them, and forks of a shared base."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedrec.config import Experiment
from fedrec.data.blocks import TEST, TRAIN, VALIDATION, in_blocks, lay_out
from fedrec.data.cleaning import Dataset, RawRows
from fedrec.data.sources import load_dataset
from fedrec.errors import DataError
from fedrec.evaluation.continual import Life, matrix, measure
from fedrec.grid.simulate import simulate
from fedrec.server.files import load_checkpoint, save_checkpoint, write_atomically
from fedrec.server.run import CHECKPOINT
from fedrec.server.state import ServerState
from fedrec.server.work import Event

METRIC = "ndcg@20"
PARTS = {"train": TRAIN, "valid": VALIDATION, "test": TEST}
Hold = Literal["test", "validation"]
DATASETS = ("f3crec", "movietweetings", "amazon-video")


@lru_cache(maxsize=4)
def blocks_of(name: str, hold: Hold = "test") -> Dataset:
    """Return a data set in four blocks.

    MovieTweetings keeps people with 10 ratings and items with 5 at least, Amazon-Video is its 5-core; both are as
    ``fedrec data blocks NAME --min-user 10 --min-item 5`` (or 5 and 5) lays them out.
    """
    if name == "f3crec":
        return f3crec_blocks(Path(os.environ.get("FEDREC_DATA", "data")) / "f3crec-ml-100k", hold)
    source, least = {"movietweetings": ("movietweetings-100k", 10), "amazon-video": ("amazon-video", 5)}[name]
    return in_blocks(load_dataset(source), hold=hold, min_user=least, min_item=5)


def f3crec_blocks(folder: Path, hold: Hold) -> Dataset:
    """Return the published blocks of ML-100K as a data set.

    They are read from ``TASK_0.json`` to ``TASK_3.json``: ``{"train": {user: [items]}, "valid": ..., "test": ...}``.

    Raises:
        DataError: the files are not there.
    """
    users: list[str] = []
    items: list[str] = []
    block: list[int] = []
    part: list[int] = []
    for number in range(4):
        path = folder / f"TASK_{number}.json"
        if not path.is_file():
            raise DataError(f"'{path}' is missing; set FEDREC_DATA to a folder that holds f3crec-ml-100k.")
        parts = json.loads(path.read_text("utf-8"))
        for name, code in PARTS.items():
            for user, taken in parts[name].items():
                users += [user] * len(taken)
                items += map(str, taken)
                block += [number] * len(taken)
                part += [code] * len(taken)
    rows = RawRows(np.asarray(users, object), np.asarray(items, object), np.zeros(len(users)))
    return lay_out(rows, np.asarray(block), np.asarray(part), name="f3crec-ml-100k", hold=hold)


@dataclass(frozen=True)
class Lived:
    """What came of one life.

    Attributes:
        document: the report's document.
        seconds: of processor time, for counting and training in each slice, without evaluation.
    """

    document: dict[str, Any]
    seconds: tuple[float, ...]

    @property
    def releases(self) -> list[dict[str, Any]]:
        """The records of all releases."""
        found: list[dict[str, Any]] = self.document["releases"]
        return found

    @property
    def matrix(self) -> NDArray[np.float64]:
        """NDCG@20 of each release on the test of each block."""
        return matrix(self.releases, METRIC)

    @property
    def life(self) -> Life:
        """Learning, retained, forgetting."""
        return measure(self.matrix)


@dataclass(frozen=True)
class Kept:
    """A folder that keeps lives by what they compute, so that a benchmark that was stopped goes on.

    Attributes:
        folder: where; None keeps nothing.
    """

    folder: Path | None

    def _path(self, experiment: Experiment, dataset: Dataset) -> Path | None:
        name = f"{experiment.digest()[:24]}-{dataset.log.digest()[:12]}.json"
        return None if self.folder is None else self.folder / name

    def find(self, experiment: Experiment, dataset: Dataset) -> Lived | None:
        """Return a life that was lived before."""
        path = self._path(experiment, dataset)
        if path is None or not path.is_file():
            return None
        found = json.loads(path.read_text("utf-8"))
        return Lived(found["document"], tuple(found["seconds"]))

    def put(self, experiment: Experiment, dataset: Dataset, one: Lived) -> Lived:
        """Keep a life, and return it."""
        path = self._path(experiment, dataset)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            document = {"document": {**one.document, "rounds": []}, "seconds": one.seconds}
            write_atomically(path, json.dumps(document).encode())
        return one

    def live(self, experiment: Experiment, dataset: Dataset) -> Lived:
        """Run a life, or return it if it was lived before."""
        return self.find(experiment, dataset) or self.put(experiment, dataset, live(experiment, dataset))


@dataclass
class _Watch:
    """Times what is learnt, and keeps a copy of the run as it stands after the first release."""

    keep: Path | None
    root: Path
    seconds: list[float]
    began: float = 0.0

    def __call__(self, event: Event) -> None:
        now = time.process_time()
        if event.kind == "slice":
            self.began = now
        elif event.kind == "evaluate":
            self.seconds.append(now - self.began)
        elif event.kind == "release" and self.keep is not None and not self.keep.exists():
            shutil.copytree(self.root, self.keep)


def live(experiment: Experiment, dataset: Dataset, keep: Path | None = None) -> Lived:
    """Run a life from birth; `keep` gets a copy of the run as it stands after the first release."""
    with tempfile.TemporaryDirectory() as folder:
        watch = _Watch(keep, Path(folder), [])
        document, _ = simulate(
            experiment, runs=Path(folder), registry=Path(folder) / "registry", dataset=dataset, observe=watch
        )
    return Lived(document, tuple(watch.seconds))


@contextmanager
def shared_base(experiment: Experiment, dataset: Dataset) -> Iterator[tuple[Lived, Path]]:
    """Live the life whose first slice others share; give it and the place that `forked` takes them on from."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept"
        yield live(experiment, dataset, kept), kept


def forked(experiment: Experiment, dataset: Dataset, base: Lived, kept: Path) -> Lived:
    """Run a life that differs from a base only after the first release: it goes on from there, to the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        shutil.copytree(kept, root)
        path = next(root.glob(f"*/*/{CHECKPOINT}"))
        state = ServerState.from_record(*load_checkpoint(path))
        state = state.advanced(experiment_digest=experiment.digest())
        save_checkpoint(path, *state.to_record())
        watch = _Watch(None, root, [])
        document, _ = simulate(
            experiment, runs=root, registry=root / "registry", dataset=dataset, observe=watch, resume=True
        )
    return Lived(document, (base.seconds[0], *watch.seconds))


def laid_over(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with `changes` over it, table by table; a change of ``kind`` replaces its table."""
    found = dict(document)
    for key, value in changes.items():
        old = found.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and value.get("kind") in (None, old.get("kind")):
            value = laid_over(old, value)
        found[key] = value
    return found


def experiment_of(document: Mapping[str, Any], seed: int, changes: Mapping[str, Any] | None = None) -> Experiment:
    """Return the experiment of one life over blocks."""
    common: dict[str, Any] = {
        "name": "lifelong", "seed": seed, "data": {"source": "blocks"}, "split": {"kind": "blocks", "later": 3},
        "evaluation": {"ks": [20], "replicates": 0, "local_only": {"people": 0}},
        "runtime": {"checkpoint_every": 1000},
    }  # fmt: skip
    return Experiment.parse(laid_over(laid_over(common, document), changes or {}))
