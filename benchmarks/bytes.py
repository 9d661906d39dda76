"""Bytes per client and quality of each codec: MovieLens-100K, leave-one-out."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, claim, progress, run
from fedrec import params as named
from fedrec.client.app import client_app
from fedrec.client.pool import LogPool
from fedrec.config import Experiment, LocalOnlyConfig
from fedrec.data.cleaning import Dataset
from fedrec.data.slices import TimeSlice
from fedrec.data.sources import load_dataset
from fedrec.grid.in_process import InProcessGrid
from fedrec.grid.simulate import simulate
from fedrec.learning import StageConfig
from fedrec.params import Accumulator, Params
from fedrec.protocol.codec import AnyCodec, Float, Half, LowRank, Plain, Quantised, Sparse
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Expectation, Tally
from fedrec.protocol.task import FitTask
from fedrec.server.app import GridLink
from fedrec.server.judge import Contender, judge
from fedrec.server.registry import Registry
from fedrec.server.round import Recipe, round_key
from fedrec.server.run import cut

ROUNDS, QUICK_ROUNDS = 600, 60
COHORTS, QUICK_COHORTS = (32, 128), (32,)
SEEDS = (1, 2, 3)
STUDENT = 4.303
"""97.5 % quantile of Student's t with two degrees of freedom, for three seeds."""
METRIC = "ndcg@10"


@dataclass(frozen=True)
class Wire:
    """How a run's messages are written."""

    codec: AnyCodec = field(default_factory=Plain)
    download: Float = "float32"


WIRES: Mapping[str, Wire] = {
    "plain": Wire(),
    "8-bit": Wire(Quantised()),
    "bfloat16 both ways": Wire(Half(dtype="bfloat16"), "bfloat16"),
    "float16 both ways": Wire(Half(dtype="float16"), "float16"),
    "sparse": Wire(Sparse()),
    "sparse, 8-bit": Wire(Sparse(values=Quantised())),
    "low rank 16": Wire(LowRank(rank=16)),
    "low rank 16, 8-bit": Wire(LowRank(rank=16, values=Quantised())),
}
TRAINED = ("plain", "8-bit", "bfloat16 both ways", "low rank 16")
"""Whose quality is measured by whole runs, the first two with all seeds; the others stand beside the exact sum only."""


def measure(quick: bool) -> list[Row]:
    """Train with the codecs of `TRAINED`, compare people in pairs, and write single clients' updates with all."""
    experiment = _experiment(QUICK_ROUNDS if quick else ROUNDS)
    dataset = load_dataset(experiment.data.source, say=lambda note: print(note, file=sys.stderr))
    (time_slice,) = cut(experiment, dataset)
    rows: list[Row] = []
    start: Params = {}
    lost: list[float] = []
    for seed in progress(SEEDS[: 1 if quick else None], "seeds"):
        own = experiment.model_copy(update={"seed": seed})
        models: dict[str, Params] = {}
        for name in TRAINED[: None if seed == SEEDS[0] else 2]:
            document, models[name] = _train(own, dataset, WIRES[name])
            rows += _traffic(name, document) if seed == SEEDS[0] else []
        found, loss = _quality(own, dataset, time_slice, models)
        lost.append(loss)
        rows += found
        start = start or models["plain"]
    rows += [Row("seeds: plain minus 8-bit, mean", float(np.mean(lost)), "NDCG@10"), *([] if quick else _noise(lost))]
    return [*rows, *_alone(experiment, dataset, time_slice, start, QUICK_COHORTS if quick else COHORTS)]


def _noise(lost: list[float]) -> list[Row]:
    """Claim that what 8 bits lose is within the noise of seeds, and that this noise is small enough to say so.

    The interval over people of one run does not know that another draw of the rounding trains another model.
    """
    mean, half = float(np.mean(lost)), STUDENT * float(np.std(lost, ddof=1)) / len(lost) ** 0.5
    what, unit = "seeds: plain minus 8-bit, {} end of Student's interval", "NDCG@10"
    return [
        claim(what.format("low"), mean - half, unit, "<=", 0.0),
        claim(what.format("high"), mean + half, unit, ">=", 0.0),
        claim("seeds: the most that 8 bits may lose (that high end)", mean + half, unit, "<=", 0.005),
    ]


def _traffic(name: str, document: Mapping[str, Any]) -> list[Row]:
    """Return what a whole run with all clients on one node carries."""
    answers = sum(record["clients"] for record in document["rounds"])
    return [
        Row(f"{name}: whole run, one node, {way}", document["releases"][0][f"bytes_{way}"] / answers, "bytes / client")
        for way in ("down", "up")
    ]


