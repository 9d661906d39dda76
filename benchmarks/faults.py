"""What goes wrong, and what comes of it: killed servers, gone clients, bad messages, bad disks, many rounds."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, claim, progress, run, unclaimed
from benchmarks.mutations import mutated
from fedrec.client.pool import LogPool
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.synthetic import checkerboard
from fedrec.errors import FedrecError, RegistryError
from fedrec.params import digest
from fedrec.protocol.link import Reply, Verb
from fedrec.protocol.plan import Census, CensusRequest, RoundPlan
from fedrec.protocol.tally import Expectation
from fedrec.random import Key
from fedrec.server.files import load_last_good, previous, save_checkpoint
from fedrec.server.gather import _opened
from fedrec.server.judge import initial
from fedrec.server.registry import Registry
from fedrec.server.round import Recipe, run_round, take_census
from fedrec.server.run import RunFolder, cut, run_experiment
from fedrec.server.state import ServerState

SEED = 20


def experiment(rounds: int = 20, **training: Any) -> Experiment:
    """Return a small lifelong run."""
    return Experiment.parse(
        {
            "name": "faults",
            "seed": 3,
            "split": {"kind": "stream", "base": 0.5, "later": 2, "holdout": 0.15},
            "model": {
                "kind": "transformer", "dim": 8, "blocks": 1, "heads": 2, "length": 8, "dropout": 0.1,
                "softmax": {"kind": "sampled", "negatives": 8},
            },
            "training": {
                "cohort": {"kind": "poisson", "expected": 16.0},
                "average": 0.8,
                "base": {"rounds": rounds},
                "later": {"rounds": rounds // 2},
                **training,
            },
            "evaluation": {"probes": 2, "ks": [10], "replicates": 10, "local_only": {"people": 0}},
            "runtime": {"checkpoint_every": 1},
        }
    )  # fmt: skip


def dataset() -> Dataset:
    """Return made-up interactions of 80 people."""
    return checkerboard(80, 60, 2, 25, Key.from_seed(1))


class Nodes:
    """Nodes in this process; some fall silent or send something else."""

    def __init__(
        self, data: Dataset, n: int, change: Mapping[int, Callable[[bytes], bytes | None]] | None = None
    ) -> None:
        """Host every n-th person on each node; `change` turns a node's honest reply into what it sends, if anything."""
        self.pools = {100 + i: LogPool.partition(data.log, data.catalog, i, n) for i in range(n)}
        self.change = dict(change or {})
        self.plans: dict[int, RoundPlan] = {}

    def nodes(self) -> list[int]:
        """Return all ids."""
        return sorted(self.pools)

    def exchange(self, verb: Verb, documents: Mapping[int, bytes], timeout_seconds: float | None) -> Iterable[Reply]:
        """Answer."""
        for node, document in documents.items():
            pool = self.pools[node]
            if verb == "census":
                request = CensusRequest.from_bytes(document)
                n_clients = pool.census(request.window, request.catalog_digest)
                yield Reply(node, Census(node=pool.name, n_clients=n_clients, ticket=request.ticket).to_bytes())
                continue
            plan = self.plans[node] = RoundPlan.from_bytes(document)
            sent: bytes | None = replace(pool.run(plan), ticket=plan.ticket).to_bytes(plan.coding, pool.name)
            if node in self.change and sent is not None:
                sent = self.change[node](sent)
            if sent is not None:
                yield Reply(node, sent)


class Federation:
    """A data set, its recipe and a state to run rounds from."""

    def __init__(self, settings: Experiment) -> None:
        """Prepare."""
        self.data = dataset()
        self.recipe = Recipe(settings, self.data.catalog.digest(), lambda: 0.0)
        self.slice = cut(settings, self.data)[0]
        params = initial(settings.model, self.slice.n_items, self.recipe)
        self.fresh = ServerState("faults/001", settings.digest(), self.recipe.catalog_digest, params=params)

    def rounds(self, link: Nodes, n: int) -> ServerState:
        """Run some rounds and return the state."""
        state, roster = self.fresh, take_census(link, self.slice.train, self.recipe)
        for _ in range(n):
            state, _ = run_round(state, link, self.recipe, self.slice, roster)
        return state


