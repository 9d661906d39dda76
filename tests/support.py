"""Small data sets, small experiments and ways to run them, shared by the tests of the server side and the journeys."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedrec.client.pool import LogPool
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset, RawRows, clean
from fedrec.grid.simulate import simulate
from fedrec.params import Params
from fedrec.protocol.link import Reply, Verb
from fedrec.protocol.parcels import Freight
from fedrec.protocol.plan import CensusRequest, RoundPlan
from fedrec.random import Key
from fedrec.server.registry import Registry
from fedrec.server.work import Observer

START = 1_600_000_000
FEDREC = Path(sys.executable).parent / "fedrec"


def small_rows(n_users: int = 30, n_items: int = 60, n: int = 900, seed: int = 0) -> list[tuple[str, str, int]]:
    """Return ``(user, item, time)``: two tastes, people who join over time, items that join until the end."""
    random = Key.from_seed(seed).child("small rows").numpy()
    found = []
    for place in range(n):
        there = 20 + (n_items - 20) * place // n
        people = 8 + (n_users - 8) * place // n
        user = int(random.integers(people))
        item = 2 * int(random.integers(there // 2)) + user % 2
        found.append((f"u{user}", f"i{item}", START + 3600 * place))
    return found


def dataset_of(rows: Sequence[tuple[str, str, int]], time_unit: str = "seconds") -> Dataset:
    """Return rows as a data set whose titles differ from its ids."""
    users, items, times = (np.asarray(column) for column in zip(*rows, strict=True))
    cleaned, report = clean(RawRows(users, items, times.astype(np.float64)), now=None)
    return Dataset.build(
        cleaned,
        {item: f"Title of {item}" for item in sorted(set(items.tolist()))},
        {},
        name="small",
        report=report,
        provenance={"source": "test", "sha256": "", "terms": "none", "time_unit": time_unit},
    )


def write_csv(path: Path, rows: Iterable[tuple[str, str, int]]) -> Path:
    """Write rows as a CSV that `fedrec data import` reads."""
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(("user", "item", "time"))
        writer.writerows(rows)
    return path


def merged(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with `changes` laid over it, table by table; a change of ``kind`` replaces its table."""
    found = dict(document)
    for key, value in changes.items():
        old = found.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and value.get("kind") in (None, old.get("kind")):
            value = merged(old, value)
        found[key] = value
    return found


SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "split": {"kind": "stream", "base": 0.5, "later": 2, "holdout": 0.15},
    "model": {
        "kind": "transformer", "dim": 8, "blocks": 1, "heads": 2, "expand": 1, "length": 8, "dropout": 0.1,
        "softmax": {"kind": "sampled", "negatives": 8},
    },
    "training": {
        "cohort": {"kind": "poisson", "expected": 8.0},
        "server": {"kind": "adam", "learning_rate": 0.01},
        "average": 0.8,
        "base": {"rounds": 6, "warmup": 2, "final": 0.1},
        "later": {"rounds": 3, "warmup": 1, "final": 0.1},
    },
    "evaluation": {"probes": 2, "ks": [5, 10], "replicates": 20, "local_only": {"people": 5}},
    "runtime": {"checkpoint_every": 2},
}  # fmt: skip


