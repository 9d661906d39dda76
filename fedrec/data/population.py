"""A made-up population of any size, written block by block: nobody ever holds all of it in memory.

People arrive over time and bring a few tastes that drift; items arrive over time and are taken with a long tail. What
a person does depends on the key and the person's own number, never on the block in which it is written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import BaseModel, ConfigDict, Field

from fedrec.data.catalog import ItemCatalog
from fedrec.data.cleaning import CleaningReport, Dataset
from fedrec.data.log import USER_IDS, InteractionLog, header_text, id_lines
from fedrec.data.synthetic import START
from fedrec.errors import DataError
from fedrec.random import Key

BLOCK = 8192
"""People written at once."""
LONGEST = 40
"""No history is longer than this many mean lengths."""
PLACES = 1 << 20
"""More interactions than anybody has; place p of person u draws stream u * PLACES + p."""
DAY_SECONDS = 86_400
OWN_TASTES = 3

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Habits(BaseModel):
    """How the people and the items of a made-up population are."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    days: float = Field(default=365.0, ge=1)
    """How long the population is watched."""
    present: float = Field(default=0.5, gt=0, le=1)
    """Share of the items and of the people who are there from the start; the others arrive evenly over time."""
    tail: float = Field(default=1.0, ge=0)
    """Exponent of Zipf's law: an item of popularity rank r is taken in proportion to ``r ** -tail``."""
    tastes: int = Field(default=16, ge=1)
    """How many groups the items fall into; a person likes three of them."""
    explore: float = Field(default=0.2, ge=0, le=1)
    """Share of interactions with any item, whatever the person's tastes."""
    drift: float = Field(default=0.5, ge=0, le=1)
    """How far a person's mixture of tastes moves to another one between the first and the last interaction."""
    spread: float = Field(default=1.0, ge=0)
    """Standard deviation of the logarithm of the history length."""


def write_population(
    folder: Path,
    n_users: int,
    n_items: int,
    key: Key,
    *,
    mean_length: float = 30.0,
    habits: Habits | None = None,
    observe: Callable[[int], None] = lambda written: None,
) -> Dataset:
    """Write a made-up population as a data set, whole or not at all, and open it memory-mapped.

    History lengths are log-normal with mean `mean_length`, at least 1. People and items are numbered by arrival; the
    tag of an item is its taste.

    Args:
        folder: new or empty.
        n_users: how many people.
        n_items: how many items.
        key: the stream of random numbers; equal arguments write equal bytes.
        mean_length: mean number of interactions of a person.
        habits: what people and items are like; the defaults of `Habits` if not given.
        observe: is told after each block how many people are written.

    Raises:
        DataError: a size is impossible, or the folder holds something else or cannot be written.
    """
    habits = habits or Habits()
    if min(n_users, n_items) < 1 or not 1 <= mean_length <= PLACES // LONGEST:
        raise DataError(
            f"A population of {n_users} users and {n_items} items with {mean_length:g} interactions each is impossible:"
            f" there must be at least 1 of both, and 1 to {PLACES // LONGEST:,} interactions."
        )
    world = _World.build(n_items, habits, key)
    lengths = _lengths(n_users, mean_length, habits.spread, key)
    total = int(lengths.sum())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
            _write_log(Path(beside), world, lengths, habits, key, observe)
            dataset = Dataset(
                f"population of {n_users:,}",
                InteractionLog.load(Path(beside)),
                world.catalog,
                CleaningReport(total, total, {}),
                {
                    "source": "synthetic",
                    "sha256": "",
                    "terms": "none",
                    "time_unit": "seconds",
                    "key": key.hex(),
                    "mean_length": f"{mean_length:g}",
                    "habits": habits.model_dump_json(),
                },
            )
            dataset.save(folder)
    except OSError as error:
        raise DataError(f"Cannot write the population to '{folder}': {error.strerror}.") from error
    return Dataset.load(folder)


@dataclass(frozen=True)
class _World:
    """The items, arranged so that one among those of a taste that have arrived is drawn by two searches.

    Attributes:
        catalog: the items; `first_seen` is when they arrive.
        places: [2 * n_items] sorted ``pool * n_items + item``: each item in the pool of its taste and in the last pool.
        mass: [2 * n_items + 1] running sum of the items' weights in that order.
    """

    catalog: ItemCatalog
    places: Ints
    mass: Floats

    @classmethod
    def build(cls, n_items: int, habits: Habits, key: Key) -> _World:
        numbers = np.arange(n_items, dtype=np.int64)
        taste = np.floor(key.child("taste").uniforms(numbers, 1)[:, 0] * habits.tastes).astype(np.int64)
        rank = np.argsort(np.argsort(key.child("rank").uniforms(numbers, 1)[:, 0], kind="stable"), kind="stable")
        places = np.sort(np.concatenate((taste * n_items + numbers, habits.tastes * n_items + numbers)))
        weight = (rank + 1.0) ** -habits.tail
        arrival = START + np.floor(_arrival(n_items, habits.present) * habits.days * DAY_SECONDS).astype(np.int64)
        catalog = ItemCatalog(
            tuple(f"i{i}" for i in range(n_items)),
            tuple(f"item {i}" for i in range(n_items)),
            tuple((f"taste {t}",) for t in taste.tolist()),
            arrival,
        )
        return cls(catalog, places, np.concatenate(([0.0], np.cumsum(weight[places % n_items]))))

    def draw(self, pool: Ints, time: Ints, u: Floats) -> Ints:
        """Return [n] items of each `pool` [n] that are there at `time` [n], by weight; `u` [n] is uniform."""
        n_items = len(self.catalog)
        there = np.searchsorted(self.catalog.first_seen, time, side="right")
        low, high = (np.searchsorted(self.places, pool * n_items + first) for first in (0, there))
        none = low == high  # of a taste without items yet, any item will do: the last pool starts at n_items
        low, high = np.where(none, n_items, low), np.where(none, n_items + there, high)
        at = self.mass[low] + u * (self.mass[high] - self.mass[low])
        found = np.clip(np.searchsorted(self.mass, at, side="right") - 1, low, high - 1)
        items: Ints = self.places[found] % n_items
        return items


