"""File layouts of the known data sets: the pinned SHA-256 of each file, and how the checked bytes are read."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedrec.data.cleaning import RawRows

Files = Mapping[str, bytes]


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


RECBOLE_100K = Layout(
    {
        "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    },
    _recbole_100k,
)
GROUPLENS_100K = Layout(
    {
        "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
        "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
        "u.genre": "9757e0d3e6b298159a80dd48eaf938114690e911e39af97a76949ef1663610bb",
    },
    _grouplens_100k,
)
MOVIELENS_1M = Layout(
    {
        "ml1m_assembled.csv.gz": "98369cf3d0031c50b278cc3ade258d970d5f2e4bd1723e0ab11350b2ad6c1208",
        "movies.dat": "0140fc2356357c1a851d0f52e893a1e4d3696df632c4141cea8d5bc3d621f0b9",
    },
    _ml_1m,
)
MOVIETWEETINGS = Layout(
    {
        "ratings.dat": "c0dd868c2632d10002ebc928ddc5345f33adeaa59eca52c2941c26a2c5e36fd6",
        "movies.dat": "e63fb84bc734e3c574f135634a40d3cbafab22b8f94f5fc0b80f80d1d2076efc",
    },
    _movietweetings,
)
AMAZON_VIDEO = Layout(
    {"ratings.dat": "a1292e4a4dba6c37be6ae5dc83d4404af96bf3eace4c8954e2f4e8360a3cdd76"},
    _amazon_video,
)
AMAZON_BEAUTY = Layout(
    {
        "Beauty.txt": "226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8",
        "Beauty_item2attributes.json": "129e40f67486f6877eff0f5318cfa8530ee8ac23d8b0d1de04e1bb7a2ba0b2d4",
    },
    _amazon_beauty,
)
