"""What the quality benchmark is built of: questions, newcomers, and runs that are made once."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.asking import Questions, gains, interval, leave_one_out, over_seeds, standardised
from benchmarks.foundation import _without, by_genre, newest_last
from benchmarks.kept import Shelf
from benchmarks.peers.ease import ease, item_weights
from benchmarks.transfer import everybody, predicted, taken
from fedrec.data.catalog import ItemCatalog
from fedrec.data.cleaning import Dataset
from tests.support import dataset_of, small_experiment, small_rows


def test_what_a_person_has_is_no_candidate_and_ties_count_against_the_target() -> None:
    scores = np.array([[9, 5, 5, 1, 7]], np.float32)
    assert gains(scores, Questions([[0]], [4]))[0] == 1.0
    assert gains(scores, Questions([[]], [4]))[0] == pytest.approx(1 / math.log2(3))
    assert gains(scores, Questions([[0]], [2]))[0] == pytest.approx(1 / math.log2(4))  # behind 4 and, tied, 1
    assert gains(scores, Questions([[]], [2]), np.array([2, 3]))[0] == 1.0
    assert gains(np.zeros((1, 20), np.float32), Questions([[]], [3]))[0] == 0.0  # all tied: the last of 20


def test_questions_leave_out_the_newest() -> None:
    data = dataset_of([("a", f"i{n}", n) for n in range(5)] + [("b", "i0", 9), ("b", "i1", 10)])
    number = data.catalog.number_of
    last, before = leave_one_out(data), leave_one_out(data, skip=1)
    assert last.targets == [number["i4"]]  # b has too few
    assert before.targets == [number["i3"]]
    assert before.histories == [last.histories[0][:-1]]


def test_intervals_hold_the_mean_and_one_seed_is_said_to_be_one() -> None:
    low, high = interval(np.array([0.0, 1.0] * 200))
    assert low < 0.5 < high
    assert high - low < 0.15
    alike = np.tile([0.0, 1.0], (2, 200))
    assert interval(alike) == (low, high)
    low, high = interval(np.stack([alike[0], alike[0] + 1.0]))  # seeds that differ by more than people
    assert (low, high) == pytest.approx((0.5, 1.5), abs=0.08)
    assert [row.what for row in over_seeds("x", [0.1], "u")] == ["x (1 seed)"]
    assert len(over_seeds("x", [0.1, 0.3], "u")) == 2
    spread = standardised(np.array([[1.0, 3.0], [2.0, 2.0]], np.float32))
    np.testing.assert_allclose(spread, [[-1, 1], [0, 0]], atol=1e-6)


def dated() -> Dataset:
    data = dataset_of(small_rows())
    titles = tuple(f"T (19{99 - n % 40})" for n in range(len(data.catalog)))
    attributes = tuple(("even",) if n % 2 == 0 else ("odd",) for n in range(len(data.catalog)))
    return replace(data, catalog=replace(data.catalog, titles=titles, attributes=attributes))


def test_new_items_are_the_newest_by_year_and_nobody_trains_on_them() -> None:
    data = dated()
    whole = newest_last(data)
    years = [title[-5:-1] for title in whole.catalog.titles]
    assert years == sorted(years)
    for user in range(data.log.n_users):  # the same histories under other numbers
        assert [data.catalog.ids[i] for i in data.log.history(user)] == [
            whole.catalog.ids[i] for i in whole.log.history(user)
        ]
    n_old = len(whole.catalog) - 5
    seen = _without(whole, np.arange(3, data.log.n_users), n_old)
    assert seen.log.item.max() < n_old
    assert len(seen.catalog) == n_old
    assert seen.log.counts.min() >= 3
    first = next(user for user in range(3, data.log.n_users) if (whole.log.history(user) < n_old).sum() >= 3)
    own = whole.log.history(first)
    assert seen.log.history(0).tolist() == own[own < n_old].tolist()
    counts = np.where(np.arange(len(whole.catalog)) % 3 == 0, 4, 1)
    scores = by_genre(whole, counts, n_old)
    evens = [n for n, tags in enumerate(whole.catalog.attributes) if tags == ("even",)]
    old = [n for n in evens if n < n_old]
    np.testing.assert_allclose(scores[evens], np.mean(counts[old]), rtol=1e-6)


def test_a_run_is_made_once_and_given_again(tmp_path: Path) -> None:
    data, wanted = dataset_of(small_rows()), small_experiment()
    one = Shelf(tmp_path).run(wanted, data)
    folders = sorted(tmp_path.rglob("report.json"))
    again = Shelf(tmp_path).run(wanted, data)
    assert sorted(tmp_path.rglob("report.json")) == folders
    assert again.document == one.document
    assert again.seconds == one.seconds > 0
    assert 0 <= one.value() <= 1
    assert math.isnan(one.value("nobody"))


def test_figures_are_made_once_and_kept_by_their_name(tmp_path: Path) -> None:
    calls: list[float] = []

    def make() -> dict[str, float]:
        calls.append(1.0)
        return {"value": float(len(calls))}

    assert Shelf(tmp_path / "s").figures("a", make) == {"value": 1.0}
    assert Shelf(tmp_path / "s").figures("a", make) == {"value": 1.0}
    assert Shelf(tmp_path / "s").figures("b", make) == {"value": 2.0}


def test_ease_takes_the_lambda_that_is_best_on_the_item_before_the_last() -> None:
    data = dataset_of(small_rows())
    before = {one: ease(data, item_weights(data, one), skip=1).mean() for one in (1, 10, 1000)}
    assert len(set(before.values())) > 1
    best = max(before, key=lambda one: before[one])
    found = quality._best_ease(data, (1, 10, 1000))
    assert (found["lambda"], found["chosen"]) == (best, before[best])
    assert found["value"] == ease(data, item_weights(data, best)).mean()


def test_parts_are_chosen_by_part_and_by_data_set() -> None:
    names = [name for name, _ in quality._chosen(["table"], ["ml-100k"])]
    assert "table/ml-100k/ease" in names
    assert {name for name in quality.parts() if "larger_cohorts" in name} == {"table/amazon-video/larger_cohorts"}
    assert all(name.startswith("table/ml-100k/") for name in names)
    assert [name for name, _ in quality._chosen([], ["ml-1m/gru"])] == ["table/ml-1m/gru"]
    assert [name for name, _ in quality._chosen(["newcomers"], [])] == ["newcomers/ml-1m"]


def test_everybody_is_asked_and_counts_leave_out_the_last_two() -> None:
    data = dataset_of([("a", f"i{n}", n) for n in range(4)] + [("b", "i0", 9), ("b", "i1", 10), ("c", "i3", 11)])
    number = data.catalog.number_of
    last, before = everybody(data), everybody(data, skip=1)
    assert last.targets == [number["i3"], number["i1"], number["i3"]]
    assert last.histories[2] == []
    assert before.targets == [number["i2"], number["i0"]]  # c took one thing only
    assert before.histories == [last.histories[0][:-1], []]
    assert taken(data)[[number["i0"], number["i1"]]].tolist() == [1, 1]
    assert taken(data).sum() == 2


def test_popularity_is_told_by_the_text_of_other_items() -> None:
    n = 200
    tags = tuple(("loved",) if i % 2 else ("left",) for i in range(n))
    titles = tuple(f"Title {i} (1990)" for i in range(n))
    ids = tuple(str(i) for i in range(n))
    catalog = ItemCatalog(ids, titles, tags, np.zeros(n, np.int64))
    counts = np.where(np.arange(n) % 2, 50, 2)
    told = predicted(catalog, counts)
    assert told[1::2].mean() > told[::2].mean() + 1
    changed = counts.copy()
    changed[0] = 10_000  # nobody's own count tells of itself
    assert predicted(catalog, changed)[0] == told[0]
