from __future__ import annotations

import numpy as np
import pytest

from fedrec.evaluation import beyond
from fedrec.evaluation.beyond import coverage, diversity, gini, novelty


def test_novelty_by_hand() -> None:
    # Counts plus one: 4, 2, 1, 1 of 8, that is 1, 2, 3 and 3 bits.
    found = novelty(np.array([[0, 1], [2, 3], [1, -1], [-1, -1]]), np.array([3, 1, 0, 0]), 4)
    assert found.tolist() == [1.5, 3.0, 2.0, 0.0]


def test_items_without_a_count_were_never_chosen_and_noise_cannot_make_them_rarer() -> None:
    lists = np.array([[0, 3]])
    expected = novelty(lists, np.array([3, 1, 0, 0]), 4)
    assert novelty(lists, np.array([3, 1]), 4).tolist() == expected.tolist()
    assert novelty(lists, np.array([3.0, 1.0, -7.5, -0.1]), 4).tolist() == expected.tolist()


def test_diversity_by_hand() -> None:
    attributes = np.array([[1, 0], [2, 0], [0, 1], [1, 1], [0, 0], [0, 0]], np.float32)
    lists = np.array([[0, 1, -1], [0, 2, -1], [0, 1, 2], [4, 5, -1], [0, 3, -1], [3, -1, -1]])
    expected = [0.0, 1.0, 2 / 3, 1.0, 1 - 1 / np.sqrt(2), 0.0]
    assert diversity(lists, attributes, 6) == pytest.approx(expected)


def test_diversity_agrees_with_a_loop_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    attributes = generator.normal(size=(50, 7)) * (generator.random((50, 1)) < 0.8)
    lists = np.stack([generator.permutation(50)[:8] for _ in range(20)])
    lists[3, 5:] = -1

    def cosine(i: int, j: int) -> float:
        length = float(np.linalg.norm(attributes[i]) * np.linalg.norm(attributes[j]))
        return float(attributes[i] @ attributes[j]) / length if length > 0 else 0.0

    def slow(listed: list[int]) -> float:
        return float(np.mean([1 - cosine(i, j) for i in listed for j in listed if i != j]))

    expected = [slow([i for i in listed if i >= 0]) for listed in lists.tolist()]
    assert diversity(lists, attributes, 50) == pytest.approx(expected)
    monkeypatch.setattr(beyond, "_BLOCK_VALUES", 3 * 8 * 7)
    assert diversity(lists, attributes, 50) == pytest.approx(expected)


def test_coverage_is_the_share_recommended_at_all() -> None:
    assert coverage(np.array([0, 3, 1, 0, 0])) == 0.4
    assert coverage(np.array([], np.int64)) == 0.0


def test_gini_by_hand() -> None:
    assert gini(np.array([5, 5, 5, 5])) == 0.0
    assert gini(np.array([0, 0, 0, 9])) == pytest.approx(3 / 4)
    # Mean absolute difference over twice the mean: pairs of (1, 3) differ by 2 half of the time, mean 2.
    assert gini(np.array([3, 1])) == pytest.approx(1 / 4)
    assert gini(np.zeros(3, np.int64)) == 0.0


def test_gini_agrees_with_its_definition_by_pairs() -> None:
    counts = np.random.default_rng(2).integers(0, 50, 30)
    pairs = np.abs(counts[:, None] - counts[None, :]).mean()
    assert gini(counts) == pytest.approx(pairs / (2 * counts.mean()))
