"""A writer that is killed, at random moments and before each of its system calls, never leaves a broken registry."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedrec.server.registry import Registry

CONTENT = """
import sys
from pathlib import Path
import numpy as np
from fedrec.data.catalog import ItemCatalog
from fedrec.server.registry import Registry

def publish(registry, slice):
    items = ItemCatalog(tuple(str(n) for n in range(50 + slice)), ("t",) * (50 + slice), ((),) * (50 + slice),
                        np.arange(50 + slice))
    return registry.publish({"w": np.full(20_000, slice, np.float32)}, items, run="a", slice=slice,
                            parent=slice or None, model={}, experiment={}, experiment_digest="", metrics={}, privacy={})
"""

LOOP = f"""{CONTENT}
registry = Registry(Path(sys.argv[1]))
registry.prepare()
slice = len(registry.list())
print("ready", flush=True)
while True:
    publish(registry, slice)
    slice += 1
    print("published", flush=True)
"""

ONCE = f"""{CONTENT}
registry = Registry(Path(sys.argv[1]))
for slice in range(int(sys.argv[2])):
    publish(registry, slice)
"""

# Kills a forked writer before its n-th call that changes the disk, for n = 1, 2, ... until it gets through.
EACH_CALL = f"""{CONTENT}
import os, shutil, sqlite3, signal

root = Path(sys.argv[1])

def writer(target, n):
    left = n
    def dying(real):
        def call(*args, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)
        return call
    for name in ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink"):
        setattr(os, name, dying(getattr(os, name)))
    sqlite3_connect = sqlite3.connect
    class Dying(sqlite3.Connection):
        execute = dying(sqlite3.Connection.execute)
    sqlite3.connect = lambda *args, **options: sqlite3_connect(*args, factory=Dying, **options)
    publish(Registry(target), 0)
    publish(Registry(target), 1)
    os._exit(0)

status, n = 1, 0
while status:
    n += 1
    target = root / f"killed-{{n}}"
    child = os.fork()
    if child == 0:
        writer(target, n)
    status = os.waitpid(child, 0)[1]
    if (target / "registry.sqlite").exists() and (target / "registry.sqlite").stat().st_size:
        registry = Registry(target)
        rows = registry.list()
        assert registry.verify() == [], (n, registry.verify())
        assert [row.version for row in rows if row.current] == [row.version for row in rows][-1:], n
        for row in rows:
            registry.load(row.version)
    for slice in range(2):
        publish(Registry(target), slice)
    print(target.name, flush=True)
"""


def tree(root: Path) -> dict[str, bytes]:
    """Return all files but SQLite's, by their path under `root`."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("registry.sqlite")}


def uninterrupted(root: Path, n_slices: int) -> dict[str, bytes]:
    subprocess.run([sys.executable, "-c", ONCE, root, str(n_slices)], check=True)
    return tree(root)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    root = tmp_path / "killed"
    moments = random.Random(7)
    end = time.monotonic() + 10
    n_kills = n_releases = 0
    while time.monotonic() < end or (min(n_kills, n_releases) < 5 and time.monotonic() < end + 60):
        writer = subprocess.Popen([sys.executable, "-c", LOOP, root], stdout=subprocess.PIPE, text=True)
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
        for _ in range(moments.randrange(3)):  # counted, not timed: a busy machine gets ahead too
            assert writer.stdout.readline() == "published\n"
        time.sleep(moments.uniform(0, 0.04))
        writer.kill()
        writer.communicate()
        n_kills += 1

        registry = Registry(root)
        rows = registry.list()
        assert registry.verify() == []
        assert [row.version for row in rows] == list(range(1, len(rows) + 1))
        assert len(rows) >= n_releases
        assert [row.version for row in rows if row.current] == [len(rows)][: len(rows)]
        n_releases = len(rows)
    assert n_kills >= 5
    assert n_releases >= 5
    subprocess.run([sys.executable, "-c", ONCE, root, str(n_releases + 1)], check=True)
    assert tree(root) == uninterrupted(tmp_path / "whole", n_releases + 1)


@pytest.mark.slow
def test_killed_before_each_call_that_changes_the_disk(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", EACH_CALL, tmp_path], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    names = result.stdout.split()
    assert len(names) > 40
    whole = uninterrupted(tmp_path / "whole", 2)
    for name in names:
        assert tree(tmp_path / name) == whole, name
