"""Shelves: what was kept comes back bit for bit or not at all, and they never hold more than their bound."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from fedrec.client.shelf import FolderShelf, MemoryShelf, Shelf, stocked
from fedrec.errors import ProtocolError


def parcel(n: int, size: int = 100) -> tuple[str, bytes]:
    data = bytes([n]) * size
    return hashlib.sha256(data).hexdigest(), data


@pytest.fixture(params=["memory", "folder"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    return MemoryShelf(350) if request.param == "memory" else FolderShelf(tmp_path / "tensors", 350)


def aged(shelf: Shelf) -> None:
    """Let time pass for files whose times are too coarse to tell what came first."""
    if isinstance(shelf, FolderShelf):
        for path in shelf.folder.iterdir():
            stat = path.stat()
            os.utime(path, (stat.st_atime - 10, stat.st_mtime - 10))


def test_what_was_used_longest_ago_makes_room(shelf: Shelf) -> None:
    for n in range(3):
        shelf.keep(*parcel(n))
        aged(shelf)
    assert shelf.get(parcel(0)[0]) == parcel(0)[1]
    aged(shelf)
    shelf.keep(*parcel(3))
    assert [shelf.get(parcel(n)[0]) is not None for n in range(4)] == [True, False, True, True]


def test_what_is_kept_twice_counts_once_and_what_is_too_large_is_not_kept(shelf: Shelf) -> None:
    for _ in range(5):
        shelf.keep(*parcel(0))
    shelf.keep(*parcel(1))
    shelf.keep(*parcel(2, 351))
    assert [shelf.get(parcel(n)[0]) for n in (0, 1)] == [parcel(0)[1], parcel(1)[1]]
    assert shelf.get(parcel(2, 351)[0]) is None
    assert shelf.get("0" * 64) is None


def test_a_shelf_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    for empty in (MemoryShelf(0), FolderShelf(tmp_path / "tensors", 0)):
        empty.keep(*parcel(1))
        assert empty.get(parcel(1)[0]) is None


def test_files_outlive_the_process_and_one_that_the_disk_changed_is_removed(tmp_path: Path) -> None:
    first = FolderShelf(tmp_path / "tensors")
    for n in range(2):
        first.keep(*parcel(n))
    again = FolderShelf(tmp_path / "tensors")
    assert again.get(parcel(0)[0]) == parcel(0)[1]
    path = tmp_path / "tensors" / parcel(1)[0]
    path.write_bytes(b"x" + parcel(1)[1][1:])
    assert again.get(parcel(1)[0]) is None
    assert not path.exists()


def test_what_a_crash_left_half_written_is_never_read_and_makes_room_like_all_else(tmp_path: Path) -> None:
    shelf = FolderShelf(tmp_path / "tensors", 350)
    shelf.keep(*parcel(0))
    (shelf.folder / ".part0").write_bytes(b"x" * 300)
    aged(shelf)
    os.utime(shelf.folder / ".part0", (1, 1))
    shelf.keep(*parcel(1))
    assert {path.name for path in shelf.folder.iterdir()} == {parcel(0)[0], parcel(1)[0]}


def test_what_is_in_use_stays_whatever_the_bound(tmp_path: Path) -> None:
    shelf = FolderShelf(tmp_path / "tensors", 150)
    used = {parcel(n)[0] for n in range(3)}
    for n in range(3):
        shelf.keep(*parcel(n), spare=used)
    assert {path.name for path in shelf.folder.iterdir()} == used
    shelf.keep(*parcel(4))
    assert {path.name for path in shelf.folder.iterdir()} == {parcel(4)[0]}


def test_a_full_disk_costs_no_more_than_a_download(tmp_path: Path) -> None:
    (tmp_path / "tensors").write_text("not a folder")
    shelf = FolderShelf(tmp_path / "tensors")
    held = stocked(shelf, dict([parcel(1)]))
    assert held(parcel(1)[0]) == parcel(1)[1]
    assert shelf.get(parcel(1)[0]) is None


def test_wrong_bytes_are_neither_used_nor_kept(shelf: Shelf) -> None:
    sha256, data = parcel(1)
    with pytest.raises(ProtocolError, match="it was changed, so it is neither used nor kept"):
        stocked(shelf, {sha256: data + b"!"})
    assert shelf.get(sha256) is None