def _arrival(n: int, present: float) -> Floats:
    """Return [n] ascending moments of arrival in [0, 1): `present` of all at 0, the others evenly."""
    first = max(1, round(present * n))
    return np.maximum(np.arange(n) - first + 1, 0) / max(n - first + 1, 1)


def _lengths(n_users: int, mean: float, spread: float, key: Key) -> Ints:
    """Return [n_users] log-normal lengths: ``exp(mu + spread * z)`` with ``mu = log(mean) - spread ** 2 / 2``."""
    u = key.child("length").uniforms(np.arange(n_users, dtype=np.int64), 2)
    z = np.sqrt(-2.0 * np.log1p(-u[:, 0])) * np.cos(2.0 * np.pi * u[:, 1])  # Box and Muller
    lengths = np.exp(np.log(mean) - spread**2 / 2 + spread * z)
    rounded: Ints = np.clip(np.round(lengths), 1, LONGEST * mean).astype(np.int64)
    return rounded


def _write_log(
    folder: Path, world: _World, lengths: Ints, habits: Habits, key: Key, observe: Callable[[int], None]
) -> None:
    """Write the files of `InteractionLog.save`, a block of people at a time."""
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    np.save(folder / "offsets.npy", offsets, allow_pickle=False)
    (folder / "log.json").write_text(header_text(("interaction",)), encoding="utf-8")
    arrival = _arrival(len(lengths), habits.present)
    with ExitStack() as open_files:
        columns = {
            name: _column(open_files, folder / f"{name}.npy", dtype, int(offsets[-1]))
            for name, dtype in (("item", np.int32), ("time", np.int64), ("event", np.int8), ("value", np.float32))
        }
        ids = open_files.enter_context((folder / USER_IDS).open("wb"))
        for start in range(0, len(lengths), BLOCK):
            users = np.arange(start, min(start + BLOCK, len(lengths)), dtype=np.int64)
            item, time = _histories(world, users, lengths[users], arrival[users], habits, key)
            columns["item"].write(item.astype(np.int32).tobytes())
            columns["time"].write(time.tobytes())
            columns["event"].write(bytes(len(item)))
            columns["value"].write(np.full(len(item), np.nan, np.float32).tobytes())
            ids.write(id_lines([f"u{u}" for u in users.tolist()]))
            observe(int(users[-1]) + 1)


def _column(open_files: ExitStack, path: Path, dtype: DTypeLike, n: int) -> BinaryIO:
    """Open a ``.npy`` file of `n` numbers that are still to be written."""
    handle = open_files.enter_context(path.open("wb"))
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (n,)}
    np.lib.format.write_array_header_1_0(handle, header)
    return handle


def _histories(
    world: _World, users: Ints, lengths: Ints, arrival: Floats, habits: Habits, key: Key
) -> tuple[Ints, Ints]:
    """Return the [n] items and times of these people's interactions, one person after the other, oldest first."""
    person = np.repeat(np.arange(len(users)), lengths)
    place = np.arange(len(person)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    u = key.child("row").uniforms(users[person] * PLACES + place, 3)
    progress = np.sort(person + u[:, 0]) - person  # sorted within each person
    moment = arrival[person] + progress * (1.0 - arrival[person])
    time = START + np.floor(moment * habits.days * DAY_SECONDS).astype(np.int64)
    pool = _pools(users, person, progress, u[:, 1], habits, key)
    return world.draw(pool, time, u[:, 2]), time


def _pools(users: Ints, person: Ints, progress: Floats, u: Floats, habits: Habits, key: Key) -> Ints:
    """Return [n] which pool each interaction draws from: a taste of the person, or the last, of everything.

    Person p's mixture at progress t is ``(1 - drift * t) m_p + drift * t m'_p``, with m and m' uniform on the simplex.
    """
    draws = key.child("person").uniforms(users, 3 * OWN_TASTES)
    own = np.floor(draws[:, :OWN_TASTES] * habits.tastes).astype(np.int64)
    first, last = (-np.log1p(-draws[:, k * OWN_TASTES : (k + 1) * OWN_TASTES]) for k in (1, 2))
    first, last = (np.cumsum(m / m.sum(1, keepdims=True), axis=1) for m in (first, last))
    moved = habits.drift * progress
    at = (u - habits.explore) / max(1.0 - habits.explore, 1e-12)
    choice = np.zeros(len(person), np.int64)
    for j in range(OWN_TASTES - 1):
        choice += at >= first[person, j] + moved * (last[person, j] - first[person, j])
    return np.where(u < habits.explore, habits.tastes, own[person, choice])
