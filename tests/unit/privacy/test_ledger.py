"""The ledger never forgets a charge, never lets the budget pass, and notices when it was touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedrec.errors import BudgetExhausted, PrivacyError
from fedrec.privacy.accounting import epsilon
from fedrec.privacy.events import GaussianEvent
from fedrec.privacy.ledger import PrivacyLedger

ROUND = GaussianEvent(noise_multiplier=1.0, sampling=0.1)
ONCE = GaussianEvent(noise_multiplier=5.0)
DELTA = 1e-5


OPEN: list[PrivacyLedger] = []


def opened(path: Path | None, budget: float | None = 3.0) -> PrivacyLedger:
    OPEN.append(PrivacyLedger(path, epsilon=budget, delta=DELTA))
    return OPEN[-1]


def spend(book: PrivacyLedger, events: list[GaussianEvent]) -> None:
    """Charge the events in turn until the ledger refuses."""
    for number in range(10_000):
        book.charge(f"round {number}", events[number % len(events)])


@pytest.fixture(autouse=True)
def _close_all() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def test_what_was_charged_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = opened(path)
    for number in range(5):
        first.charge(f"round {number}", ROUND, clip_norm=2.0)
    first.charge("counts", ONCE)
    spent, entries = first.spent(), first.entries()
    first.close()
    second = opened(path)
    assert second.entries() == entries
    assert second.spent() == spent == epsilon([ROUND] * 5 + [ONCE], DELTA)


def test_a_charge_is_in_the_file_before_it_is_returned(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    book = opened(path)
    for number in range(3):
        book.charge(f"round {number}", ROUND)
        assert len(PrivacyLedger.read(path).entries()) == number + 1


def test_the_same_name_again_is_a_retry_that_pays_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    book = opened(path)
    book.charge("round 0", ROUND)
    book.close()
    again = opened(path)
    charge = again.charge("round 0", ROUND)
    assert charge.entry.attempt == 2
    assert again.spent() == pytest.approx(epsilon([ROUND, ROUND], DELTA))


def test_what_a_killed_process_paid_from_a_seed_is_found_again_once_and_only_for_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with opened(path) as book:
        book.charge("round 0", ROUND, 1.0, source="a")
        twice = book.charge("round 0", ROUND, 1.0, source="a")
        assert twice.entry.attempt == 2, "in one process a second release is a second charge"
    before = path.read_bytes()
    with opened(path) as book:
        assert [book.charge("round 0", ROUND, 1.0, source="a").entry.attempt for _ in range(2)] == [1, 2]
        assert path.read_bytes() == before
        assert book.charge("round 0", ROUND, 1.0, source="a").entry.attempt == 3
    for other in ({"source": "b"}, {"source": None}, {"clip_norm": 2.0}, {"event": ONCE}):
        said: dict[str, Any] = {"name": "round 0", "event": ROUND, "clip_norm": 1.0, "source": "a"} | other
        with opened(path) as book:
            n = len(book.entries())
            assert book.charge(**said).entry.number == n + 1


def test_the_budget_stops_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    book = opened(path, budget=1.5)
    with pytest.raises(BudgetExhausted, match="nothing was sent") as refusal:
        spend(book, [ROUND])
    paid = len(book.entries())
    assert f"round {paid}" in str(refusal.value)
    assert "1.5" in str(refusal.value)
    assert len(PrivacyLedger.read(path).entries()) == paid
    assert epsilon([ROUND] * paid, DELTA) <= 1.5 < epsilon([ROUND] * (paid + 1), DELTA)


def test_a_budget_that_is_spent_stays_spent_and_a_cheaper_release_may_still_fit(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    book = opened(path, budget=1.5)
    with pytest.raises(BudgetExhausted):
        spend(book, [ROUND])
    book.close()
    again = opened(path, budget=1.5)
    with pytest.raises(BudgetExhausted):
        again.charge("one more", ROUND)
    again.charge("nearly free", GaussianEvent(noise_multiplier=500.0))
    assert again.spent() <= 1.5 * (1 + 1e-6)


def test_events_of_two_kinds_share_one_budget() -> None:
    book = opened(None, budget=2.0)
    with pytest.raises(BudgetExhausted):
        spend(book, [ONCE, ROUND])
    charged = [entry.event for entry in book.entries()]
    assert epsilon([*charged, ONCE], DELTA) > 2.0 or epsilon([*charged, ROUND], DELTA) > 2.0
    assert epsilon(charged, DELTA) <= 2.0


def test_another_budget_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    opened(path, budget=3.0).close()
    with pytest.raises(PrivacyError, match="cannot be changed"):
        opened(path, budget=8.0)


def test_two_spenders_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    opened_first = opened(path)
    with pytest.raises(PrivacyError, match="in use by another"):
        opened(path)
    opened_first.close()
    opened(path).close()


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    book = opened(path)
    for number in range(3):
        book.charge(f"round {number}", ROUND)
    book.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    again = opened(path)
    assert [entry.name for entry in again.entries()] == ["round 0", "round 1"]
    again.charge("round 2", ROUND)
    again.close()
    assert len(opened(path).entries()) == 3


def test_a_torn_header_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"fedrec-led')
    assert opened(path).entries() == ()


@pytest.mark.parametrize("change", ["noise", "drop", "swap"])
def test_a_ledger_that_was_changed_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "ledger.jsonl"
    book = opened(path)
    for number in range(3):
        book.charge(f"round {number}", ROUND)
    book.close()
    lines = path.read_text().splitlines()
    if change == "noise":
        lines[2] = lines[2].replace('"noise_multiplier": 1.0', '"noise_multiplier": 9.0')
    elif change == "drop":
        del lines[2]
    else:
        lines[1], lines[2] = lines[2], lines[1]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(PrivacyError, match="was changed"):
        opened(path)


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with pytest.raises(PrivacyError, match="no privacy ledger"):
        PrivacyLedger.read(path)
    path.write_text("hello\nworld\n")
    with pytest.raises(PrivacyError, match="damaged"):
        opened(path)


def test_a_ledger_that_was_opened_to_read_takes_no_charge(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    opened(path).close()
    with pytest.raises(PrivacyError, match="for reading only"):
        PrivacyLedger.read(path).charge("round 0", ROUND)


@pytest.mark.parametrize("budget", [0.0, -1.0])
def test_a_budget_that_is_none_is_refused(budget: float) -> None:
    with pytest.raises(PrivacyError, match="above 0"):
        opened(None, budget=budget)


SPENDER = """
import sys
from pathlib import Path
from fedrec.privacy.events import GaussianEvent
from fedrec.privacy.ledger import PrivacyLedger
book = PrivacyLedger(Path(sys.argv[1]), epsilon=None, delta=1e-5)
start = len(book.entries())
for number in range(start, 100_000):
    book.charge(f"round {number}", GaussianEvent(noise_multiplier=1.0, sampling=0.1))
    print(number, flush=True)
"""


def test_a_killed_spender_never_under_counts(tmp_path: Path) -> None:
    path, told = tmp_path / "ledger.jsonl", -1
    for wait in (0.02, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", SPENDER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().split("\n")
        process.wait()
        process.stdout.close()
        told = max([told, int(first), *(int(line) for line in rest[:-1] if line)])
        assert len(PrivacyLedger.read(path).entries()) >= told + 1
    assert told > 3
