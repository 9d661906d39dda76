"""Where the time of a per-client clipped step goes, and how much of it no engine could save."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.func import functional_call

from benchmarks.harness import Row, progress, run
from benchmarks.peers.workloads import KEY, sequence
from fedrec.client.allocator import keep_freed_memory
from fedrec.client.rows import renumber
from fedrec.client.trainer import cache_block, step_batches
from fedrec.client.vectorised import ByAutograd, train_batched
from fedrec.models.recommender import to_torch
from fedrec.privacy.clip import clip_factors


def measure(quick: bool) -> list[Row]:
    """Profile one block of workload B1 and one of B4, at both lengths."""
    torch.set_num_threads(1)
    keep_freed_memory()
    bandwidth = copy_bandwidth()
    rows = [Row("bandwidth of a copy, read and written", bandwidth / 1e9, "GB/s")]
    for length in (50, 200):
        rows += step_rows(length, 5 if quick else 25, bandwidth)
        rows += round_rows(length, 4, 3 if quick else 15, bandwidth)
    return rows


def copy_bandwidth() -> float:
    """Return how many bytes a second this core reads and writes when copying memory that no cache holds."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), 5)


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of a call, after one that does not count."""
    call()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def step_rows(length: int, repeats: int, bandwidth: float) -> list[Row]:
    """Return the parts of one block's step, the bytes that only a per-client step moves, and the floor they give."""
    workload = sequence(128, length, 1)
    model, local = workload.model(), workload.task.local
    block = cache_block(model, 1)
    cohort = workload.cohort().take(slice(0, block))
    drawn = step_batches(cohort, model, local, KEY)
    shared = dict(model.named_parameters())
    whole, (own_rows, renumbered) = to_torch(drawn[0]), renumber(drawn)
    touched, batch = torch.from_numpy(own_rows), to_torch(renumbered[0])

    def own() -> dict[str, torch.Tensor]:
        held = {n: v.detach().expand(block, *v.shape) for n, v in shared.items() if n != "item"}
        return {n: v.requires_grad_() for n, v in {**held, "item": shared["item"].detach()[touched]}.items()}

    held, totals = own(), {name: torch.zeros_like(value) for name, value in shared.items()}
    trained = train_batched(model, cohort, local, KEY)
    factors = clip_factors(trained.norms(), local.clip_norm)
    parts: dict[str, Callable[[], Any]] = {
        "centralised forward": lambda: model.loss(whole),
        "centralised forward and backward": lambda: torch.autograd.grad(model.loss(whole).sum(), list(shared.values())),
        "draw": lambda: step_batches(cohort, model, local, KEY),
        "renumber": lambda: renumber(drawn),
        "own rows gathered": own,
        "per-client forward": lambda: functional_call(model, held, (batch, {})),
        "per-client, everything": lambda: _everything(model, cohort, local, totals),
        "norms": trained.norms,
        "clip and add up": lambda: trained.add_to(totals, factors),
    }
    name = f"B1, length {length}, block of {block}"
    seconds = {part: timed(parts[part], repeats) for part in _watched(list(parts), name)}
    dense = 4 * block * sum(value.numel() for part, value in shared.items() if part != "item")
    rows = 4 * own_rows.size * shared["item"].shape[1]
    # Gradients of dense parameters: written, read for norms, read to add. Rows: gathered (read, written), cleared,
    # added to (read, written), read for norms, scaled (read, written), added up (read).
    extra = 3 * dense + 9 * rows
    limit = seconds["centralised forward and backward"] + seconds["draw"]
    together, weights_apart, all_apart = product_seconds(block, length, repeats)
    # A later step of several has weights of its own: read and written to be moved, beside the gradient as above.
    later = extra + 2 * dense
    return [
        *(Row(f"{name}: {part}", 1e3 * value, "ms") for part, value in seconds.items()),
        Row(f"{name}: bytes that only a per-client step moves", extra / 1e6, "MB"),
        Row(f"{name}: cost against centralised", seconds["per-client, everything"] / limit, "x"),
        Row(f"{name}: dense products, one for all clients", 1e3 * together, "ms"),
        Row(f"{name}: dense products, weight gradients of each client", 1e3 * weights_apart, "ms"),
        Row(f"{name}: dense products, weights of each client too", 1e3 * all_apart, "ms"),
        Row(
            f"{name}: floor, these products and bytes", 1 + (weights_apart - together + extra / bandwidth) / limit, "x"
        ),
        Row(
            f"{name}: floor of a later step, weights of each client",
            1 + (all_apart - together + later / bandwidth) / limit,
            "x",
        ),
    ]


