"""Bytes that a client downloads in a round of adapters: MovieLens-100K, every person alone on a node."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import Row, claim, progress, run
from benchmarks.zoo import experiment_for
from fedrec.data.sources import load_dataset
from fedrec.grid.simulate import over_grid
from fedrec.models.freeze import trainable
from fedrec.params import n_bytes
from fedrec.protocol.link import Link, Reply, Verb
from fedrec.protocol.parcels import Freight
from fedrec.protocol.plan import RoundPlan
from fedrec.server.judge import initial
from fedrec.server.round import Recipe, run_round, take_census
from fedrec.server.run import cut
from fedrec.server.start import public_vectors, source_of
from fedrec.server.state import ServerState

ROUNDS, QUICK_ROUNDS = 200, 4
SHAPES: Mapping[str, dict[str, Any]] = {"narrow": {}, "wide": {"dim": 128, "residual": 4}}
"""The two models that adapters are measured with in `benchmarks.foundation`."""
RANK = 4
LEAST_RATIO = 3.0
UNIT = "bytes / client and round"


@dataclass
class Meter:
    """A link that notes of each plan how long it is, and how long if it carried everything."""

    link: Link
    named: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)

    def nodes(self) -> list[int]:
        """Return the ids of all nodes."""
        return self.link.nodes()

    def exchange(
        self,
        verb: Verb,
        documents: Mapping[int, bytes],
        timeout_seconds: float | None,
        freight: Freight | None = None,
    ) -> Iterable[Reply]:
        """Pass everything on."""
        if verb == "run" and freight is not None:
            self.named += [len(document) for document in documents.values()]
            self.whole += [len(RoundPlan.from_bytes(one, freight.get).to_bytes()) for one in documents.values()]
        return self.link.exchange(verb, documents, timeout_seconds, freight)


def measure(quick: bool) -> list[Row]:
    """Train with adapters for some rounds, with every person alone on a node, and count what went down."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    return [row for shape in SHAPES for row in _rounds(shape, rounds, quick)]


def _rounds(shape: str, rounds: int, quick: bool) -> list[Row]:
    dataset = load_dataset("ml-100k")
    model = {**SHAPES[shape], "train": "adapters", "lora": RANK}
    runtime = {"nodes": dataset.log.n_users}
    experiment = experiment_for("ml-100k", "text_transformer", rounds, model=model, runtime=runtime)
    (time_slice,) = cut(experiment, dataset)
    vectors = public_vectors(experiment, dataset.catalog, time_slice.n_items, source_of(experiment))
    recipe = Recipe(experiment, dataset.catalog.digest(), time.perf_counter, vectors=vectors)
    params = initial(experiment.model, time_slice.n_items, recipe)
    start = ServerState("frozen/001", experiment.digest(), recipe.catalog_digest, params=params)

    def train(link: Link) -> tuple[ServerState, Meter]:
        meter, state = Meter(link), start
        roster = take_census(meter, time_slice.train, recipe)
        for _ in progress(range(rounds), shape):
            state, _ = run_round(state, meter, recipe, time_slice, roster)
        return state, meter

    state, meter = over_grid(train, experiment, dataset, None)
    asked = len(meter.named)
    down = sum(record["bytes_down"] for record in state.rounds)
    before, after = sum(meter.whole) / asked, down / asked
    trained = {name: params[name] for name in trainable(experiment.model, params)}
    first = (down - sum(meter.named)) / len({*range(dataset.log.n_users)})
    head = f"adapters, {shape}"
    ratio = before / after
    what = f"{head}: everything in the plan / named"
    return [
        Row(f"{head}: all parameters", n_bytes(params), "bytes"),
        Row(f"{head}: of them trained", n_bytes(trained), "bytes"),
        Row(f"{head}: how often a person was asked, on average", asked / dataset.log.n_users, "rounds"),
        Row(f"{head}: down, everything in the plan", before, UNIT),
        Row(f"{head}: down, frozen tensors named, first plans included", after, UNIT),
        Row(what, ratio, "x") if quick else claim(what, ratio, "x", ">=", LEAST_RATIO),
        Row(f"{head}: down, frozen tensors named, later plans alone", sum(meter.named) / asked, UNIT),
        Row(f"{head}: tensors sent beside plans, over all people", first, "bytes / person"),
    ]


if __name__ == "__main__":
    raise SystemExit(run("frozen", __doc__ or "", measure))
