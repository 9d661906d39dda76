"""The registry on real SQLite and real files: publishing once, going back, noticing damage, two writers at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.data.catalog import ItemCatalog
from fedrec.errors import CorruptRelease, RegistryError
from fedrec.params import digest
from fedrec.server import registry as module
from fedrec.server.files import temporary
from fedrec.server.registry import Registry
from fedrec.server.release import Manifest, Release


def catalog(n_items: int = 3) -> ItemCatalog:
    ids = tuple(f"i{n}" for n in range(n_items))
    return ItemCatalog(ids, tuple(f"Tïtle {n}" for n in ids), (("drama",),) * n_items, np.arange(n_items) * 10)


def params(seed: int = 0) -> dict[str, np.ndarray]:
    wide = np.random.Generator(np.random.Philox(seed)).normal(size=(3, 8)).astype(np.float32)
    return {"item": wide[:, ::2], "scale": np.asarray(np.float32(seed)), "count": np.arange(3)}


def publish(registry: Registry, slice: int = 0, run: str = "a", **changes: Any) -> Release:
    content: dict[str, Any] = {
        "run": run,
        "slice": slice,
        "parent": None,
        "model": {"kind": "mf", "width": 4},
        "experiment": {"seed": 1, "name": "t"},
        "experiment_digest": "e" * 64,
        "metrics": {"release": {"all": {"n": 2, "metrics": {}}}},
        "privacy": {"mode": "central", "epsilon": 1.0},
    }
    tensors = changes.pop("params", params(slice))
    items = changes.pop("catalog", catalog(3 + slice))
    return registry.publish(tensors, items, **(content | changes))


def current(registry: Registry) -> list[int]:
    return [row.version for row in registry.list() if row.current]


def tree(root: Path) -> dict[str, bytes]:
    """Return all files but SQLite's, by their path under `root`."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith("registry.sqlite")}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry", now=lambda: 1_000)


# Publishing and loading


