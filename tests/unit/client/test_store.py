from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedrec.client.keys import KEY_FILE
from fedrec.client.store import DATABASE, Retention, Store, destroy
from fedrec.errors import StoreError

RECORD_FOR_EVER = """
import sys
from pathlib import Path
from fedrec.client.store import Store
store = Store(Path(sys.argv[1]))
n = len(store.history())
while True:
    store.record(f"item {n}", time=n)
    print(n, flush=True)
    n += 1
"""


def test_what_was_recorded_is_there_after_reopening_oldest_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.record("b", "view", time=20)
    store.record("a", "rating", 4.5, time=10)
    store.close()
    again = Store(tmp_path)
    assert [one[1:] for one in again.history()] == [("a", "rating", 4.5, 10), ("b", "view", None, 20)]
    assert again.number == store.number
    assert json.loads(again.export_history().splitlines()[0]) == {
        "item": "a", "event": "rating", "value": 4.5, "time": 10,
    }  # fmt: skip
    again.close()


def test_nothing_readable_is_on_the_disk(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.record("a very private item", time=1)
    store.log_sent({"what": "a very private upload"})
    for path in tmp_path.iterdir():
        assert b"very private" not in path.read_bytes()
    store.close()


@pytest.mark.parametrize("after", [0.0, 0.003, 0.011, 0.05])
def test_what_record_returned_from_survives_a_killed_process(tmp_path: Path, after: float) -> None:
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", RECORD_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        said = [int(line) for line in [first, *process.stdout.read().splitlines()]]
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        store = Store(tmp_path)
        kept = [one.time for one in store.history()]
        store.close()
        assert kept == list(range(len(kept)))
        assert len(kept) - 1 in (said[-1], said[-1] + 1)  # one more may be written and not yet said


def test_retention_deletes_the_oldest_and_the_too_old(tmp_path: Path) -> None:
    store = Store(tmp_path, retention=Retention(max_count=3, max_age_seconds=50), now=lambda: 100)
    for at in (60, 99, 49, 98, 97):
        store.record("x", time=at)
    assert [one.time for one in store.history()] == [97, 98, 99]
    store.close()
    later = Store(tmp_path, retention=Retention(max_age_seconds=50), now=lambda: 148)
    assert [one.time for one in later.history()] == [98, 99]
    later.close()
    with sqlite3.connect(tmp_path / DATABASE) as db:
        assert db.execute("SELECT count(*) FROM interaction").fetchone() == (2,)
    db.close()


def test_forgetting_deletes_items_times_or_both(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for at, item in enumerate("abcab"):
        store.record(item, time=at)
    with sqlite3.connect(tmp_path / DATABASE) as db:
        sealed = db.execute("SELECT sealed FROM interaction WHERE row = 5").fetchone()[0]
    db.close()
    assert store.forget({"b"}, since=3) == 1
    assert sealed not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert store.forget("a") == 2
    assert store.forget(since=2) == 1
    assert [one.item for one in store.history()] == ["b"]
    with pytest.raises(StoreError, match="Say what to forget"):
        store.forget()
    store.close()


def test_forgetting_everything_leaves_neither_key_nor_rows(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.record("a")
    store.forget_everything()
    assert list(tmp_path.iterdir()) == []
    new = Store(tmp_path)
    assert new.history() == []
    assert new.number != store.number
    new.close()


def test_the_log_of_what_was_sent_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, now=lambda: 7)
    store.log_sent({"task": "count"})
    store.close()
    again = Store(tmp_path)
    assert again.sent() == [{"at": 7, "task": "count"}]
    again.close()


def test_a_wrong_or_missing_key_is_said(tmp_path: Path) -> None:
    Store(tmp_path).close()
    key = tmp_path / KEY_FILE
    key.write_bytes(bytes(32))
    with pytest.raises(StoreError, match="the key is not the one"):
        Store(tmp_path)
    key.write_bytes(b"short")
    with pytest.raises(StoreError, match="holds 5 bytes instead of 32"):
        Store(tmp_path)
    key.unlink()
    with pytest.raises(StoreError, match=r"key of the store in .* is gone"):
        Store(tmp_path)
    assert not key.exists()
    destroy(tmp_path)
    Store(tmp_path).close()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    Store(tmp_path).close()
    (tmp_path / KEY_FILE).chmod(0o640)
    with pytest.raises(StoreError, match=r"Others may read .* \(mode 0640\)"):
        Store(tmp_path)


def test_damaged_or_exchanged_rows_are_never_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.record("a")
    store.record("b")
    with sqlite3.connect(tmp_path / DATABASE) as db:
        sealed = [row[0] for row in db.execute("SELECT sealed FROM interaction ORDER BY row")]
        db.execute("UPDATE interaction SET sealed = ? WHERE row = 1", (sealed[1],))
    db.close()
    with pytest.raises(StoreError, match="row 1 of 'interaction' was changed"):
        store.history()
    store.close()


def test_a_file_that_is_no_database_is_said(tmp_path: Path) -> None:
    Store(tmp_path).close()
    (tmp_path / DATABASE).write_bytes(b"not a database" * 500)
    with pytest.raises(StoreError, match="Cannot use"):
        Store(tmp_path)


def test_a_value_that_is_not_finite_is_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="not a finite number"):
        store.record("a", value=float("nan"))
    assert store.history() == []
    store.close()