def outcome(root: Path) -> str:
    """Return a digest of all that a run published and of its report, but for clocks."""
    skipped = ("seconds", "judge_seconds", "command", "machine")

    def bare(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: bare(inner) for key, inner in value.items() if key not in skipped}
        return [bare(inner) for inner in value] if isinstance(value, list) else value

    files = sorted((root / "registry" / "releases").rglob("*.*"))
    parts = [f"{path.name} {path.read_bytes().hex()}" for path in files if path.is_file()]
    [report] = root.glob("runs/faults/*/report.json")
    return str(hash((tuple(parts), json.dumps(bare(json.loads(report.read_text("utf-8"))), sort_keys=True))))


def live(root: Path, settings: Experiment, data: Dataset) -> None:
    """Go on with the run below `root`, or begin it."""
    found = RunFolder.newest(root / "runs", settings)
    folder = found or RunFolder.new(root / "runs", settings)
    if not folder.complete:
        run_experiment(settings, data, Nodes(data, 2), folder, Registry(root / "registry"))


def forked(work: Callable[[], None], kill_after: float | None = None) -> tuple[bool, float]:
    """Do the work in a child, kill it after so many seconds; return whether it was killed, and how long it took."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
        raise RuntimeError("a child failed")
    return os.WIFSIGNALED(status), time.monotonic() - began


def killed_servers(quick: bool) -> list[Row]:
    """Kill a run at random moments, resume it, and compare it with one that was left alone."""
    import fedrec.client.evaluator
    import fedrec.client.trainer
    import fedrec.evaluation.plots  # what children would each load anew  # noqa: F401

    settings, data, rng = experiment(), dataset(), random.Random(SEED)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        whole = root / "whole"
        forked(lambda: live(whole, settings, data))
        shutil.rmtree(whole)
        _, seconds = forked(lambda: live(whole, settings, data))
        expected, same, killed, n = outcome(whole), 0, 0, 4 if quick else 100
        for number in progress(range(n), "kills"):
            place = root / str(number)
            hit, _ = forked(lambda: live(place, settings, data), rng.uniform(0.02, 0.98) * seconds)  # noqa: B023
            killed += hit
            forked(lambda: live(place, settings, data))  # noqa: B023
            same += outcome(place) == expected
            shutil.rmtree(place)
    return [
        Row("in-process server: SIGKILLs that hit a living run", killed, f"of {n}"),
        claim("in-process server, killed and resumed: same bytes as left alone", same, f"of {n}", ">=", n),
    ]


def gone_clients() -> list[Row]:
    """Let a share of the nodes fall silent in each round."""
    federation, rows = Federation(experiment()), []
    for share in (0.3, 0.5):
        gone = {100 + i: (lambda sent: None) for i in range(round(share * 20))}
        with_gone = federation.rounds(Nodes(federation.data, 20, gone), 5)
        closed = sum(0 < record["clients"] < record["cohort"] for record in with_gone.rounds)
        rows.append(
            claim(f"{share:.0%} of nodes gone in each round: rounds closed with the rest", closed, "of 5", ">=", 5)
        )
        strict = Federation(experiment(minimum_share=0.9))
        state = strict.rounds(Nodes(strict.data, 20, gone), 5)
        kept = digest(state.params) == digest(strict.fresh.params)
        rows.append(
            claim(f"{share:.0%} gone, minimum_share 0.9: all rounds abandoned, nothing learnt", kept, "", ">=", 1)
        )
    return rows


def bad_messages(quick: bool) -> list[Row]:
    """Send mutated messages, and replays."""
    federation = Federation(experiment())
    kept: list[bytes] = []
    link = Nodes(federation.data, 3, {101: lambda sent: kept.append(sent) or sent})  # type: ignore[func-returns-value]
    federation.rounds(link, 1)
    plan, rng = link.plans[101], random.Random(SEED)
    shapes = {name: (value.shape, value.dtype) for name, value in federation.fresh.params.items()}
    expectation = Expectation(shapes, len(plan.slots), 10.0)
    _opened(kept[0], plan, expectation)
    accepted = crashed = 0
    n = 1_000 if quick else 10_000
    for _ in range(n):
        bad = mutated(kept[0], rng, len(plan.slots))
        try:
            _opened(bad, plan, expectation)
            accepted += bad != kept[0]
        except FedrecError:
            pass
        except Exception:
            crashed += 1
    lies = Nodes(federation.data, 3, {101: lambda sent: mutated(sent, rng, len(link.plans[101].slots))})
    gone = Nodes(federation.data, 3, {101: lambda sent: None})
    fuzzed, without = federation.rounds(lies, 10), federation.rounds(gone, 10)
    named = sum(any(one["node"] == "partition 000001" for one in record["refused"]) for record in fuzzed.rounds)
    replays = Nodes(federation.data, 3, {101: lambda sent: kept[0]})
    replayed = federation.rounds(replays, 10)
    refused = sum(bool(record["refused"]) for record in replayed.rounds)
    same = digest(fuzzed.params) == digest(without.params) == digest(replayed.params)
    return [
        claim("mutated messages accepted", accepted, f"of {n}", "<=", 0),
        claim("mutated messages that crashed the server", crashed, f"of {n}", "<=", 0),
        claim("rounds of 10 in which the offender is named", named, "rounds", ">=", 10),
        claim("replays of an older round refused", refused, "of 10", ">=", 10),
        claim("model after 10 such rounds as without the offender, in bytes", float(same), "", ">=", 1),
    ]


def stock_flower() -> list[Row]:
    """Give Flower's own mean the same numbers: which does it accept?"""
    from flwr.server.strategy.aggregate import aggregate

    honest = [([np.ones(4, np.float32)], 5) for _ in range(9)]
    bad: dict[str, tuple[list[Any], int]] = {
        "NaN": ([np.full(4, np.nan, np.float32)], 5),
        "infinity": ([np.full(4, np.inf, np.float32)], 5),
        "1e30": ([np.full(4, 1e30, np.float32)], 5),
        "weight -8": ([np.full(4, -50, np.float32)], -8),
        "weight 1e9": ([np.full(4, 50, np.float32)], 10**9),
        "another type": ([np.full(4, 9, np.int64)], 5),
    }
    accepted = 0
    for entry in bad.values():
        try:
            with np.errstate(all="ignore"):
                found = aggregate([*honest, entry])
            accepted += not np.allclose(found[0], 1.0)
        except Exception:
            continue
    return [Row(f"stock Flower's mean moved by one of ten clients with: {', '.join(bad)}", accepted, f"of {len(bad)}")]