def test_a_release_comes_back_exactly(registry: Registry) -> None:
    published = publish(registry, slice=4, params=params(5))
    loaded = registry.load()
    assert published.version == loaded.version == 1
    assert loaded.manifest == published.manifest
    assert loaded.params.keys() == params(5).keys()
    for name, value in params(5).items():
        assert (loaded.params[name].dtype, loaded.params[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(loaded.params[name], value)
    assert loaded.catalog.titles == catalog(7).titles
    assert loaded.manifest.n_items == 7
    assert loaded.manifest.params_digest == digest(params(5))
    assert loaded.manifest.catalog_digest == catalog(7).digest()


def test_the_files_lie_where_the_readme_says_and_hold_no_temporary_ones(registry: Registry) -> None:
    publish(registry)
    publish(registry, 1)
    assert sorted(tree(registry.root)) == sorted(
        [
            f"catalogs/{catalog(3).digest()}.json",
            f"catalogs/{catalog(4).digest()}.json",
            "releases/0001/manifest.json",
            "releases/0001/model.safetensors",
            "releases/0002/manifest.json",
            "releases/0002/model.safetensors",
        ]
    )


def test_a_catalogue_is_written_once(registry: Registry) -> None:
    publish(registry, catalog=catalog(5))
    path = registry.root / "catalogs" / f"{catalog(5).digest()}.json"
    before = path.stat()
    publish(registry, 1, catalog=catalog(5))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_time_of_day_is_in_no_file_but_in_the_list(tmp_path: Path) -> None:
    early, late = Registry(tmp_path / "early", now=lambda: 1), Registry(tmp_path / "late", now=lambda: 2_000_000_000)
    for registry in (early, late):
        publish(registry)
        publish(registry, 1, parent=1)
    assert tree(early.root) == tree(late.root)
    assert [row.created_at for row in late.list()] == [2_000_000_000] * 2


def test_the_order_of_names_does_not_change_the_bytes(tmp_path: Path) -> None:
    one, two = Registry(tmp_path / "one"), Registry(tmp_path / "two")
    publish(one, model={"a": 1, "b": {"c": 2, "d": 3}})
    publish(two, model={"b": {"d": 3, "c": 2}, "a": 1}, params=dict(reversed(params().items())))
    assert tree(one.root) == tree(two.root)


def test_a_manifest_is_plain_json_even_of_numpy_numbers_and_nan(registry: Registry) -> None:
    metrics = {"x": np.float32(0.5), "n": np.int64(3), "none": float("nan"), "inf": np.inf, "pair": (1, 2), 7: np.True_}
    published = publish(registry, metrics=metrics)
    plain = {"x": 0.5, "n": 3, "none": None, "inf": None, "pair": [1, 2], "7": True}
    assert published.manifest.metrics == plain == registry.manifest().metrics
    text = (registry.root / "releases" / "0001" / "manifest.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail)["metrics"] == plain


def test_latest_is_the_promoted_one_and_newest_the_highest_number(registry: Registry) -> None:
    for slice in range(3):
        publish(registry, slice, promote=slice < 2)
    assert registry.load().version == registry.load("latest").version == 2
    assert registry.load("newest").version == 3
    assert registry.load(1).version == registry.load("1").version == 1
    assert [(row.promoted, row.current) for row in registry.list()] == [(True, False), (True, True), (False, False)]


def test_lineage_goes_back_to_the_first(registry: Registry) -> None:
    publish(registry, 0)
    publish(registry, 0, run="b")
    publish(registry, 1, parent=1)
    publish(registry, 2, parent=3)
    assert [row.version for row in registry.lineage()] == [4, 3, 1]
    assert [row.run for row in registry.lineage(2)] == ["b"]


@pytest.mark.parametrize("parent", [0, -1, 2, 9])
def test_an_unknown_parent_is_refused(registry: Registry, parent: int) -> None:
    publish(registry)
    with pytest.raises(
        RegistryError, match=rf"slice 1 of run 'a': its parent, release {parent}, is not in the registry"
    ):
        publish(registry, 1, parent=parent)
    assert len(registry.list()) == 1


# Publishing again


def test_publishing_again_changes_nothing(registry: Registry) -> None:
    first = publish(registry)
    publish(registry, 1)
    before = tree(registry.root)
    again = publish(registry)
    assert (again.version, again.manifest) == (1, first.manifest)
    assert tree(registry.root) == before
    assert current(registry) == [2]
    assert len(registry.list()) == 2


def test_publishing_again_does_not_undo_a_rollback(registry: Registry) -> None:
    publish(registry)
    publish(registry, 1)
    registry.rollback()
    publish(registry, 1)
    assert current(registry) == [1]


def test_publishing_again_promotes_what_never_was(registry: Registry) -> None:
    publish(registry)
    publish(registry, 1, promote=False)
    publish(registry, 1)
    assert current(registry) == [2]


@pytest.mark.parametrize(
    "changes",
    [
        {"params": params(9)},
        {"catalog": catalog(9)},
        {"metrics": {"x": 1}},
        {"privacy": {}},
        {"model": {}},
        {"experiment_digest": "f" * 64},
        {"parent": 1},
    ],
)
def test_other_content_for_the_same_slice_is_refused(registry: Registry, changes: dict[str, Any]) -> None:
    publish(registry)
    before = tree(registry.root)
    sentence = "Slice 0 of run 'a' is already published as release 1 with other content; give the new run another name."
    with pytest.raises(RegistryError) as caught:
        publish(registry, **changes)
    assert str(caught.value) == sentence
    assert tree(registry.root) == before


@pytest.mark.parametrize("damage", ["model", "manifest", "folder", "catalog", "truncated"])
def test_publishing_again_mends_what_is_missing(registry: Registry, damage: str) -> None:
    publish(registry)
    before = tree(registry.root)
    folder = registry.root / "releases" / "0001"
    if damage == "folder":
        shutil.rmtree(folder)
    elif damage == "catalog":
        shutil.rmtree(registry.root / "catalogs")
    elif damage == "truncated":
        (folder / "model.safetensors").write_bytes(b"half")
    else:
        (folder / {"model": "model.safetensors", "manifest": "manifest.json"}[damage]).unlink()
    assert registry.verify()
    publish(registry)
    assert tree(registry.root) == before
    assert registry.verify() == []


class Killed(BaseException):
    """Stands for a kill where no line of the registry's own may run afterwards but its clean-up."""


def test_a_crash_between_the_files_and_the_list(tmp_path: Path) -> None:
    def die() -> int:
        raise Killed

    registry = Registry(tmp_path / "r", now=lambda: 1)
    publish(registry)
    with pytest.raises(Killed):
        publish(Registry(tmp_path / "r", now=die), 1)
    assert (tmp_path / "r" / "releases" / "0002" / "manifest.json").is_file()
    assert [row.version for row in registry.list()] == [1]
    assert registry.verify() == []

    assert publish(registry, 0, run="b").version == 2  # another run takes the number and the folder
    assert publish(registry, 1).version == 3
    assert registry.load(2).manifest.run == "b"
    assert registry.verify() == []


def test_a_crash_between_the_files_and_the_list_then_the_same_again(tmp_path: Path) -> None:
    def die() -> int:
        raise Killed

    with pytest.raises(Killed):
        publish(Registry(tmp_path / "r", now=die))
    left = tree(tmp_path / "r")
    registry = Registry(tmp_path / "r", now=lambda: 1)
    with pytest.raises(RegistryError, match="holds no release yet; run `fedrec simulate` first"):
        registry.load()
    assert publish(registry).version == 1
    assert tree(tmp_path / "r") == left


def test_leftovers_of_killed_writers_are_swept(registry: Registry) -> None:
    publish(registry)
    before = tree(registry.root)
    folder = registry.root / "releases" / "0001"
    for path in (registry.root / "releases" / "0002", registry.root / "catalogs" / "x.json", folder / "manifest.json"):
        left = temporary(path)
        left.mkdir()
        (left / "half").write_bytes(b"half")
    (registry.root / "catalogs" / "notes.txt").write_text("mine")
    registry.prepare()
    assert tree(registry.root) == before | {"catalogs/notes.txt": b"mine"}


# Going back


def test_rollback_goes_back_step_by_step(registry: Registry) -> None:
    for slice in range(3):
        publish(registry, slice)
    assert (registry.rollback(), current(registry)) == (2, [2])
    assert (registry.rollback(), current(registry)) == (1, [1])
    with pytest.raises(
        RegistryError, match=r"Cannot roll back in '.*': no release was promoted before the current one"
    ):
        registry.rollback()
    assert current(registry) == [1]
    assert publish(registry, 3).version == 4
    assert (registry.rollback(), current(registry)) == (1, [1])
    assert registry.verify() == []


def test_promote_and_rollback(registry: Registry) -> None:
    for slice in range(3):
        publish(registry, slice)
    assert registry.promote(1) == 1
    assert registry.promote("1") == 1  # already current: not a second step
    assert registry.rollback() == 3
    assert registry.promote("newest") == 3
    assert registry.rollback() == 2
    assert registry.verify() == []


def test_history_is_only_ever_added_to(registry: Registry) -> None:
    for slice in range(2):
        publish(registry, slice)
    registry.rollback()
    with sqlite3.connect(registry.root / "registry.sqlite") as db:
        rows = db.execute("SELECT action, version, at FROM history ORDER BY step").fetchall()
    db.close()
    assert rows == [("promote", 1, 1_000), ("promote", 2, 1_000), ("rollback", 1, 1_000)]


@pytest.mark.parametrize("verb", ["promote", "rollback"])
def test_a_damaged_release_never_becomes_current(registry: Registry, verb: str) -> None:
    publish(registry)
    publish(registry, 1)
    (registry.root / "releases" / "0001" / "model.safetensors").unlink()
    with pytest.raises(CorruptRelease, match="Release 1 is damaged"):
        registry.promote(1) if verb == "promote" else registry.rollback()
    assert current(registry) == [2]


# Mistakes


@pytest.mark.parametrize(
    "act",
    [
        Registry.list,
        Registry.load,
        Registry.verify,
        Registry.rollback,
        Registry.lineage,
        Registry.manifest,
        lambda registry: registry.promote(1),
    ],
)
def test_no_registry(registry: Registry, act: Callable[[Registry], object]) -> None:
    with pytest.raises(RegistryError) as caught:
        act(registry)
    assert str(caught.value) == f"No registry at '{registry.root}'; run `fedrec simulate` first or pass --registry."
    assert not registry.root.exists()


def test_a_creation_that_was_cut_short_is_no_registry_and_can_be_finished(registry: Registry) -> None:
    registry.root.mkdir()
    (registry.root / "registry.sqlite").write_bytes(b"")
    with pytest.raises(RegistryError, match="No registry at"):
        registry.list()
    publish(registry)
    assert registry.verify() == []


@pytest.mark.parametrize("version", [0, 4, -1, "7", "lates", "01", ""])
def test_an_unknown_version(registry: Registry, version: int | str) -> None:
    for slice in range(3):
        publish(registry, slice, promote=slice < 2)
    with pytest.raises(RegistryError) as caught:
        registry.load(version)
    root = registry.root
    assert str(caught.value) == f"No release '{version}' in '{root}': there is 1 to 3, 'latest' (2) and 'newest'."


def test_an_unknown_version_where_there_is_one(registry: Registry) -> None:
    publish(registry, promote=False)
    with pytest.raises(RegistryError, match=r"No release '2' in '.*': there is only release 1, 'newest'\."):
        registry.promote(2)


def test_nothing_promoted(registry: Registry) -> None:
    publish(registry, promote=False)
    with pytest.raises(RegistryError, match=r"No release is promoted in '.*'; choose one .* `fedrec releases promote"):
        registry.load()
    assert registry.load("newest").version == 1
    assert registry.verify() == []


def test_nothing_published(registry: Registry) -> None:
    registry.prepare()
    assert registry.list() == []
    assert registry.verify() == []
    with pytest.raises(RegistryError, match="holds no release yet; run `fedrec simulate` first"):
        registry.load()
    with pytest.raises(RegistryError, match="Cannot roll back"):
        registry.rollback()


# Damage


def drop_half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def change_a_byte(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def empty(data: bytes) -> bytes:
    return b""


def as_list(data: bytes) -> bytes:
    return b"[1, 2]"


def binary(data: bytes) -> bytes:
    return b"\xff\xfe"


def one_path(registry: Registry, name: str) -> Path:
    if name == "catalog":
        return registry.root / "catalogs" / f"{catalog(3).digest()}.json"
    return registry.root / "releases" / "0001" / name


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "catalog"])
@pytest.mark.parametrize("harm", [drop_half, change_a_byte, empty, as_list, binary])
def test_a_damaged_file_is_named_and_the_others_still_load(
    registry: Registry, name: str, harm: Callable[[bytes], bytes]
) -> None:
    publish(registry)
    publish(registry, 1)
    path = one_path(registry, name)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(CorruptRelease) as caught:
        registry.load(1)
    text = str(caught.value)
    assert text.startswith(f"Release 1 is damaged: '{path}' ")
    assert text.endswith(
        "; restore that file from a backup, or serve another release with `fedrec releases rollback` or "
        "`promote VERSION`."
    )
    assert registry.verify() == [text]
    assert registry.load().version == 2


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "catalog"])
def test_a_missing_file(registry: Registry, name: str) -> None:
    publish(registry)
    one_path(registry, name).unlink()
    with pytest.raises(CorruptRelease, match=rf"Release 1 is damaged: '.*{one_path(registry, name).name}' is missing"):
        registry.load()