def _experiment(rounds: int) -> Experiment:
    experiment = Experiment.find("ml100k_leave_one_out")
    stage = StageConfig(rounds=rounds, warmup=rounds // 20, final=0.01)
    evaluation = experiment.evaluation.model_copy(
        update={"local_only": LocalOnlyConfig(people=0), "sampled_negatives": None, "ks": (10,)}
    )
    training = experiment.training.model_copy(update={"base": stage})
    return experiment.model_copy(update={"training": training, "evaluation": evaluation})


def _train(experiment: Experiment, dataset: Dataset, wire: Wire) -> tuple[dict[str, Any], Params]:
    """Return the report's document and the released parameters."""
    training = experiment.training.model_copy(update={"codec": wire.codec, "download": wire.download})
    with tempfile.TemporaryDirectory() as folder:
        registry = Path(folder) / "registry"
        document, _ = simulate(
            experiment.model_copy(update={"training": training}),
            runs=Path(folder),
            registry=registry,
            dataset=dataset,
            command="python -m benchmarks.bytes",
        )
        return document, Registry(registry).load("newest").params


def _quality(
    experiment: Experiment, dataset: Dataset, time_slice: TimeSlice, models: Mapping[str, Params]
) -> tuple[list[Row], float]:
    """Evaluate all models on the same people; return rows, and how much worse than plain 8 bits are."""
    pool = LogPool(dataset.log, dataset.catalog)
    link = GridLink(InProcessGrid(client_app(lambda context: pool), [{}], {}))
    recipe = Recipe(experiment, dataset.catalog.digest(), time.perf_counter)
    counts = {"counts": np.bincount(dataset.log.item, minlength=time_slice.n_items_test).astype(np.float32)}
    contenders = {name: Contender(experiment.model, params) for name, params in models.items()}
    verdict = judge(contenders, time_slice, link, recipe, counts)
    found = {name: verdict["rows"][name]["all"]["metrics"][METRIC] for name in models}
    found |= {f"plain minus {name}": by_metric[METRIC] for name, by_metric in verdict["differences"].items()}
    ends = (("value", ""), ("low", ", low end over people"), ("high", ", high end over people"))
    rows = [
        Row(f"seed {experiment.seed}: {name}{end}", estimate[key], "NDCG@10")
        for name, estimate in found.items()
        for key, end in ends
    ]
    return rows, float(found["plain minus 8-bit"]["value"])


def _alone(
    experiment: Experiment, dataset: Dataset, time_slice: TimeSlice, params: Params, cohorts: tuple[int, ...]
) -> list[Row]:
    """Write every client's own update with every codec: its size, and how far the decoded sum is from the exact one."""
    pool = LogPool(dataset.log, dataset.catalog)
    task = FitTask(window=time_slice.train, local=experiment.training.local)
    key = round_key(experiment, 0, 0)
    draws = key.child("sample of clients").numpy()
    eligible = pool.census(task.window, dataset.catalog.digest())
    chosen = draws.permutation(eligible)[: max(cohorts)]
    digest, n_items = dataset.catalog.digest(), time_slice.n_items

    def plan(slots: Any, wire: Wire) -> RoundPlan:
        own = np.asarray(slots, np.int64)
        return RoundPlan(
            0, 0, task, experiment.model, n_items, params, key, digest, own, codec=wire.codec, download=wire.download
        )

    tallies = [pool.run(plan([slot], WIRES["plain"])) for slot in chosen]
    shapes = {name: (value.shape, value.dtype) for name, value in params.items()}
    sizes, rows = {}, []
    for name, wire in WIRES.items():
        asked = plan([0], wire)
        documents = [
            tally.to_bytes(asked.coding, f"client {slot}") for slot, tally in zip(chosen, tallies, strict=True)
        ]
        decoded = [Tally.from_bytes(document, asked.coding, shapes) for document in documents]
        for tally in decoded:
            Expectation(shapes, 1, task.local.clip_norm).check(tally)
        sizes[name] = float(np.mean([len(document) for document in documents]))
        rows.append(Row(f"{name}: a client alone on its node, down", len(asked.to_bytes()), "bytes"))
        rows.append(Row(f"{name}: a client alone on its node, up", sizes[name], "bytes"))
        ratio = sizes["plain"] / sizes[name]
        what, unit = f"{name}: upload of plain / its upload", "x"
        rows.append(claim(what, ratio, unit, ">=", 3.9) if name == "8-bit" else Row(what, ratio, unit))
        for size in cohorts:
            error = _error([t.sums for t in decoded[:size]], [t.sums for t in tallies[:size]])
            rows.append(Row(f"{name}: error of the sum of {size} clients, each coded", error, "of its norm"))
    return rows


def _error(decoded: list[Params], exact: list[Params]) -> float:
    """Return ``|sum decoded - sum exact| / |sum exact|``."""
    totals = (Accumulator(), Accumulator())
    for total, parts in zip(totals, (decoded, exact), strict=True):
        for part in parts:
            total.fold(part)
    found, wanted = (total.value() for total in totals)
    return named.norm(named.add(found, wanted, -1.0)) / named.norm(wanted)


if __name__ == "__main__":
    raise SystemExit(run("bytes", __doc__ or "", measure))
