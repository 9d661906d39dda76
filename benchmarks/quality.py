"""The leak-free table of all models, adapters against full fine-tuning, newcomers, and transfer by text."""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Row, claim, run, unclaimed
from benchmarks.leave_one_out import ease
from benchmarks.peers.personal import PersonalSettings, personal
from benchmarks.zoo import MODELS, TEXTLESS, experiment_for, quality_of
from fedrec.config import Experiment
from fedrec.data.batches import histories_of
from fedrec.data.cleaning import Dataset
from fedrec.data.sources import load_dataset
from fedrec.grid.simulate import simulate
from fedrec.models.build import restore
from fedrec.models.freeze import trainable
from fedrec.models.recommender import score_all
from fedrec.params import n_values
from fedrec.server.registry import Registry
from fedrec.server.release import Release

SOURCES = ("ml-100k", "ml-1m", "amazon-video", "amazon-beauty", "movietweetings-100k")
ROUNDS = {"ml-100k": 1500, "ml-1m": 1500, "amazon-video": 1000, "amazon-beauty": 1000, "movietweetings-100k": 600}
UNIT = "NDCG@10"
EASE_MOST = 4_000
"""Items up to which EASE is inverted here."""
NEW_PEOPLE = (1, 3, 5, 10)

Sections = dict[str, Callable[[bool], list[Row]]]


def sections() -> Sections:
    """Return every part of the benchmark by name; `--only` takes patterns of these names."""
    found: Sections = {}
    for source in SOURCES:
        for kind in MODELS:
            if kind in ("nearest", "text_transformer") and source in TEXTLESS:
                continue
            found[f"table/{source}/{kind}"] = partial(_federated, source, kind)
        found[f"table/{source}/ease"] = partial(_ease, source)
        for kind in ("pfedrec", "gpfedrec"):
            found[f"table/{source}/{kind}"] = partial(_personal, source, kind)
    for source in ("ml-100k", "ml-1m"):
        found[f"adapters/{source}"] = partial(_adapters, source, "movietweetings-100k")
        found[f"newcomers/people/{source}"] = partial(_new_people, source)
    found["newcomers/items/ml-100k"] = partial(_new_items, "ml-100k")
    found["transfer/movietweetings-100k"] = partial(_transfer, "movietweetings-100k", "ml-1m")
    return found


def _rounds(source: str, quick: bool) -> int:
    return 60 if quick else ROUNDS[source]


def _run(experiment: Experiment, dataset: Dataset, folder: Path) -> tuple[dict[str, Any], Release, float]:
    began = time.perf_counter()
    document, _ = simulate(experiment, runs=folder, registry=folder / "r", dataset=dataset)
    return document, Registry(folder / "r").load(), time.perf_counter() - began


def _value(document: dict[str, Any], row: str = "release", group: str = "all", metric: str = "ndcg@10") -> float:
    found = document["releases"][-1]["rows"].get(row, {}).get(group)
    return float("nan") if found is None else float(found["metrics"][metric]["value"])


def _federated(source: str, kind: str, quick: bool) -> list[Row]:
    dataset = load_dataset(source)
    alone = 200 if kind == "transformer" else 0
    with tempfile.TemporaryDirectory() as folder:
        experiment = experiment_for(source, kind, _rounds(source, quick), local_only=alone)
        document, _, seconds = _run(experiment, dataset, Path(folder))
    head, last = f"{source}: {kind}", document["releases"][-1]
    estimate = last["rows"]["release"]["all"]["metrics"]["ndcg@10"]
    rows = [
        Row(head, _value(document), UNIT),
        Row(f"{head}, 95 % interval low", estimate["low"], UNIT),
        Row(f"{head}, 95 % interval high", estimate["high"], UNIT),
        Row(f"{head}, HR@10", _value(document, metric="hr@10"), "HR@10"),
        Row(f"{head}, seconds", seconds, "s"),
        Row(f"{head}, uploaded in all", (last["bytes_up"] + last["overhead"]["bytes_up"]) / 1e6, "MB"),
    ]
    if kind == "transformer":
        rows.append(Row(f"{source}: popularity", _value(document, "popularity"), UNIT))
        rows.append(Row(f"{source}: local-only", _value(document, "local_only"), UNIT))
        if source == "ml-1m":
            rows.append(
                (unclaimed if quick else claim)(f"{head}, against the claim", _value(document), UNIT, ">=", 0.160)
            )
    return rows


