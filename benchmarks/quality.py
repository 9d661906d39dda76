"""The leak-free table of all models, the best of MovieLens-1M, adapters, newcomers, and transfer by text."""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import foundation
from benchmarks.asking import interval, over_seeds
from benchmarks.blending import CENTRAL, REACHED, best, longest
from benchmarks.foundation import UNIT, Measure, Setting
from benchmarks.harness import Row, run
from benchmarks.kept import Made, shelf
from benchmarks.peers.ease import ease, item_weights
from benchmarks.peers.graph import gpfedrec
from benchmarks.peers.people import Found, PersonalSettings
from benchmarks.peers.personal import pfedrec
from benchmarks.transfer import transfer
from benchmarks.zoo import MADE, MODELS, TEXTLESS, experiment_for
from fedrec.data.cleaning import Dataset
from fedrec.data.sources import load_dataset
from fedrec.learning import PoissonCohort

SOURCES = ("ml-100k", "ml-1m", "amazon-video", "amazon-beauty", "movietweetings-100k")
LOCAL_ONLY = 200
"""People of the local-only row."""
LARGER = {"amazon-video": 256.0}
"""People in a round of a second row of the transformer, by the validation item: docs/models.md has what was tried."""
LAMBDAS = (20, 100, 500, 1000)
"""Of EASE."""
GRAPH_MOST = 2_000
"""People up to which GPFedRec compares everybody's table with everybody else's in each round."""
Peer = Callable[[Dataset, PersonalSettings, int], Found]


def parts() -> dict[str, Measure]:
    """Return every part of the benchmark by name, ``part/data set`` or ``table/data set/row``."""
    found: dict[str, Measure] = {}
    for source in SOURCES:
        for kind in MODELS:
            if kind in ("nearest", "text_transformer") and source in TEXTLESS:
                continue
            found[f"table/{source}/{kind}"] = partial(_federated, source, kind)
        if source in LARGER:
            found[f"table/{source}/larger_cohorts"] = partial(_larger, source)
        found[f"table/{source}/ease"] = partial(_ease, source)
        for kind in ("pfedrec", "gpfedrec"):
            found[f"table/{source}/{kind}"] = partial(_personal, source, kind)
    found["best/ml-1m"] = best
    for source, elsewhere in (("ml-100k", "ml-1m"), ("ml-1m", "ml-100k")):
        found[f"adapters/{source}"] = partial(foundation.adapters, source, elsewhere)
    found["newcomers/ml-1m"] = partial(foundation.newcomers, "ml-1m")
    found["transfer/movietweetings-100k"] = partial(transfer, "movietweetings-100k", "ml-1m")
    return found


def _federated(source: str, kind: str, setting: Setting) -> list[Row]:
    dataset = load_dataset(source)
    alone = LOCAL_ONLY if kind == "transformer" else 0
    seeds = (1,) if kind in MADE else setting.seeds
    if source == "ml-1m" and kind == "transformer":
        wanted = [longest(setting.quick)]  # half an hour, so one seed; the same run as in the part "best"
    else:
        rounds = setting.rounds(source)
        wanted = [experiment_for(source, kind, rounds, seed=seed, local_only=alone) for seed in seeds]
    made = [setting.shelf.run(one, dataset) for one in wanted]
    head = f"{source}: {kind}"
    rows = _figures(head, made)
    if kind == "transformer":
        rows += [Row(f"{source}: popularity", made[0].value("popularity"), UNIT)]
        rows += [Row(f"{source}: popularity, HR@10", made[0].value("popularity", metric="hr@10"), "HR@10")]
        rows += over_seeds(f"{source}: local-only", [one.value("local_only") for one in made], UNIT)
        if source == "ml-1m":
            for words, bound in (("the claim", REACHED), ("gSASRec, central", CENTRAL)):
                rows.append(setting.judge(f"{head}, against {words}", made[0].value(), UNIT, ">=", bound))
    return rows


def _larger(source: str, setting: Setting) -> list[Row]:
    """Return rows of the transformer with as many people in a round as validation says."""
    dataset, expected = load_dataset(source), LARGER[source]
    made = []
    for seed in setting.seeds:
        plain = experiment_for(source, "transformer", setting.rounds(source), seed=seed)
        more = plain.training.model_copy(update={"cohort": PoissonCohort(expected=expected)})
        made.append(setting.shelf.run(plain.model_copy(update={"training": more}), dataset))
    return _figures(f"{source}: transformer, {expected:g} people in a round", made)


def _figures(head: str, made: list[Made]) -> list[Row]:
    last = made[0].last
    sent = (last["bytes_up"] + last["overhead"]["bytes_up"]) / 1e6
    return [
        *over_seeds(head, [one.value() for one in made], UNIT),
        Row(f"{head}, 95 % interval over people, low (seed 1)", made[0].value(part="low"), UNIT),
        Row(f"{head}, 95 % interval over people, high (seed 1)", made[0].value(part="high"), UNIT),
        *over_seeds(f"{head}, HR@10", [one.value(metric="hr@10") for one in made], "HR@10"),
        Row(f"{head}, processor time", float(np.mean([one.seconds for one in made])), "s"),
        Row(f"{head}, uploaded by all", sent, "MB"),
    ]


