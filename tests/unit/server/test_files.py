"""Atomic files, their refusals in plain words, and the checkpoint."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedrec.errors import OtherVersion, RegistryError
from fedrec.params import digest
from fedrec.protocol import wire
from fedrec.server import files
from fedrec.server.files import (
    load_checkpoint,
    load_last_good,
    make_folder,
    previous,
    publish_folder,
    save_checkpoint,
    sweep,
    write_atomically,
)

HEADER = {"round": 7, "ledger": [{"q": 0.1, "sigma": 2.0}], "slices": {"10": 1, "2": 2}}


def tensors() -> dict[str, np.ndarray]:
    return {"item": np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2], "step": np.array([3], np.int64)}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_write_makes_and_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_written_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "ours", b"x")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    write_atomically(tmp_path / "a", bytes(range(100)))
    assert (tmp_path / "a").read_bytes() == bytes(range(100))


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(fd: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    def seen_replace(a: Path, b: Path) -> None:
        steps.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write_atomically(tmp_path / "a", b"x")
    assert steps == ["file", "rename", "folder"]


SENTENCES = [
    (errno.ENOSPC, r"The disk is full: cannot write '.*a'; free some space there, then run again\."),
    (errno.EDQUOT, r"The disk is full: cannot write '.*a'; free some space there, then run again\."),
    (errno.EROFS, r"No permission to write '.*a' \(.*\); change the permissions or choose another folder\."),
    (errno.EACCES, r"No permission to write '.*a' \(.*\); change the permissions or choose another folder\."),
    (errno.EPERM, r"No permission to write '.*a' \(.*\); change the permissions or choose another folder\."),
    (errno.EIO, r"Cannot write '.*a' \(.*\); check the path and the disk, then run again\."),
]


@pytest.mark.parametrize(("number", "sentence"), SENTENCES)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_refused_write_says_why_and_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str, call: str
) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"old")

    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(RegistryError) as caught:
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert re.fullmatch(sentence, str(caught.value))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"old"


def test_an_interrupt_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", b"x")
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tiny_disk: Path) -> None:
    write_atomically(tiny_disk / "a", b"old")
    with pytest.raises(RegistryError, match=r"The disk is full: cannot write '.*a'"):
        write_atomically(tiny_disk / "a", bytes(100_000))
    assert [p.name for p in tiny_disk.iterdir()] == ["a"]
    assert (tiny_disk / "a").read_bytes() == b"old"


def test_a_read_only_disk(tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(RegistryError, match=r"No permission to write '.*a' \(Read-only file system\)"):
        write_atomically(tiny_disk / "a", b"x")
    with pytest.raises(RegistryError, match=r"No permission to write '.*folder' \(Read-only file system\)"):
        make_folder(tiny_disk / "folder")


def test_a_missing_folder_and_a_file_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"Cannot write '.*a' \(No such file or directory\)"):
        write_atomically(tmp_path / "none" / "a", b"x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RegistryError, match=r"Cannot write '.*file/sub' \(Not a directory\)"):
        make_folder(tmp_path / "file" / "sub")
    with pytest.raises(RegistryError, match=r"Cannot write '.*file' \(File exists\)"):
        make_folder(tmp_path / "file")


def test_make_folder_makes_the_folders_above_and_may_be_repeated(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_publish_folder_renames_and_never_replaces_content(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    publish_folder(tmp_path / "one", tmp_path / "final")
    assert (tmp_path / "final" / "f").read_text() == "one"
    with pytest.raises(RegistryError, match=r"Cannot write '.*final' \(Directory not empty\)"):
        publish_folder(tmp_path / "two", tmp_path / "final")
    assert (tmp_path / "final" / "f").read_text() == "one"
    assert (tmp_path / "two" / "f").read_text() == "two"


def test_place_folder_shows_nothing_until_all_files_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    real = files.write_atomically

    def watched(path: Path, data: bytes) -> None:
        if len(written) == 2:
            raise RegistryError("stop")
        assert not (tmp_path / "r").exists()
        real(path, data)
        written.append(path.name)

    monkeypatch.setattr(files, "write_atomically", watched)
    with pytest.raises(RegistryError, match="stop"):
        files.place_folder(tmp_path / "r", {"a": b"1", "b": b"2", "c": b"3"})
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    files.place_folder(tmp_path / "r", {"a": b"1", "b": b"2"})
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()} == {"a": b"1", "b": b"2"}


def test_sweep_removes_our_temporary_names_and_nothing_else(tmp_path: Path) -> None:
    mine, other = files.temporary(tmp_path / "state"), files.temporary(tmp_path / "else")
    mine.write_bytes(b"half")
    other.mkdir()
    (other / "inside").write_bytes(b"half")
    keep = [".state.fedrec-tmp", ".state.0123.fedrec-tmp", "state", ".hidden", "state.0123456789abcdef.fedrec-tmp"]
    for name in keep:
        (tmp_path / name).write_bytes(b"")
    sweep(tmp_path, "state")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*keep, other.name])
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(keep)
    sweep(tmp_path / "absent")


def test_sweep_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "f").write_bytes(b"x")
    link = files.temporary(tmp_path / "a")
    link.symlink_to(tmp_path / "precious")
    sweep(tmp_path)
    assert not link.is_symlink()
    assert (tmp_path / "precious" / "f").exists()


def test_read_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert files.read_file(tmp_path / "a") == b"x"
    assert files.read_file(tmp_path / "b") is None
    assert files.read_file(tmp_path / "a" / "b") is None
    with pytest.raises(
        RegistryError, match=r"Cannot read '.*' \(Is a directory\); check its permissions and the disk\."
    ):
        files.read_file(tmp_path)


def test_a_checkpoint_comes_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "state.fedrec"
    save_checkpoint(path, HEADER, tensors())
    header, found = load_checkpoint(path)
    assert header == HEADER
    assert {name: (v.dtype, v.tolist()) for name, v in found.items()} == {
        name: (v.dtype, v.tolist()) for name, v in tensors().items()
    }


def test_equal_checkpoints_have_equal_bytes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", HEADER, tensors())
    save_checkpoint(tmp_path / "b", dict(reversed(HEADER.items())), dict(reversed(tensors().items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_checkpoint_without_tensors_and_with_whole_number_keys(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", {"seen": {2: "x", 10: "y"}}, {})
    assert load_checkpoint(tmp_path / "a") == ({"seen": {"2": "x", "10": "y"}}, {})


def test_a_failed_save_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    save_checkpoint(path, {"round": 1}, tensors())

    def refuse(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(RegistryError, match="The disk is full"):
        save_checkpoint(path, {"round": 2}, tensors())
    assert load_checkpoint(path)[0] == {"round": 1}


def test_saving_sweeps_what_a_killed_writer_of_this_checkpoint_left(tmp_path: Path) -> None:
    mine, other = files.temporary(tmp_path / "state"), files.temporary(tmp_path / "report")
    mine.write_bytes(b"half")
    other.write_bytes(b"another process at work")
    save_checkpoint(tmp_path / "state", {}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["state", other.name])


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"No checkpoint at '.*state'; start the run anew or give the folder"):
        load_checkpoint(tmp_path / "state")


DAMAGED = (
    r"The checkpoint '.*state' is (damaged; restore it from a backup|of another version of fedrec; go on .*), or delete"
)


def test_every_changed_byte_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_checkpoint(path, HEADER, tensors())
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(RegistryError, match=DAMAGED):
            load_checkpoint(path)


def test_every_truncation_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_checkpoint(path, HEADER, tensors())
    good = path.read_bytes()
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(RegistryError, match=DAMAGED):
            load_checkpoint(path)


@pytest.mark.parametrize("header", [{}, {"header": "{}"}, {"header": 3, "digest": "x"}, [1]])
def test_a_document_that_is_no_sealed_checkpoint(tmp_path: Path, header: object) -> None:
    (tmp_path / "state").write_bytes(wire.pack("checkpoint", header, {}))  # type: ignore[arg-type]
    with pytest.raises(RegistryError, match=DAMAGED):
        load_checkpoint(tmp_path / "state")


def test_a_document_of_another_kind_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(wire.pack("plan", {}, {}))
    with pytest.raises(RegistryError, match=DAMAGED):
        load_checkpoint(tmp_path / "state")


def test_a_checkpoint_of_another_version_is_told_from_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    with monkeypatch.context() as older:
        older.setattr(wire, "VERSION", 1)
        save_checkpoint(path, HEADER, tensors())
        save_checkpoint(path, HEADER, tensors())
    with pytest.raises(OtherVersion, match="is of another version of fedrec; go on with the fedrec that began the run"):
        load_last_good(path)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for number in range(3):
        save_checkpoint(path, {"round": number}, tensors())
    assert load_last_good(path)[0::2] == ({"round": 2}, None)
    whole = path.read_bytes()
    for bad in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(bad)
        header, found, note = load_last_good(path)
        assert header == {"round": 1}
        assert digest(found) == digest(tensors())
        assert note == f"The checkpoint '{path}' is damaged; the run goes on from the one before it."
    previous(path).write_bytes(b"?")
    with pytest.raises(RegistryError, match=DAMAGED):
        load_last_good(path)
    path.unlink()
    with pytest.raises(RegistryError, match="No checkpoint at"):  # who deletes it begins anew
        load_last_good(path)


def test_the_one_before_is_no_copy_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_checkpoint(path, {"round": 0}, tensors())
    inode = path.stat().st_ino
    save_checkpoint(path, {"round": 1}, tensors())
    assert previous(path).stat().st_ino == inode