def test_changed_bytes_are_noticed_wherever_they_are(registry: Registry) -> None:
    publish(registry)
    for name in ("model.safetensors", "manifest.json", "catalog"):
        path = one_path(registry, name)
        good = path.read_bytes()
        for place in range(0, len(good), 23):
            path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
            with pytest.raises(CorruptRelease):
                registry.load()
        path.write_bytes(good)
    assert registry.verify() == []


def test_a_flattering_manifest_is_not_believed(registry: Registry) -> None:
    publish(registry, metrics={"ndcg": 0.1})
    path = one_path(registry, "manifest.json")
    path.write_bytes(Manifest(**(json.loads(path.read_bytes()) | {"metrics": {"ndcg": 0.9}})).to_bytes())
    with pytest.raises(CorruptRelease, match=r"manifest\.json' does not match its SHA-256"):
        registry.manifest()


def test_a_manifest_of_another_format_says_so(registry: Registry) -> None:
    publish(registry)
    path = one_path(registry, "manifest.json")
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(CorruptRelease, match="is not a manifest that this fedrec can read"):
        registry.load()


def test_a_list_that_is_no_database(registry: Registry) -> None:
    publish(registry)
    (registry.root / "registry.sqlite").write_bytes(b"not a database at all" * 50)
    with pytest.raises(
        RegistryError, match=r"The list of releases '.*sqlite' cannot be opened \(file is not a database"
    ):
        registry.list()


