"""What goes wrong, and what comes of it: killed servers, gone clients, bad messages, bad disks, many rounds."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.federation import Federation, Nodes, Repeating, dataset, experiment
from benchmarks.harness import Row, claim, progress, run, unclaimed
from benchmarks.mutations import mutated
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.errors import FedrecError, RegistryError
from fedrec.params import digest
from fedrec.privacy.ledger import Charge, Entry, PrivacyLedger
from fedrec.protocol.tally import Expectation
from fedrec.server.files import load_last_good, previous, save_checkpoint
from fedrec.server.gather import _opened
from fedrec.server.guard import Guard
from fedrec.server.registry import Registry
from fedrec.server.round import run_round, take_census
from fedrec.server.run import LEDGER, RunFolder, run_experiment

SEED = 20


def outcome(root: Path) -> tuple[str, bytes]:
    """Return a digest of all that a run published and of its report, but for clocks; and the bytes of its ledger."""
    skipped = ("seconds", "judge_seconds", "command", "machine")

    def bare(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: bare(inner) for key, inner in value.items() if key not in skipped}
        return [bare(inner) for inner in value] if isinstance(value, list) else value

    files = sorted((root / "registry" / "releases").rglob("*.*"))
    parts = [f"{path.name} {path.read_bytes().hex()}" for path in files if path.is_file()]
    [report] = root.glob("runs/faults/*/report.json")
    parts.append(json.dumps(bare(json.loads(report.read_text("utf-8"))), sort_keys=True))
    return hashlib.sha256("".join(parts).encode()).hexdigest(), report.with_name(LEDGER).read_bytes()


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
    """Kill a private run at random moments, resume it, and compare it with one that was left alone."""
    import dp_accounting  # noqa: F401
    import torch._dynamo  # noqa: F401

    import fedrec.client.evaluator
    import fedrec.client.trainer
    import fedrec.evaluation.plots  # all of this would each child load anew  # noqa: F401

    data, rng, rows = dataset(), random.Random(SEED), []
    n, n_fresh = (3, 2) if quick else (100, 20)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        settings = experiment(noise="seed")
        whole = root / "whole"
        forked(lambda: live(whole, settings, data))
        model, ledger = outcome(whole)
        places = list(killed_once(root / "seed", settings, data, rng, n))
        outcomes = [outcome(place) for place in places]
        rows += [
            claim("in-process server, SIGKILLs at random moments that hit it alive", len(places), "", ">=", n),
            claim("resumed: same releases and report as left alone, in bytes", *same(model, 0, outcomes), ">=", n),
            claim("resumed: same ledger as left alone, in bytes", *same(ledger, 1, outcomes), ">=", n),
        ]
        least = PrivacyLedger.read(next(whole.glob(f"runs/*/*/{LEDGER}")))
        places = list(killed_once(root / "fresh", experiment(noise="system"), data, rng, n_fresh))
        books = [PrivacyLedger.read(next(place.glob(f"runs/*/*/{LEDGER}"))) for place in places]
        unpaid = [unpaid_sums(place, book) for place, book in zip(places, books, strict=True)]
        more = sum(book.spent() > least.spent() for book in books)
        rows += [
            Row("fresh noise: killed runs that paid more than one left alone", more, f"of {n_fresh}"),
            claim("fresh noise: noised sums that had no charge of their own", sum(unpaid), "sums", "<=", 0),
        ]
    return rows


def killed_once(root: Path, settings: Experiment, data: Dataset, rng: random.Random, n: int) -> Iterator[Path]:
    """Yield folders of so many runs that were killed alive once, and then resumed to their end."""
    _, seconds = forked(lambda: overheard(root / "timed", settings, data))
    for number in progress(range(n), "kills"):
        place, hit = root / str(number), False
        while not hit:  # where the machine was faster than the kill, try again
            shutil.rmtree(place, ignore_errors=True)
            hit, _ = forked(lambda: overheard(place, settings, data), rng.uniform(0.02, 0.98) * seconds)  # noqa: B023
        forked(lambda: overheard(place, settings, data))  # noqa: B023
        yield place


def same(expected: Any, part: int, outcomes: Sequence[tuple[Any, ...]]) -> tuple[int, str]:
    """Return how many outcomes are as expected, and out of how many."""
    return sum(one[part] == expected for one in outcomes), f"of {len(outcomes)}"


def overheard(root: Path, settings: Experiment, data: Dataset) -> None:
    """Do as `live` does, and write down which charge each noised sum used before anything is made of it."""

    def told(guard: Guard, charge: Charge, *others: Any) -> None:
        with (root / "told").open("a", encoding="utf-8") as file:
            file.write(f"{charge.entry.number}\n")

    Guard.told = told  # type: ignore[assignment, method-assign]
    live(root, settings, data)


def unpaid_sums(place: Path, book: PrivacyLedger) -> int:
    """Return how many noised sums of a run were not the only one of a charge in its ledger."""
    told = [int(line) for line in (place / "told").read_text(encoding="utf-8").split()]
    return len(told) - len(set(told) & {entry.number for entry in book.entries()})


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
        ledgers = [paid(nodes) for nodes in (gone, {})]
        rows.append(
            claim(f"{share:.0%} gone, private: same charges as with everybody", ledgers[0] == ledgers[1], "", ">=", 1)
        )
    return rows


def paid(gone: Mapping[int, Callable[[bytes], bytes | None]]) -> tuple[Entry, ...]:
    """Return the ledger of five private rounds."""
    private = Federation(experiment(noise="system"))
    private.rounds(Nodes(private.data, 20, gone), 5)
    assert private.recipe.guard is not None
    return private.recipe.guard.ledger.entries()


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
    doubled = federation.rounds(Repeating(federation.data, 3, instead=False), 10)
    stolen = federation.rounds(Repeating(federation.data, 3, instead=True), 10)
    again, honest = sum(bool(r["refused"]) for r in doubled.rounds), federation.rounds(Nodes(federation.data, 3), 10)
    others = sum(bool(r["refused"]) for r in stolen.rounds)
    unmoved = len({digest(state.params) for state in (fuzzed, without, replayed, stolen)}) == 1
    return [
        claim("mutated messages accepted", accepted, f"of {n}", "<=", 0),
        claim("mutated messages that crashed the server", crashed, f"of {n}", "<=", 0),
        claim("rounds of 10 in which the offender is named", named, "rounds", ">=", 10),
        claim("replays of an older round refused", refused, "of 10", ">=", 10),
        claim("answers sent twice: the second refused", again, "of 10", ">=", 10),
        claim("another node's answer refused", others, "of 10", ">=", 10),
        claim("model after 10 such rounds as without the offender, in bytes", unmoved, "", ">=", 1),
        claim(
            "model after 10 rounds of answers sent twice as sent once",
            digest(doubled.params) == digest(honest.params),
            "",
            ">=",
            1,
        ),
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


def full_disks(quick: bool) -> list[Row]:
    """Let a real file system become full, or read-only, in the middle of a run; then make room, and resume."""
    settings, data = experiment(noise="seed"), dataset()
    with tempfile.TemporaryDirectory() as folder:
        root, disk = Path(folder), Path(folder) / "disk"
        forked(lambda: live(root / "whole", settings, data))
        size = sum(path.stat().st_size for path in (root / "whole").rglob("*") if path.is_file())
        expected, shares = outcome(root / "whole"), (0.4,) if quick else (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
        told = alike = 0
        disk.mkdir()
        for share in shares:
            if subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={int(share * size)}", "tmpfs", disk], check=False
            ).returncode:
                return [Row("a real full disk: this user may not mount one", 0, f"of {len(shares)}")]
            try:
                full = stopped_with(disk / "run", settings, data, root / "said")
                subprocess.run(["mount", "-o", "remount,ro,size=64m", disk], check=True)
                closed = stopped_with(disk / "run", settings, data, root / "said")
                told += ("full" in full or "No space" in full) and ("permission" in closed or "Read-only" in closed)
                subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
                forked(lambda: live(disk / "run", settings, data))
                alike += outcome(disk / "run") == expected
            finally:
                subprocess.run(["umount", disk], check=True)
    n = len(shares)
    return [
        claim("disk full, then read-only: the run stopped with one sentence each", told, f"of {n}", ">=", n),
        claim("then resumed with room: releases, report and ledger the same", alike, f"of {n}", ">=", n),
    ]


def stopped_with(place: Path, settings: Experiment, data: Dataset, said: Path) -> str:
    """Return with what sentence a run stopped that cannot go on."""

    def work() -> None:
        said.write_text("", encoding="utf-8")
        try:
            live(place, settings, data)
        except FedrecError as error:
            said.write_text(str(error), encoding="utf-8")

    forked(work)
    return said.read_text(encoding="utf-8")


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
        *full_disks(quick),
        *many_rounds(quick),
    ]


if __name__ == "__main__":
    raise SystemExit(run("faults", __doc__ or "", measure))
