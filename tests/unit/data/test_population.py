"""The made-up population: its statistics, that it is a function of the key, and that it is written whole or not."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedrec.client import pool as pool_module
from fedrec.client.pool import LogPool, count
from fedrec.data import population
from fedrec.data.batches import Cohort
from fedrec.data.cleaning import Dataset
from fedrec.data.commands import app
from fedrec.data.log import InteractionLog
from fedrec.data.population import Habits, write_population
from fedrec.data.slices import LastWindow, TimeWindow, resolve
from fedrec.data.synthetic import START
from fedrec.errors import DataError
from fedrec.protocol.task import CountTask
from fedrec.random import Key

KEY = Key.from_seed(5)
N_USERS, N_ITEMS = 4000, 600
HABITS = Habits(tastes=8, explore=0.1, drift=1.0, days=100)
SECONDS = 100 * 86_400


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("population") / "set"
    return write_population(folder, N_USERS, N_ITEMS, KEY, mean_length=40.0, habits=HABITS)


def test_it_is_an_ordinary_data_set_memory_mapped(people: Dataset) -> None:
    log = people.log
    assert isinstance(log.item, np.memmap)
    assert (log.n_users, len(people.catalog), len(log.user_ids)) == (N_USERS, N_ITEMS, N_USERS)
    assert (log.user_ids[0], log.user_ids[N_USERS - 1]) == ("u0", f"u{N_USERS - 1}")
    assert (log.item.dtype, log.time.dtype, log.event.dtype, log.value.dtype) == (
        np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.int8), np.dtype(np.float32),
    )  # fmt: skip
    assert 0 <= log.item.min() <= log.item.max() < N_ITEMS
    assert int(log.offsets[-1]) == len(log) == len(log.time) == len(log.event) == len(log.value)
    assert not log.event.any()
    assert np.isnan(log.value).all()
    within = np.diff(log.user) == 0
    assert (np.diff(log.time)[within] >= 0).all()


def test_lengths_are_log_normal_with_the_mean_asked_for(people: Dataset) -> None:
    """Standard error of the mean of 4,000 lengths: 40 * (e - 1) ** .5 / 4000 ** .5 = 0.83; of a log: 0.016."""
    lengths = people.log.counts
    assert abs(lengths.mean() - 40) < 4 * 0.83
    assert lengths.min() >= 1
    logs = np.log(lengths)
    assert abs(logs.mean() - (np.log(40) - 0.5)) < 4 * 0.016
    assert abs(logs.std() - 1.0) < 0.05


def test_items_have_a_long_tail(people: Dataset) -> None:
    """Zipf with exponent 1 over 600: a tenth of the items holds H(60) / H(600) = 67 % of the weight."""
    counts = np.sort(np.bincount(people.log.item, minlength=N_ITEMS))[::-1]
    share = counts[:60].sum() / counts.sum()
    assert 0.55 < share < 0.8


def test_nobody_takes_an_item_before_it_arrives_and_both_arrive_over_time(people: Dataset) -> None:
    log, seen = people.log, people.catalog.first_seen
    assert (seen[log.item] <= log.time).all()
    assert START <= int(log.time.min()) <= int(log.time.max()) < START + SECONDS
    for moment, share in ((0.0, 0.5), (0.5, 0.75), (1.0, 1.0)):
        assert abs((seen <= START + moment * SECONDS).mean() - share) < 0.01
    first = log.time[log.offsets[:-1]]
    joined = [(first <= START + moment * SECONDS).mean() for moment in (0.2, 0.5, 0.8, 1.0)]
    assert joined == sorted(joined)
    assert joined[1] < 0.8
    assert joined[3] == 1.0


def test_people_have_few_tastes_that_drift(people: Dataset) -> None:
    """With 8 tastes and 10 % exploring, three own ones hold at least 0.9 + 0.1 * 3 / 8 of a history, on average."""
    log = people.log
    taste = np.array([int(tags[0].split()[1]) for tags in people.catalog.attributes])
    long = np.flatnonzero(log.counts >= 60)
    top, moved, still = [], [], []
    for u in long[:400]:
        own = taste[log.history(u)]
        top.append(np.sort(np.bincount(own, minlength=8))[-3:].sum() / len(own))
        third = len(own) // 3
        early, late = (np.bincount(part, minlength=8) / third for part in (own[:third], own[-third:]))
        moved.append(np.abs(early - late).sum())
        odd, even = (np.bincount(own[k::2], minlength=8) / len(own[k::2]) for k in (0, 1))
        still.append(np.abs(odd - even).sum())
    assert 0.9 < np.mean(top) < 0.97
    assert np.mean(moved) > 1.5 * np.mean(still)


def test_the_key_decides_and_the_block_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_population(tmp_path / "a", 300, 50, KEY)
    monkeypatch.setattr(population, "BLOCK", 37)
    told: list[int] = []
    again = write_population(tmp_path / "b", 300, 50, KEY, observe=told.append)
    other = write_population(tmp_path / "c", 300, 50, KEY.child("other"))
    assert first.log.digest() == again.log.digest() != other.log.digest()
    assert first.catalog.digest() == again.catalog.digest()
    assert told == [*range(37, 300, 37), 300]


@pytest.mark.parametrize(("n_users", "n_items", "tastes"), [(1, 1, 1), (40, 3, 16), (40, 200, 1)])
def test_tiny_populations_are_possible(tmp_path: Path, n_users: int, n_items: int, tastes: int) -> None:
    made = write_population(tmp_path / "set", n_users, n_items, KEY, habits=Habits(tastes=tastes, present=0.01))
    assert made.log.n_users == n_users
    assert (made.catalog.first_seen[made.log.item] <= made.log.time).all()


@pytest.mark.parametrize(("n_users", "n_items", "mean"), [(0, 5, 3.0), (5, 0, 3.0), (5, 5, 0.5), (5, 5, 1e9)])
def test_impossible_sizes_are_refused(tmp_path: Path, n_users: int, n_items: int, mean: float) -> None:
    with pytest.raises(DataError, match="impossible"):
        write_population(tmp_path / "set", n_users, n_items, KEY, mean_length=mean)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="holds something else"):
        write_population(tmp_path / "set", 5, 5, KEY)
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "letter.txt"]


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def stop(written: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_population(tmp_path / "set", 5, 5, KEY, observe=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_what_the_function_writes(tmp_path: Path) -> None:
    words = ["synthesise", "--users", "50", "--items", "20", "--seed", "5", "--out", str(tmp_path / "a"), "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    made = write_population(tmp_path / "b", 50, 20, KEY)
    assert (printed["users"], printed["items"], printed["interactions"]) == (50, 20, len(made.log))
    assert printed["digests"] == {"log": made.log.digest(), "catalog": made.catalog.digest()}
    assert Dataset.load(tmp_path / "a").provenance == made.provenance


# What a pool does with a population


def test_a_pool_of_everybody_uses_the_log_as_it_lies_on_disk(people: Dataset) -> None:
    pool = LogPool.partition(people.log, people.catalog, 0, 1)
    assert pool.log is people.log
    assert pool.ids.tolist() == list(range(N_USERS))


def test_a_pool_finds_out_once_who_is_eligible_and_forgets_old_windows(
    people: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = LogPool.partition(people.log, people.catalog, 0, 1)
    asked: list[TimeWindow | LastWindow] = []

    def watched(log: InteractionLog, window: TimeWindow | LastWindow) -> tuple[np.ndarray, np.ndarray]:
        asked.append(window)
        return resolve(log, window)

    monkeypatch.setattr(pool_module, "resolve", watched)
    digest = people.catalog.digest()
    middle = START + SECONDS // 2
    early, late = TimeWindow(start=0, end=middle), TimeWindow(start=middle, end=2**62)
    expected = [int(sum((people.log.time[a:b] < middle).any() for a, b in pairwise(people.log.offsets)))]
    for _ in range(3):
        assert pool.census(early, digest) == expected[0]
        assert pool.census(TimeWindow(start=middle, end=2**62), digest) < N_USERS
    assert asked == [early, late]
    for take in range(1, pool_module.KEPT_WINDOWS + 1):
        pool.census(LastWindow(skip=0, take=take), digest)
    pool.census(early, digest)
    assert asked[-1] == early
    assert asked.count(early) == 2


@pytest.mark.parametrize("clip_norm", [None, 3.0])
def test_counting_a_part_of_the_people_at_a_time_counts_the_same(
    people: Dataset, monkeypatch: pytest.MonkeyPatch, clip_norm: float | None
) -> None:
    users = np.arange(N_USERS)
    low, high = resolve(people.log, TimeWindow(start=START + SECONDS // 4, end=2**62))
    cohort, task = (
        Cohort(people.log, users, users, low, high),
        CountTask(window=LastWindow(skip=0), clip_norm=clip_norm),
    )
    whole = count(task, cohort, N_ITEMS)
    monkeypatch.setattr(pool_module, "COUNTED_AT_ONCE", 501)
    parts = count(task, cohort, N_ITEMS)
    np.testing.assert_allclose(parts.sums["counts"], whole.sums["counts"], rtol=1e-6)
    assert (parts.n_clients, parts.stats) == (whole.n_clients, whole.stats)
    if clip_norm is None:
        held = [
            set(people.log.item[o + a : o + b].tolist())
            for o, a, b in zip(people.log.offsets[:-1], low, high, strict=True)
        ]
        assert whole.sums["counts"].sum() == sum(map(len, held))
