"""The masked sum is the plain sum of whole numbers, exactly, whoever falls silent and whenever."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedrec.client import secure as client
from fedrec.privacy.settings import SecureSum
from fedrec.privacy.terms import Terms
from fedrec.protocol.link import Verb
from fedrec.protocol.secure import MaskReply
from fedrec.random import Key
from tests.secure import SecureLink, gathered


def lost(verb: Verb, *places: int) -> list[tuple[Verb, int]]:
    return [(verb, 100 + place) for place in places]


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Whole contributions, noise included, as clients made them, in the order of the nodes."""
    seen: dict[str, Any] = {"units": [], "terms": None}
    real = client.contribution

    def spying(terms: Terms, *rest: Any) -> Any:
        seen["units"].append(real(terms, *rest))
        seen["terms"] = terms
        return seen["units"][-1]

    monkeypatch.setattr(client, "contribution", spying)
    return seen


CASES = {
    "one node": ([12], []),
    "a node each": ([1] * 20, []),
    "uneven nodes": ([3, 4, 5, 6], []),
    "30 % before contributing": ([1] * 20, lost("mask", 1, 2, 3, 4, 5, 6)),
    "30 % after contributing": ([1] * 20, lost("unmask", 1, 2, 3, 4, 5, 6)),
    "in every phase": (
        [1] * 24, lost("advertise", 0) + lost("share", 1) + lost("mask", 2, 3, 4, 5) + lost("unmask", 6, 7, 8),
    ),
    "a node of several": ([4, 1, 4, 6, 7], lost("mask", 0)),
}  # fmt: skip


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("case", CASES)
def test_masked_equals_plain_exactly(case: str, bits: int, units: dict[str, Any]) -> None:
    sizes, lose = CASES[case]
    got = gathered(SecureLink(sizes, lose), SecureSum(minimum=5, ring_bits=bits))
    gone = {node for verb, node in lose if verb == "mask"}
    never = {node for verb, node in lose if verb in ("advertise", "share")}
    makers = [100 + place for place, size in enumerate(sizes) for _ in range(size) if 100 + place not in never]
    kept = [made for node, made in zip(makers, units["units"], strict=True) if node not in gone]
    assert got.n_clients == len(kept)
    plain = units["terms"].grid.decode(np.sum(kept, axis=0)).astype(np.float32)
    np.testing.assert_array_equal(got.sums["counts"], plain)


def test_with_few_neighbours_too(units: dict[str, Any]) -> None:
    lose = lost("mask", *range(0, 80, 4))
    got = gathered(SecureLink([1] * 80, lose), SecureSum(minimum=5, neighbours=40))
    kept = [made for place, made in enumerate(units["units"]) if place % 4]
    assert got.neighbours == 40
    np.testing.assert_array_equal(
        got.sums["counts"], units["terms"].grid.decode(np.sum(kept, axis=0)).astype(np.float32)
    )


def test_the_same_seed_gives_the_same_sum_whatever_the_masks() -> None:
    """Masks are random in each session; what is left of them is nothing."""
    a, b = (gathered(SecureLink([4, 5, 3]), seed=Key.from_seed(1)).sums["counts"] for _ in range(2))
    assert a.tobytes() == b.tobytes()
    assert gathered(SecureLink([4, 5, 3])).sums["counts"].tobytes() != a.tobytes()


def test_what_a_client_sends_is_uniform() -> None:
    """Chi-square over the four highest bits; a lone client's numbers, which are small, would all have 0 or 15 there."""
    from scipy.stats import chisquare

    words = []
    for _ in range(10):
        link = SecureLink([1] * 10)
        gathered(link)
        words += [MaskReply.from_bytes(document).total for verb, _, document in link.sent if verb == "mask"]
    found = np.bincount(np.concatenate(words) >> 28, minlength=16)
    assert found.sum() == 10 * 10 * 40
    assert chisquare(found).pvalue > 1e-6


@pytest.mark.parametrize("lose", [[], lost("mask", *range(9))], ids=["nobody silent", "30 % silent"])
def test_noise_is_what_was_charged_at_least_and_as_much_more_as_was_said(lose: list[tuple[Verb, int]]) -> None:
    errors = []
    for _ in range(50):
        link = SecureLink([1] * 30, lose)
        got = gathered(link, multiplier=50.0)
        errors.append(got.sums["counts"] - (link.clipped_sum() if not lose else 0.0))  # the sum is lost in noise of 50
    deviation = float(np.std(errors))
    assert got.noise_excess == (len(link.sizes) - len(lose)) / 20
    assert deviation == pytest.approx(50.0 * got.noise_excess**0.5, rel=0.06)  # 2000 numbers: 4 deviations are 0.063
    assert deviation > 50.0 * 0.98


def test_the_sum_is_right() -> None:
    link = SecureLink([1] * 30)
    got = gathered(link, multiplier=1e-3)
    np.testing.assert_allclose(got.sums["counts"], link.clipped_sum(), atol=0.01)
