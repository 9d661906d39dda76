"""Speed against peers in one run: a small client (A) and a transformer (B), with one thread per process."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from benchmarks.harness import Row, claim, progress, run, unclaimed
from benchmarks.peers import central, plain
from benchmarks.peers.processes import Skipped, measured, pfl_python
from benchmarks.peers.workloads import KEY, Workload, in_process, sequence, small
from fedrec.client.pool import LogPool
from fedrec.client.trainer import cache_block
from fedrec.client.workers import WorkerPool

Times = dict[str, list[float]]
REPEATS, SEQUENCE_REPEATS, QUICK_REPEATS = 8, 5, 3
FLOWER_NODES, FLOWER_COHORT, RAY_PROCESSES = 1_000, 150, 2
PFL_COHORT, PLAIN_COHORT = 200, 200
BATCHES = (16, 64, 256)
SEQUENCES = ((50, 1, 256, 1.2), (200, 1, 64, 1.2), (50, 4, 128, 1.25), (200, 4, 64, 1.25))
"""Length, steps, people, and what the ratio may be."""


def measure(quick: bool) -> list[Row]:
    """Run both workloads, and one worker process against two."""
    torch.set_num_threads(1)
    rows = small_rows(quick, QUICK_REPEATS if quick else REPEATS)
    repeats = QUICK_REPEATS if quick else SEQUENCE_REPEATS
    for length, steps, n_users, bound in SEQUENCES:
        rows += sequence_rows(sequence(n_users // (4 if quick else 1), length, steps), quick, repeats, bound)
    return rows + workers_rows(quick, repeats)


def timed(contenders: Mapping[str, Callable[[], Any]], repeats: int, description: str, warm_up: bool = True) -> Times:
    """Return the seconds of each contender's calls: they take turns, and the first call of each does not count."""
    if warm_up:
        for call in contenders.values():
            call()
    seconds: Times = {name: [] for name in contenders}
    for _ in progress(range(repeats), description):
        for name, call in contenders.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def small_rows(quick: bool, repeats: int) -> list[Row]:
    """Return the rows of workload A; those with a process of their own run between two halves of the others."""
    n = 500 if quick else 2_000
    workload = small(2 * n, n)
    model, cohort = workload.model(), workload.cohort().take(slice(0, n))
    shared = model.get_parameter("item").detach().clone()
    generator = torch.Generator().manual_seed(1)
    histories = torch.from_numpy(workload.log.item.reshape(2 * n, plain.PER_USER)[:PLAIN_COHORT]).long()
    two = WorkerPool(workload.log, workload.catalog, RAY_PROCESSES)
    contenders: dict[str, Callable[[], Any]] = {
        "fedrec": in_process(workload),
        "fedrec, two": in_process(workload, two),
        "plain": lambda: plain.round_of(histories, shared, generator),
        **_centralised(workload, (64, 256, 1024), cohort),
    }
    seconds = timed(contenders, repeats // 2, "A")
    elsewhere, skipped = _elsewhere(n, quick)
    for name, more in timed(contenders, repeats - repeats // 2, "A", warm_up=False).items():
        seconds[name] += more
    two.close()
    speed = {name: n / statistics.median(values) for name, values in seconds.items() if name != "plain"}
    speed["plain"] = len(histories) / statistics.median(seconds["plain"])
    best = max((name for name in speed if name.startswith("batches")), key=speed.__getitem__)
    unit = "clients/s"
    rows = [
        Row(f"A: fedrec in-process, whole round, {n:,} of {2 * n:,} clients", speed["fedrec"], unit),
        Row(f"A: fedrec in-process, whole round, {RAY_PROCESSES} worker processes", speed["fedrec, two"], unit),
        Row("A: plain torch loop, one client after the other", speed["plain"], unit),
        Row(f"A: centralised torch on the same samples, {best}", speed[best], unit),
        *(Row(f"A: {label}", value, unit) for label, value in elsewhere.items()),
        *(Row(f"A: {label}: skipped: {why}", 0.0, "skipped") for label, why in skipped.items()),
        Row("A: fedrec / plain loop", speed["fedrec"] / speed["plain"], "x"),
        Row("A: cost of fedrec against centralised", speed[best] / speed["fedrec"], "x"),
    ]
    for label, bound in ((_FLOWER, 400), (_PFL, 30)):
        if label in elsewhere:
            reach = unclaimed if quick else claim
            rows.append(Row(f"A: fedrec, one process / {label}", speed["fedrec"] / elsewhere[label], "x"))
            limit = RAY_PROCESSES * speed[best] / elsewhere[label]
            rows.append(Row(f"A: limit, {RAY_PROCESSES} x centralised on one core / {label}", limit, "x"))
            ratio = speed["fedrec, two"] / elsewhere[label]
            rows.append(reach(f"A: fedrec, {RAY_PROCESSES} processes / {label}", ratio, "x", ">=", bound))
    return rows


_FLOWER = f"plain Flower app on Ray, {FLOWER_COHORT} of {FLOWER_NODES:,} nodes a round, {RAY_PROCESSES} processes"
_FEDREC_RAY = f"fedrec on Flower's Ray engine, {RAY_PROCESSES} nodes, {RAY_PROCESSES} processes"
_PFL = f"pfl, {PFL_COHORT} clients a round"


def _elsewhere(n: int, quick: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Return clients per second of the contenders in processes of their own, and why others were skipped."""

    def flower() -> float:
        seconds = measured("flower_ray", nodes=FLOWER_NODES, cohort=FLOWER_COHORT, rounds=3)
        return FLOWER_COHORT / statistics.median(seconds)

    def fedrec_ray() -> float:
        seconds = measured("fedrec_ray", nodes=RAY_PROCESSES, people=2 * n, cohort=n, rounds=5)
        return n / statistics.median(seconds)

    def pfl() -> float:
        python = pfl_python(torch.__version__.partition("+")[0])
        return PFL_COHORT / statistics.median(
            measured("pfl_loop", python, people=FLOWER_NODES, cohort=PFL_COHORT, rounds=7)
        )

    found: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for label, start in ((_FLOWER, flower), (_FEDREC_RAY, fedrec_ray), (_PFL, pfl)):
        if quick:
            skipped[label] = "not in a quick run"
            continue
        print(f"starting {label}", file=sys.stderr)
        try:
            found[label] = start()
        except Skipped as reason:
            skipped[label] = str(reason)
    return found, skipped


def _centralised(workload: Workload, batches: Sequence[int], cohort: Any) -> dict[str, Callable[[], Any]]:
    """Return one contender for each size of batch; each trains a model of its own."""

    def contender(block: int) -> Callable[[], Any]:
        model = workload.model()
        return lambda: central.together(model, cohort, workload.task.local, KEY, block)

    return {f"batches of {block}": contender(block) for block in batches}


def sequence_rows(workload: Workload, quick: bool, repeats: int, bound: float) -> list[Row]:
    """Return the rows of workload B for one length and number of steps."""
    pool, plan, cohort = LogPool(workload.log, workload.catalog), workload.plan(), workload.cohort()
    own = cache_block(workload.model(), workload.steps)
    n, few = len(cohort), 8 if quick else 16
    model = workload.model()
    one_by_one = cohort.take(slice(0, few))
    contenders: dict[str, Callable[[], Any]] = {
        "pool": lambda: pool.run(plan),
        "round": in_process(workload),
        "plain": lambda: central.one_by_one(model, one_by_one, workload.task.local, KEY),
        **_centralised(workload, sorted({*BATCHES, own}), cohort),
    }
    seconds = {name: statistics.median(values) for name, values in timed(contenders, repeats, workload.name).items()}
    best = min((name for name in seconds if name.startswith("batches")), key=seconds.__getitem__)
    unit, steps, name = "user-steps/s", workload.steps, workload.name
    reach = unclaimed if quick else claim
    return [
        Row(f"{name}: fedrec in-process, whole round", n * steps / seconds["round"], unit),
        Row(f"{name}: fedrec, training, clipping and adding up", n * steps / seconds["pool"], unit),
        Row(f"{name}: plain torch loop, one client after the other", few * steps / seconds["plain"], unit),
        Row(f"{name}: centralised torch, {best}", n * steps / seconds[best], unit),
        Row(f"{name}: cost against centralised batches of {own}", seconds["pool"] / seconds[f"batches of {own}"], "x"),
        reach(f"{name}: cost against centralised, its best batch", seconds["pool"] / seconds[best], "x", "<=", bound),
    ]


def workers_rows(quick: bool, repeats: int) -> list[Row]:
    """Return how much faster two worker processes are than one; both are fed through the same files in memory."""
    workload = sequence(256 if quick else 1024, 50, 1)
    plan = workload.plan()
    with ExitStack() as stack:
        pools = {n: stack.enter_context(WorkerPool(workload.log, workload.catalog, n)) for n in (1, 2)}
        contenders: dict[str, Callable[[], Any]] = {str(n): partial(pool.run, plan) for n, pool in pools.items()}
        seconds = timed(contenders, repeats, "workers")
    reach = unclaimed if quick else claim
    what = "two worker processes / one, B1, length 50"
    return [reach(what, statistics.median(seconds["1"]) / statistics.median(seconds["2"]), "x", ">=", 1.7)]


if __name__ == "__main__":
    raise SystemExit(run("speed", __doc__ or "", measure))