def bad_disks(quick: bool) -> list[Row]:
    """Damage checkpoints in every way, and see what is loaded."""
    rng, state = random.Random(SEED), Federation(experiment()).fresh
    silent = fallback = noted = 0
    n = 50 if quick else 500
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        save_checkpoint(path, *state.to_record())
        save_checkpoint(path, *state.advanced(round=1).to_record())
        whole = path.read_bytes()
        for _ in range(n):
            bad = bytearray(whole)
            if rng.random() < 0.5:
                bad = bad[: rng.randrange(len(bad))]
            else:
                bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            header, _, note = load_last_good(path)
            fallback += header["round"] == 0
            noted += note is not None
        previous(path).unlink()
        for _ in range(n):
            bad = bytearray(whole)
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            try:
                load_last_good(path)
                silent += 1
            except RegistryError:
                pass
    return [
        claim(
            "truncated or flipped checkpoints: the one before used, and said so",
            min(fallback, noted),
            f"of {n}",
            ">=",
            n,
        ),
        claim("flipped checkpoints without one before, loaded silently", silent, f"of {n}", "<=", 0),
    ]


def many_rounds(quick: bool) -> list[Row]:
    """Run many small rounds in one process; watch memory and open files."""
    n = 60 if quick else 1_000
    federation = Federation(experiment(rounds=n))
    link = Nodes(federation.data, 2)
    state, roster = federation.fresh, take_census(link, federation.slice.train, federation.recipe)
    marks: list[tuple[int, int]] = []
    for number in progress(range(n), "rounds"):
        state, _ = run_round(state, link, federation.recipe, federation.slice, roster)
        if number + 1 in (n // 5, n):
            marks.append((memory(), len(os.listdir("/proc/self/fd"))))
    (first, files), (last, files_after) = marks
    judge = unclaimed if quick else claim
    return [
        judge(f"growth of memory from round {n // 5} to {n}", (last - first) / (1 << 20), "MiB", "<=", 8),
        claim("growth of open files", files_after - files, "files", "<=", 0),
    ]


def memory() -> int:
    """Return the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def measure(quick: bool) -> Sequence[Row]:
    """Run every row."""
    import torch

    torch.set_num_threads(1)
    return [
        *killed_servers(quick),
        *gone_clients(),
        *bad_messages(quick),
        *stock_flower(),
        *bad_disks(quick),
        *many_rounds(quick),
    ]


if __name__ == "__main__":
    raise SystemExit(run("faults", __doc__ or "", measure))
