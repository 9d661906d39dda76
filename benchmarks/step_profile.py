"""Where the time of a per-client clipped step goes, and how much of it no engine could save."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.func import functional_call

from benchmarks.harness import Row, progress, run
from benchmarks.peers.workloads import KEY, sequence
from fedrec.client.rows import renumber
from fedrec.client.trainer import cache_block, step_batches
from fedrec.client.vectorised import train_batched
from fedrec.models.recommender import to_torch
from fedrec.privacy.clip import clip_factors


def measure(quick: bool) -> list[Row]:
    """Profile one block of workload B1 at both lengths."""
    torch.set_num_threads(1)
    bandwidth = copy_bandwidth()
    rows = [Row("bandwidth of a copy, read and written", bandwidth / 1e9, "GB/s")]
    for length in (50, 200):
        rows += step_rows(length, 5 if quick else 25, bandwidth)
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
