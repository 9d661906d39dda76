"""Runs that several measurements share: made once, and kept by what decides them."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.errors import RunError
from fedrec.grid.simulate import simulate
from fedrec.models.configs import AnyModelConfig
from fedrec.server.files import write_atomically
from fedrec.server.pretrain import pretrain
from fedrec.server.registry import Registry
from fedrec.server.release import Release
from fedrec.server.run import RunFolder

SECONDS, DONE = "seconds.json", "done"


@dataclass(frozen=True)
class Made:
    """One run.

    Attributes:
        model: the model's settings.
        document: its report.
        release: the last one.
        registry: folder of its registry, to begin other runs from.
        seconds: of processor time, evaluation included.
    """

    model: AnyModelConfig
    document: dict[str, Any]
    release: Release
    registry: Path
    seconds: float

    @property
    def last(self) -> dict[str, Any]:
        """The record of the last release."""
        found: dict[str, Any] = self.document["releases"][-1]
        return found

    def value(self, row: str = "release", group: str = "all", metric: str = "ndcg@10", part: str = "value") -> float:
        """Return one figure of the last release; NaN where nobody was asked."""
        found = self.last["rows"].get(row, {}).get(group)
        return math.nan if found is None else float(found["metrics"][metric][part])


class Shelf:
    """Makes runs, and gives one again that it has already."""

    def __init__(self, folder: Path) -> None:
        """Keep the runs in `folder`: a later shelf there goes on where this one stopped."""
        self.folder = folder

    def run(self, experiment: Experiment, dataset: Dataset) -> Made:
        """Return the run of this experiment on this data."""
        root = self.folder / experiment.digest()[:16] / dataset.log.digest()[:8]
        registry = root / "r"
        newest = RunFolder.newest(root, experiment)
        if newest is None or not newest.complete:
            began = time.process_time()
            _, path = simulate(experiment, runs=root, registry=registry, dataset=dataset, resume=newest is not None)
            (path / SECONDS).write_text(json.dumps(time.process_time() - began))
            newest = RunFolder.newest(root, experiment)
        if newest is None:
            raise RunError(f"The run of '{experiment.name}' left no folder.")
        document = json.loads((newest.path / "report.json").read_text("utf-8"))
        seconds = float(json.loads((newest.path / SECONDS).read_text()))
        return Made(experiment.model, document, Registry(registry).load(), registry, seconds)

    def figures(self, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return figures that are made once; the name says all that decides them."""
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({"name": name, "figures": make()}).encode())
        found: dict[str, float] = json.loads(path.read_text("utf-8"))["figures"]
        return found

    def public(self, experiment: Experiment, dataset: Dataset) -> Path:
        """Return the registry of a model that is pre-trained on this data as public data."""
        registry = self.folder / experiment.digest()[:16] / dataset.log.digest()[:8] / "public"
        if not (registry / DONE).exists():
            pretrain(experiment, dataset, Registry(registry))
            (registry / DONE).touch()
        return registry


@contextmanager
def shelf(folder: Path | None) -> Iterator[Shelf]:
    """Give a shelf in `folder`, or one that is gone afterwards."""
    if folder is not None:
        yield Shelf(folder)
        return
    with tempfile.TemporaryDirectory() as name:
        yield Shelf(Path(name))