def _ease(source: str, setting: Setting) -> list[Row]:
    dataset = load_dataset(source)
    lambdas = LAMBDAS[-1:] if setting.quick else LAMBDAS
    found = setting.shelf.figures(f"{source}-ease-{lambdas}", partial(_best_ease, dataset, lambdas))
    head = f"{source}: EASE, centralised"
    return [
        Row(head, found["value"], UNIT),
        *_spread(head, found),
        Row(f"{head}, HR@10", found["hits"], "HR@10"),
        Row(f"{head}, lambda, chosen on validation among {', '.join(map(str, lambdas))}", found["lambda"], ""),
        Row(f"{head}, processor time of one lambda", found["seconds"] / len(lambdas), "s"),
    ]


def _best_ease(dataset: Dataset, lambdas: tuple[int, ...]) -> dict[str, float]:
    """Return the figures of the lambda that is best on the interaction before the last."""
    began, chosen, best = time.process_time(), -1.0, {}
    for one in lambdas:
        weights = item_weights(dataset, one)
        before = float(ease(dataset, weights, skip=1).mean())
        if before > chosen:
            chosen, best = before, {**_people(ease(dataset, weights)), "lambda": float(one)}
    return {**best, "chosen": chosen, "seconds": time.process_time() - began}


def _people(gains: NDArray[np.float64]) -> dict[str, float]:
    """Return the mean NDCG@10 over people, its interval, and the mean hit rate."""
    low, high = interval(gains)
    return {"value": float(gains.mean()), "low": low, "high": high, "hits": float((gains > 0).mean())}


def _spread(head: str, found: dict[str, float], which: str = "") -> list[Row]:
    return [Row(f"{head}, 95 % interval over people, {end}{which}", found[end], UNIT) for end in ("low", "high")]


def _personal(source: str, kind: str, setting: Setting) -> list[Row]:
    dataset = load_dataset(source)
    n_people, n_items = dataset.log.n_users, len(dataset.catalog)
    c = PersonalSettings(rounds=5 if setting.quick else PersonalSettings.rounds)
    if kind == "gpfedrec" and n_people > GRAPH_MOST:
        size, work = n_people * n_items * c.dim, 4 * n_people**2 * n_items * c.dim
        print(
            f"{source}: {kind} is left out: the tables of {n_people:,} people take {4 * size / 1e9:.0f} GB, and to "
            f"compare and mix them takes {work / 1e12:.0f} trillion operations in each of {c.rounds} rounds",
            file=sys.stderr,
        )
        return []
    peer = gpfedrec if kind == "gpfedrec" else pfedrec
    found = [
        setting.shelf.figures(f"{source}-{kind}-{seed}-{c}", partial(_seed_of, peer, dataset, c, seed))
        for seed in setting.seeds
    ]
    head = f"{source}: {'GPFedRec' if kind == 'gpfedrec' else 'PFedRec'}, without the leak"
    sent = 4 * c.dim * n_items * int((dataset.log.counts > 2).sum()) * c.rounds / 1e6
    return [
        *over_seeds(head, [one["value"] for one in found], UNIT),
        *_spread(head, found[0], " (seed 1)"),
        *over_seeds(f"{head}, HR@10", [one["hits"] for one in found], "HR@10"),
        Row(f"{head}, round, chosen on validation (seed 1)", found[0]["round"], ""),
        Row(f"{head}, processor time", float(np.mean([one["seconds"] for one in found])), "s"),
        Row(f"{head}, uploaded by all, whole tables", sent, "MB"),
    ]


def _seed_of(peer: Peer, dataset: Dataset, c: PersonalSettings, seed: int) -> dict[str, float]:
    began = time.process_time()
    found = peer(dataset, c, seed)
    return {**_people(found.gains), "round": float(found.round), "seconds": time.process_time() - began}


def _chosen(part: list[str], only: list[str]) -> Iterator[tuple[str, Measure]]:
    for name, measure in parts().items():
        kind, rest = name.split("/", 1)
        wanted = not only or any(fnmatch.fnmatch(rest, p) or fnmatch.fnmatch(rest, f"{p}/*") for p in only)
        if (not part or kind in part) and wanted:
            yield name, measure


def main() -> int:
    """Take what chooses parts, and leave the rest to the harness."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--part", action="append", default=[], choices=sorted({name.split("/")[0] for name in parts()}))
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--list", action="store_true")
    known, rest = parser.parse_known_args()
    if known.list:
        print("\n".join(parts()))
        return 0
    torch.set_num_threads(1)

    def measure(quick: bool) -> list[Row]:
        rows: list[Row] = []
        with shelf(known.keep) as runs:
            setting = Setting(runs, tuple(range(1, known.seeds + 1)), quick)
            for name, part in _chosen(known.part, known.only):
                print(f"{name} ...", file=sys.stderr, flush=True)
                rows += part(setting)
        return rows

    what = (
        f"{__doc__ or ''} --list names the parts; --part and --only PATTERN (both repeatable: 'ml-100k', 'ml-1m/gru') "
        "choose some; --seeds N trains each N times; --keep FOLDER keeps runs, so that a stopped measurement goes on."
    )
    return run("quality", what, measure, rest, typed=_typed(known, rest))


def _typed(known: argparse.Namespace, rest: list[str]) -> list[str]:
    """Return the arguments for the record, without folders of this machine."""
    chosen = [text for part in known.part for text in ("--part", part)]
    chosen += [text for only in known.only for text in ("--only", only)]
    quick = [word for word in rest if word == "--quick"]
    return [*chosen, *(["--seeds", str(known.seeds)] if known.seeds > 1 else []), *quick]


if __name__ == "__main__":
    raise SystemExit(main())