def _ease(source: str, quick: bool) -> list[Row]:
    dataset = load_dataset(source)
    if len(dataset.catalog) > EASE_MOST:
        print(f"{source}: EASE of {len(dataset.catalog):,} items is left out", file=sys.stderr)
        return []
    return [Row(f"{source}: EASE, centralised, lambda 500", ease(dataset, 500.0), UNIT)]


def _personal(source: str, kind: str, quick: bool) -> list[Row]:
    dataset = load_dataset(source)
    if len(dataset.catalog) > EASE_MOST:
        return []
    began = time.perf_counter()
    settings = PersonalSettings(rounds=5 if quick else 100, graph=kind == "gpfedrec")
    ndcg, hits = personal(dataset, settings)
    name = f"{source}: {'GPFedRec' if settings.graph else 'PFedRec'}, without the leak"
    return [
        Row(name, ndcg, UNIT),
        Row(f"{name}, HR@10", hits, "HR@10"),
        Row(f"{name}, seconds", time.perf_counter() - began, "s"),
    ]


def _adapters(source: str, elsewhere: str, quick: bool) -> list[Row]:
    """Begin with weights of another domain, then train everything, or adapters alone."""
    dataset = load_dataset(source)
    rounds = _rounds(source, quick)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run(experiment_for(elsewhere, "text_transformer", _rounds(elsewhere, quick)), load_dataset(elsewhere), folder)
        start = {"registry": str(folder / "r")}
        found = {}
        for train, model in (
            ("all", {"train": "all"}),
            ("adapters", {"train": "adapters", "lora": 4, "residual": 32}),
        ):
            experiment = experiment_for(source, "text_transformer", rounds, model=model, start=start)
            document, release, _ = _run(experiment, dataset, folder / train)
            sent = n_values({n: release.params[n] for n in trainable(experiment.model, release.params)})
            found[train] = _value(document)
            rows.append(Row(f"{source}: begun on {elsewhere}, train = {train}", found[train], UNIT))
            rows.append(
                Row(f"{source}: train = {train}, share of parameters sent", sent / n_values(release.params), "")
            )
            rest = {n: v for n, v in release.params.items() if n != "text"}
            rows.append(Row(f"{source}: train = {train}, the same without the text table", sent / n_values(rest), ""))
    judge = unclaimed if quick else claim
    rows.append(judge(f"{source}: adapters against all", found["adapters"] / found["all"], "ratio", ">=", 0.95))
    return rows


def _new_items(source: str, quick: bool) -> list[Row]:
    """Ask, after a cut in time, for items that joined only then."""
    dataset = load_dataset(source)
    rows: list[Row] = []
    split = {"kind": "stream", "base": 0.7, "later": 0, "holdout": 0.3}
    for kind in ("text_transformer", "transformer", "nearest"):
        with tempfile.TemporaryDirectory() as folder:
            document, _, _ = _run(
                experiment_for(source, kind, _rounds(source, quick), split=split), dataset, Path(folder)
            )
        rows.append(
            Row(f"{source}: {kind}, items that joined after training", _value(document, group="new_items"), UNIT)
        )
        if kind == "nearest":
            popular = _value(document, "popularity", "new_items")
            rows.append(Row(f"{source}: popularity, items that joined after training", popular, UNIT))
    return rows