def _sections(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"a__b": 1}`` as ``{"a": {"b": 1}}``."""
    found: dict[str, Any] = {}
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        place = found
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return found


def small_document(**changes: Any) -> dict[str, Any]:
    """Return the small experiment as a document; ``training__average=0.0`` changes ``training.average``."""
    return merged(deepcopy(SMALL), _sections(changes))


def small_experiment(**changes: Any) -> Experiment:
    """Return the small experiment, changed as `small_document` does."""
    return Experiment.parse(small_document(**changes))


def to_toml(document: Mapping[str, Any]) -> str:
    """Return a document as TOML."""
    from fedrec.evaluation.report import toml

    return toml(dict(document))


Tamper = Callable[[Verb, Reply], Sequence[Reply]]


class PoolLink:
    """A `Link` to real pools in this process, which a test can let lie, fall silent or answer out of turn."""

    def __init__(
        self,
        dataset: Dataset,
        n_nodes: int,
        tamper: Mapping[int, Tamper] | None = None,
        order: Callable[[list[Reply]], Iterable[Reply]] = lambda replies: replies,
    ) -> None:
        """Number the nodes from 100; `tamper` turns a node's honest reply into what arrives, in `order`."""
        self.pools = {
            100 + place: LogPool.partition(dataset.log, dataset.catalog, place, n_nodes) for place in range(n_nodes)
        }
        self.tamper = dict(tamper or {})
        self.order = order
        self.plans: list[RoundPlan] = []

    def nodes(self) -> list[int]:
        """Return the ids of all nodes."""
        return sorted(self.pools)

    def exchange(
        self,
        verb: Verb,
        documents: Mapping[int, bytes],
        timeout_seconds: float | None,
        freight: Freight | None = None,
    ) -> Iterable[Reply]:
        """Let each node answer, and yield what the test makes of it."""
        found: list[Reply] = []
        for node, document in documents.items():
            honest = Reply(node, self._answer(verb, self.pools[node], document, freight or Freight()))
            found += self.tamper.get(node, lambda verb, reply: [reply])(verb, honest)
        yield from self.order(found)

    def _answer(self, verb: Verb, pool: LogPool, document: bytes, freight: Freight) -> bytes:
        if verb == "census":
            from fedrec.protocol.plan import Census

            request = CensusRequest.from_bytes(document)
            n_clients = pool.census(request.window, request.catalog_digest)
            return Census(node=pool.name, n_clients=n_clients, ticket=request.ticket).to_bytes()
        self.plans.append(RoundPlan.from_bytes(document, freight.get))
        plan = self.plans[-1]
        return replace(pool.run(plan), ticket=plan.ticket).to_bytes(plan.coding)


def simulated(
    experiment: Experiment, dataset: Dataset, root: Path, observe: Observer = lambda event: None
) -> tuple[dict[str, Any], Registry]:
    """Run an experiment below `root` and return the report's document and the registry."""
    document, _ = simulate(experiment, runs=root / "runs", registry=root / "registry", dataset=dataset, observe=observe)
    return document, Registry(root / "registry")


def same_bytes(a: Params, b: Params) -> bool:
    """Return whether two sets of named tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def release_files(registry: Path) -> dict[str, bytes]:
    """Return every published file of a registry by its path."""
    return {
        str(path.relative_to(registry)): path.read_bytes()
        for folder in ("releases", "catalogs")
        for path in sorted((registry / folder).rglob("*"))
        if path.is_file()
    }


def without_clock(value: Any) -> Any:
    """Return a report's document without what time, the machine and the command line put into it."""
    if isinstance(value, Mapping):
        skipped = ("seconds", "judge_seconds", "command", "machine")
        return {key: without_clock(inner) for key, inner in value.items() if key not in skipped}
    return [without_clock(inner) for inner in value] if isinstance(value, list | tuple) else value


def environment(root: Path) -> dict[str, str]:
    """Return an environment in which fedrec keeps everything below `root`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FEDREC_", "FLWR_"))}
    return {**kept, "FEDREC_CACHE": str(root / "cache"), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def fedrec(*arguments: object, root: Path) -> subprocess.CompletedProcess[str]:
    """Run the installed `fedrec` in the folder `root`."""
    return subprocess.run(
        [str(FEDREC), *(str(argument) for argument in arguments)],
        cwd=root, env=environment(root), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def small_project(root: Path, rows: Sequence[tuple[str, str, int]] | None = None, **changes: Any) -> Path:
    """Import the small data set below `root`, write ``small.toml`` there and return its path."""
    table = write_csv(root / "rows.csv", small_rows() if rows is None else rows)
    columns = ("--user", "user", "--item", "item", "--time", "time")
    made = fedrec("data", "import", table, *columns, "--out", root / "data", "--name", "small", root=root)
    assert made.returncode == 0, made.stderr
    path = root / "small.toml"
    path.write_text(to_toml(small_document(data__source=str(root / "data"), **changes)), encoding="utf-8")
    return path