def round_rows(length: int, steps: int, repeats: int, bandwidth: float) -> list[Row]:
    """Return the parts of one block's round of several steps, what it adds to centralised training, and the floor.

    The floor is what centralised training takes at its best size of batch, and on top of it only what no engine can
    leave out that keeps clients apart: their bare products, and each byte that has to move at the bandwidth of a copy.
    """
    n_people = 256 if length == 50 else 64
    workload = sequence(n_people, length, steps)
    model, local = workload.model(), workload.task.local
    block = cache_block(model, steps)
    cohort = workload.cohort()
    part = cohort.take(slice(0, block))
    totals = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    found = [_phases(model, part, local, totals) for _ in progress(range(repeats + 1), f"a round of {steps}")][1:]
    phases = {phase: statistics.median(one[phase] for one in found) for phase in found[0]}
    engine = statistics.median(sum(one.values()) for one in found)
    # What centralised training takes for as many people as a block has, at the block's size and at larger ones.
    limits = {}
    for batch in sorted({block, 64, n_people}):
        each = cohort.take(slice(0, batch))
        limits[batch] = timed(lambda: _centralised(model, each, local), repeats) * block / batch  # noqa: B023
    best = min(limits, key=limits.__getitem__)
    dense = 4 * block * sum(value.numel() for name, value in model.named_parameters() if name != "item")
    drawn = step_batches(part, model, local, KEY)
    own = 4 * renumber(drawn)[0].size * model.get_parameter("item").shape[1]
    looked = 4 * block * (length + 256) * model.get_parameter("item").shape[1]
    # Own weights: written once after the first step; read forward, read backward, read and written to be moved in every
    # later one; read for the norm and to be added up. Rows: written; moved in every step; read twice at the end.
    moved = dense * (1 + 4 * (steps - 1) + 2) + own * 3 + 2 * looked * steps
    together, weights_apart, all_apart = product_seconds(block, length, repeats)
    products = weights_apart - together + (steps - 1) * (all_apart - together)
    flops = 6 * block * length * 64 * (2 * 192 + 6 * 64) * steps
    name = f"B{steps}, length {length}, block of {block}"
    return [
        *(Row(f"{name}: {phase}", 1e3 * seconds, "ms") for phase, seconds in phases.items()),
        Row(f"{name}: all of it", 1e3 * engine, "ms"),
        *(Row(f"{name}: centralised, batches of {n}, as many people", 1e3 * t, "ms") for n, t in limits.items()),
        Row(f"{name}: operations of the linear layers", flops / 1e9, "GFLOP"),
        Row(f"{name}: bytes that only clients apart move", moved / 1e6, "MB"),
        Row(f"{name}: these bytes at the bandwidth of a copy", 1e3 * moved / bandwidth, "ms"),
        Row(f"{name}: what products of each client's own cost more", 1e3 * products, "ms"),
        Row(f"{name}: cost against centralised batches of {block}", engine / limits[block], "x"),
        Row(f"{name}: cost against centralised, its best batch", engine / limits[best], "x"),
        Row(f"{name}: floor, these products and bytes", 1 + (products + moved / bandwidth) / limits[best], "x"),
    ]


def _phases(model: Any, part: Any, local: Any, totals: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the seconds that the parts of a block's round take, one after the other."""
    marks = [("", time.perf_counter())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    batches = step_batches(part, model, local, KEY)
    mark("draws")
    clients = ByAutograd(model, {}, batches, local, [None] * len(batches))
    mark("renumbering, rows gathered")
    first = clients.step()
    mark("first step")
    for _ in batches[1:]:
        clients.step()
    mark(f"the {len(batches) - 1} later steps")
    trained = clients.trained(first)
    mark("differences")
    factors = clip_factors(trained.norms(), local.clip_norm)
    mark("norms")
    trained.add_to(totals, factors)
    mark("clipped and added up")
    return {name: then - before for (_, before), (name, then) in pairwise(marks)}


def _centralised(model: Any, part: Any, local: Any) -> None:
    """Take the forward and backward passes of a round for all people at once; drawing included."""
    for batch in step_batches(part, model, local, KEY):
        torch.autograd.grad(model.loss(to_torch(batch)).mean(), list(model.parameters()))


def product_seconds(block: int, length: int, repeats: int) -> tuple[float, float, float]:
    """Time the bare products of the linear layers, forward and backward, without autograd.

    Returns:
        Seconds with one product for all clients; with the weight gradients apart; with the weights apart as well.
    """
    together = weights_apart = all_apart = 0.0
    for wide, count in ((192, 2), (64, 6)):  # of both blocks: query, key and value; and what is as wide as the model
        x, out = torch.ones(block, length, 64), torch.ones(block, length, wide)
        one, own = torch.ones(wide, 64), torch.ones(block, wide, 64)
        flat_x, flat_out = x.flatten(0, 1), out.flatten(0, 1)
        shared = timed(lambda: (flat_x @ one.T, flat_out @ one), repeats)  # noqa: B023 - called at once
        gradient = timed(lambda: flat_out.T @ flat_x, repeats)  # noqa: B023
        gradients = timed(lambda: out.transpose(1, 2) @ x, repeats)  # noqa: B023
        apart = timed(lambda: (x @ own.transpose(1, 2), out @ own), repeats)  # noqa: B023
        together += count * (shared + gradient)
        weights_apart += count * (shared + gradients)
        all_apart += count * (apart + gradients)
    return together, weights_apart, all_apart


def _everything(model: Any, cohort: Any, local: Any, totals: dict[str, torch.Tensor]) -> None:
    trained = train_batched(model, cohort, local, KEY)
    trained.add_to(totals, clip_factors(trained.norms(), local.clip_norm))


def _watched(parts: list[str], name: str) -> list[str]:
    places = progress(range(len(parts)), name)
    return [parts[place] for place in places]


if __name__ == "__main__":
    raise SystemExit(run("step_profile", __doc__ or "", measure))