def _new_people(source: str, quick: bool) -> list[Row]:
    """Train without a tenth of the people, then ask for their next item after 1, 3, 5 and 10 interactions."""
    dataset = load_dataset(source)
    order = np.random.Generator(np.random.Philox(7)).permutation(dataset.log.n_users)
    away, stay = np.sort(order[: len(order) // 10]), np.sort(order[len(order) // 10 :])
    seen = replace(dataset, log=dataset.log.take_users(stay))
    asked = [dataset.log.history(int(user)).tolist() for user in away]
    asked = [history for history in asked if len(history) > max(NEW_PEOPLE)]
    counts = np.bincount(seen.log.item, minlength=len(dataset.catalog)).astype(np.float32)
    rows: list[Row] = []
    for kind in ("text_transformer", "transformer", "spectral"):
        with tempfile.TemporaryDirectory() as folder:
            experiment = experiment_for(source, kind, _rounds(source, quick))
            _, release, _ = _run(experiment, seen, Path(folder))
        model = restore(experiment.model, release.manifest.n_items, release.params)
        for n in NEW_PEOPLE:
            scores = score_all(model, histories_of([history[:n] for history in asked], model.spec))
            value = _asked(scores, asked, n)
            popular = _asked(np.tile(counts, (len(asked), 1)), asked, n)
            judge = unclaimed if quick else claim
            rows.append(judge(f"{source}: {kind}, new people after {n}", value, UNIT, ">=", round(popular, 4)))
            if kind == "spectral":
                rows.append(Row(f"{source}: popularity, new people after {n}", popular, UNIT))
    return rows


def _asked(scores: Any, asked: list[list[int]], n: int) -> float:
    ranked = np.array(scores, np.float32)
    for row, history in enumerate(asked):
        ranked[row, history[:n]] = -np.inf
    best = np.argsort(-ranked, axis=1, kind="stable")[:, :10].tolist()
    return quality_of(best, [history[n] for history in asked])


def _transfer(source: str, elsewhere: str, quick: bool) -> list[Row]:
    """Pre-train on another data set by text alone, and go on here with no round, or with as many as from scratch."""
    dataset = load_dataset(source)
    few = 20 if quick else 100
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run(experiment_for(elsewhere, "text_transformer", _rounds(elsewhere, quick)), load_dataset(elsewhere), folder)
        start = {"registry": str(folder / "r")}
        found = {}
        for words, rounds, begun in (("no round here", 0, True), (f"{few} rounds", few, True), ("scratch", few, False)):
            changes: dict[str, Any] = {"start": start} if begun else {}
            experiment = experiment_for(source, "text_transformer", rounds, **changes)
            document, _, _ = _run(experiment, dataset, folder / words.replace(" ", "-"))
            found[words] = _value(document)
    popular = _value(document, "popularity")
    judge = unclaimed if quick else claim
    again = f"{few} rounds"
    return [
        Row(f"{source}: popularity", popular, UNIT),
        judge(f"{source}: learnt on {elsewhere}, no round here", found["no round here"], UNIT, ">=", round(popular, 4)),
        judge(f"{source}: learnt on {elsewhere}, {again} here", found[again], UNIT, ">=", round(found["scratch"], 4)),
        Row(f"{source}: {again} from scratch", found["scratch"], UNIT),
    ]


def _chosen(patterns: list[str]) -> Iterator[tuple[str, Callable[[bool], list[Row]]]]:
    for name, measure in sections().items():
        if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            yield name, measure


def main() -> int:
    """Take `--only`, and leave the rest to the harness."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN")
    parser.add_argument("--list", action="store_true")
    known, rest = parser.parse_known_args()
    if known.list:
        print("\n".join(sections()))
        return 0
    torch.set_num_threads(1)

    def measure(quick: bool) -> list[Row]:
        rows: list[Row] = []
        for name, section in _chosen(known.only):
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows += section(quick)
        return rows

    what = f"{__doc__ or ''} --only PATTERN (repeatable) and --list choose parts, for example 'table/ml-100k/*'."
    return run("quality", what, measure, rest)


if __name__ == "__main__":
    raise SystemExit(main())