def test_a_registry_of_a_newer_fedrec(registry: Registry) -> None:
    publish(registry)
    db = sqlite3.connect(registry.root / "registry.sqlite")
    db.execute("PRAGMA user_version = 2")
    db.close()
    for act in (registry.list, registry.prepare):
        with pytest.raises(RegistryError, match="has layout 2, this fedrec reads 1; update"):
            act()


def test_verify_sees_a_pointer_that_points_elsewhere(registry: Registry) -> None:
    publish(registry)
    publish(registry, 1)
    db = sqlite3.connect(registry.root / "registry.sqlite", isolation_level=None)
    db.execute("UPDATE current SET version = 1")
    (problem,) = registry.verify()
    assert "the current release and the history disagree" in problem
    db.execute("UPDATE current SET version = 7")
    problems = registry.verify()
    db.close()
    assert any("of table current names a release that is not there" in problem for problem in problems)


# Disks that refuse


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 192 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_runs_full_while_publishing(tiny_disk: Path) -> None:
    registry = Registry(tiny_disk / "r", now=lambda: 1)
    wide = {"w": np.ones(5_000, np.float32)}

    def fill() -> None:
        for slice in range(20):
            publish(registry, slice, params=wide, catalog=catalog(3))

    with pytest.raises(RegistryError, match="The disk is full: cannot write"):
        fill()
    n_published = len(registry.list())
    assert 1 < n_published < 20
    assert registry.verify() == []
    assert registry.load().version == n_published
    assert not list(registry.root.rglob("*.fedrec-tmp"))

    subprocess.run(["mount", "-o", "remount,size=1m", tiny_disk], check=True)
    assert publish(registry, n_published, params=wide, catalog=catalog(3)).version == n_published + 1
    assert registry.verify() == []


