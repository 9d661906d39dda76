"""The leak-free table of all models, the best of MovieLens-1M, adapters, newcomers, and transfer by text."""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import foundation
from benchmarks.asking import over_seeds
from benchmarks.blending import CENTRAL, REACHED, best, longest
from benchmarks.foundation import UNIT, Measure, Setting
from benchmarks.harness import Row, run
from benchmarks.kept import Made, shelf
from benchmarks.leave_one_out import ease
from benchmarks.peers.personal import PersonalSettings, personal
from benchmarks.transfer import transfer
from benchmarks.zoo import MADE, MODELS, TEXTLESS, experiment_for
from fedrec.data.sources import load_dataset

SOURCES = ("ml-100k", "ml-1m", "amazon-video", "amazon-beauty", "movietweetings-100k")
LOCAL_ONLY = 200
"""People of the local-only row."""
EASE_MOST = 4_000
"""Items up to which EASE is inverted, and every client's own copy of all item vectors is made."""
PERSONAL_ROUNDS = 100
GRAPH_MOST = 2_000
"""People up to which GPFedRec compares everybody's table with everybody else's in each round."""


def parts() -> dict[str, Measure]:
    """Return every part of the benchmark by name, ``part/data set`` or ``table/data set/row``."""
    found: dict[str, Measure] = {}
    for source in SOURCES:
        for kind in MODELS:
            if kind in ("nearest", "text_transformer") and source in TEXTLESS:
                continue
            found[f"table/{source}/{kind}"] = partial(_federated, source, kind)
        found[f"table/{source}/ease"] = partial(_ease, source)
        for kind in ("pfedrec", "gpfedrec"):
            found[f"table/{source}/{kind}"] = partial(_personal, source, kind)
    found["best/ml-1m"] = best
    for source, elsewhere in (("ml-100k", "ml-1m"), ("ml-1m", "ml-100k")):
        for shape in ("narrow", "wide"):
            found[f"adapters/{source}/{shape}"] = partial(foundation.adapters, source, elsewhere, f" ({shape})")
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
    if len(dataset.catalog) > EASE_MOST:
        print(f"{source}: EASE of {len(dataset.catalog):,} items is left out", file=sys.stderr)
        return []
    began = time.process_time()
    value = float(ease(dataset, 500.0).mean())
    name = f"{source}: EASE, centralised, lambda 500"
    return [Row(name, value, UNIT), Row(f"{name}, processor time", time.process_time() - began, "s")]


def _personal(source: str, kind: str, setting: Setting) -> list[Row]:
    dataset = load_dataset(source)
    if len(dataset.catalog) > EASE_MOST:
        print(f"{source}: {kind} of {len(dataset.catalog):,} items is left out", file=sys.stderr)
        return []
    if kind == "gpfedrec" and dataset.log.n_users > GRAPH_MOST:
        print(f"{source}: {kind} of {dataset.log.n_users:,} people is left out", file=sys.stderr)
        return []
    began = time.process_time()
    settings = PersonalSettings(rounds=5 if setting.quick else PERSONAL_ROUNDS, graph=kind == "gpfedrec")
    ndcg, hits = personal(dataset, settings)
    head = f"{source}: {'GPFedRec' if settings.graph else 'PFedRec'}, without the leak"
    sent = 4 * settings.dim * len(dataset.catalog) * dataset.log.n_users * settings.rounds / 1e6
    return [
        Row(f"{head} (1 seed)", ndcg, UNIT),
        Row(f"{head}, HR@10", hits, "HR@10"),
        Row(f"{head}, processor time", time.process_time() - began, "s"),
        Row(f"{head}, uploaded by all, whole tables", sent, "MB"),
    ]


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
