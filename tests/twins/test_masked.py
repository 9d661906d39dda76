"""The masked sum is the plain sum of whole numbers, exactly, whoever falls silent and whenever."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedrec.client import secure as client
from fedrec.errors import MaskingError
from fedrec.privacy.settings import SecureSum
from fedrec.privacy.terms import Terms, agree_on
from fedrec.protocol.link import Verb
from fedrec.protocol.secure import MaskReply
from fedrec.random import Key
from fedrec.server.secure import SecureGathered
from tests.secure import D, SecureLink, gathered

LAYOUT = (("counts", (D,)),)


def lost(verb: Verb, *places: int) -> list[tuple[Verb, int]]:
    return [(verb, 100 + place) for place in places]


class Made:
    """What clients added up, in the order in which they did."""

    def __init__(self) -> None:
        self.units: list[Any] = []
        self.extra: list[Any] = []
        self.terms: Any = None

    def plain(self, numbers: list[int], arrived: list[int], n_parties: int) -> Any:
        """Return the sum of those who arrived, the first of whom keep the extra part of their noise."""
        keepers = sorted(arrived)[: self.terms.keepers(n_parties, len(arrived))]
        at = {number: place for place, number in enumerate(numbers)}
        total = np.sum([self.units[at[number]] for number in arrived], axis=0)
        for number in keepers:
            total = total + self.extra[at[number]]
        return self.terms.grid.decode(total).astype(np.float32)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    seen, real, real_extra = Made(), client.contribution, client.extra_noise

    def contribution(terms: Terms, *rest: Any) -> Any:
        seen.terms = terms
        seen.units.append(real(terms, *rest))
        return seen.units[-1].copy()

    def extra_noise(*rest: Any) -> Any:
        seen.extra.append(real_extra(*rest))
        return seen.extra[-1].copy()

    monkeypatch.setattr(client, "contribution", contribution)
    monkeypatch.setattr(client, "extra_noise", extra_noise)
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
def test_masked_equals_plain_exactly(case: str, bits: int, made: Made) -> None:
    sizes, lose = CASES[case]
    got = gathered(SecureLink(sizes, lose), SecureSum(minimum=5, ring_bits=bits))
    node_of = [100 + place for place, size in enumerate(sizes) for _ in range(size)]
    gone = {node for verb, node in lose if verb == "mask"}
    never = {node for verb, node in lose if verb in ("advertise", "share")}
    makers = [number for number, node in enumerate(node_of) if node not in never]
    arrived = [number for number in makers if node_of[number] not in gone]
    n_parties = sum(("advertise", node) not in lose for node in node_of)
    assert (got.n_clients, got.n_parties) == (len(arrived), n_parties)
    np.testing.assert_array_equal(got.sums["counts"], made.plain(makers, arrived, n_parties))


def test_with_few_neighbours_too(made: Made) -> None:
    lose = lost("mask", *range(0, 80, 4))
    got = gathered(SecureLink([1] * 80, lose), SecureSum(minimum=5, neighbours=40))
    assert got.neighbours == 40
    arrived = [number for number in range(80) if number % 4]
    np.testing.assert_array_equal(got.sums["counts"], made.plain(list(range(80)), arrived, 80))


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
    assert found.sum() == 10 * 10 * D
    assert chisquare(found).pvalue > 1e-6


def spread(settings: SecureSum, lose: list[tuple[Verb, int]], sessions: int = 3) -> tuple[float, SecureGathered]:
    """Return the variance of the noise in opened sums over what was charged."""
    errors = []
    for _ in range(sessions):
        link = SecureLink([1] * 40, lose)
        got = gathered(link, settings, multiplier=50.0)
        # Of those who fell silent the contributions, at most one each, are lost in noise of 50.
        errors.append(got.sums["counts"] - (0.0 if lose else link.clipped_sum()))
    return float(np.var(errors)) / 50.0**2, got


@pytest.mark.parametrize("when", ["mask", "unmask"])
@pytest.mark.parametrize("silent", [0, 6, 12], ids=["nobody silent", "15 % silent", "30 % silent"])
def test_opened_sums_carry_the_charged_noise_whoever_falls_silent(silent: int, when: Verb) -> None:
    """Charged noise to within one client's extra part, 1.3 % of 40 clients, and four deviations of 3,000 numbers."""
    found, got = spread(SecureSum(minimum=5), lost(when, *range(3, 3 + silent)))
    assert 1.0 <= got.noise_excess < 1.0132
    assert found == pytest.approx(got.noise_excess, abs=4 * math.sqrt(2 / 3000))


@pytest.mark.parametrize("silent", [0, 12])
def test_noise_that_is_not_removed_is_as_much_more_as_was_said(silent: int) -> None:
    found, got = spread(SecureSum(minimum=5, remove_excess=False), lost("mask", *range(silent)))
    assert got.noise_excess == (40 - silent) / 27
    assert found == pytest.approx(got.noise_excess, rel=4 * math.sqrt(2 / 3000))


def test_what_colluding_clients_tell_leaves_the_charged_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first four, who keep the extra part of their noise, tell the server all of it."""
    told: list[Any] = []
    real, real_extra = client.contribution, client.extra_noise

    def contribution(terms: Terms, deviation: float, *rest: Any) -> Any:
        quiet = real(terms, 0.0, *rest)
        units = real(terms, deviation, *rest)
        told.append(units - quiet)
        return units

    def extra_noise(*rest: Any) -> Any:
        found = real_extra(*rest)
        told[-1] = told[-1] + found
        return found

    monkeypatch.setattr(client, "contribution", contribution)
    monkeypatch.setattr(client, "extra_noise", extra_noise)
    left = []
    for _ in range(3):
        told.clear()
        link = SecureLink([1] * 40, lost("mask", *range(30, 36)))
        got = gathered(link, SecureSum(minimum=5, colluding=0.1), multiplier=50.0)
        terms = agree_on("0" * 32, 0, 3, SecureSum(minimum=5, colluding=0.1), 40, LAYOUT, 1.0, 50.0, "system")
        assert terms.keepers(40, 34) > 4
        left.append(got.sums["counts"] - terms.grid.decode(np.sum(told[:4], axis=0)))
    assert 1.0 - 4 * math.sqrt(2 / 3000) < float(np.var(left)) / 50.0**2 < 1.04 + 4 * math.sqrt(2 / 3000)


def test_clients_that_tell_nothing_never_make_the_noise_smaller() -> None:
    """Up to a little less than half of those who contributed refuse; above that the sum stays closed."""
    found, got = spread(SecureSum(minimum=5), lost("unmask", *range(19)), sessions=2)
    assert got.noise_excess == 1.0
    assert found == pytest.approx(1.0, abs=4 * math.sqrt(2 / 2000))
    with pytest.raises(MaskingError, match="20 of the 21 shares"):
        gathered(SecureLink([1] * 40, lost("unmask", *range(20))))


def test_the_sum_is_right() -> None:
    link = SecureLink([1] * 30)
    got = gathered(link, multiplier=1e-3)
    np.testing.assert_allclose(got.sums["counts"], link.clipped_sum(), atol=0.01)