def test_a_disk_with_room_for_nothing_more_than_the_files(tiny_disk: Path) -> None:
    registry = Registry(tiny_disk / "r", now=lambda: 1)
    publish(registry)
    publish(registry, 1)
    with (tiny_disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while True:
            ballast.write(bytes(1024))
    with pytest.raises(RegistryError, match=r"The disk is full: cannot write '.*registry\.sqlite'"):
        registry.rollback()
    (tiny_disk / "ballast").unlink()
    assert registry.verify() == []
    assert current(registry) == [2]


def test_a_read_only_registry_serves_and_says_why_it_cannot_change(tiny_disk: Path) -> None:
    registry = Registry(tiny_disk / "r", now=lambda: 1)
    publish(registry)
    publish(registry, 1)
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    assert registry.load().version == 2
    assert registry.verify() == []
    for act in (registry.rollback, registry.prepare, lambda: publish(registry, 2)):
        with pytest.raises(RegistryError, match=r"No permission to write '.*registry\.sqlite'"):
            act()
    with pytest.raises(RegistryError, match=r"No permission to write '.*new'"):
        Registry(tiny_disk / "new").prepare()


def test_a_write_that_the_system_refuses_publishes_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry)

    def refuse(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = tree(registry.root)
    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(RegistryError, match="The disk is full"):
        publish(registry, 1, catalog=catalog(3))
    monkeypatch.undo()
    assert tree(registry.root) == before
    assert publish(registry, 1).version == 2


# Several at a time


def test_a_registry_that_another_process_keeps_locked(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry)
    monkeypatch.setattr(module, "BUSY_SECONDS", 0.05)
    db = sqlite3.connect(registry.root / "registry.sqlite", isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    with pytest.raises(RegistryError, match=r"Another process has kept '.*' locked for 0 seconds; wait for it"):
        publish(registry, 1)
    assert registry.load().version == 1  # readers do not wait for a writer
    db.close()
    assert publish(registry, 1).version == 2


def test_a_second_writer_waits_for_the_first(tmp_path: Path) -> None:
    inside = threading.Event()

    def slow_clock() -> int:  # asked while the first writer is between its files and the list
        inside.set()
        time.sleep(0.1)
        return 1

    first = threading.Thread(target=publish, args=(Registry(tmp_path / "r", now=slow_clock),))
    first.start()
    assert inside.wait(30)
    registry = Registry(tmp_path / "r", now=lambda: 2)
    assert publish(registry, run="b").version == 2
    first.join()
    assert [(row.run, row.created_at) for row in registry.list()] == [("a", 1), ("b", 2)]


WRITER = """
import sys
from pathlib import Path
import numpy as np
from fedrec.data.catalog import ItemCatalog
from fedrec.server.registry import Registry

root, run = Path(sys.argv[1]), sys.argv[2]
items = ItemCatalog(("i",), ("t",), ((),), np.zeros(1, np.int64))
print("ready", flush=True)
sys.stdin.readline()
for slice in range(8):
    for name in (run, "shared"):
        Registry(root).publish({"w": np.full(5_000, slice)}, items, run=name, slice=slice, parent=None, model={},
                               experiment={}, experiment_digest="", metrics={}, privacy={})
"""


def test_two_processes_publish_at_once(tmp_path: Path) -> None:
    root = tmp_path / "r"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, root, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for run in ("a", "b")
    ]
    for writer in writers:  # both start on a registry that does not exist yet, at the same moment
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.communicate("go\n", timeout=60)
    assert [writer.returncode for writer in writers] == [0, 0]
    registry = Registry(root)
    rows = registry.list()
    assert [row.version for row in rows] == list(range(1, 25))
    assert {(row.run, row.slice) for row in rows} == {(r, s) for r in ("a", "b", "shared") for s in range(8)}
    assert registry.verify() == []


def test_threads_read_while_another_publishes(registry: Registry) -> None:
    publish(registry)
    seen: list[int] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                seen.append(registry.load().version)
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for slice in range(1, 6):
        publish(registry, slice)
    done.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert set(seen) <= set(range(1, 7))
    assert len(seen) >= 2
