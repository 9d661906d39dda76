"""Secrets cut into shares."""

from __future__ import annotations

import os
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrec.errors import MaskingError
from fedrec.privacy.shares import PRIME, SHARE_BYTES, join, split


@given(
    secrets=st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=3),
    points=st.sets(st.integers(1, PRIME - 1), min_size=1, max_size=8),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_any_threshold_of_shares_gives_the_secrets_back(
    secrets: list[bytes], points: set[int], data: st.DataObject
) -> None:
    order = sorted(points)
    threshold = data.draw(st.integers(1, len(order)))
    shares = split(secrets, order, threshold)
    assert shares.shape == (len(secrets), len(order), SHARE_BYTES)
    for secret, rows in zip(secrets, shares, strict=True):
        of = dict(zip(order, (row.tobytes() for row in rows), strict=True))
        for chosen in list(combinations(order, threshold))[:20]:
            assert join({point: of[point] for point in chosen}) == secret


def numbers(share: bytes) -> list[int]:
    """The sixteen numbers of a share, read digit by digit."""
    low = [share[2 * i] + 256 * share[2 * i + 1] for i in range(16)]
    return [low[i] + 65536 * (share[32 + i // 2] >> 4 * (i % 2) & 15) for i in range(16)]


def written(values: list[int]) -> bytes:
    low = b"".join((value % 65536).to_bytes(2, "little") for value in values)
    high = [value // 65536 for value in values]
    return low + bytes(high[2 * i] + 16 * high[2 * i + 1] for i in range(8))


def test_one_share_less_fits_every_secret() -> None:
    """For t - 1 shares and any secret there is a polynomial through both: the shares exclude nothing."""
    secret, points = os.urandom(32), [2, 3, 5]
    known = dict(zip(points, (row.tobytes() for row in split([secret], points, 3)[0]), strict=True))
    for other in (secret, bytes(32), os.urandom(32)):
        # Lagrange through (0, other), (2, .), (3, .) gives the third share that would make `other` the secret.
        at_zero = [other[2 * i] + 256 * other[2 * i + 1] for i in range(16)]
        rows = {0: at_zero, 2: numbers(known[2]), 3: numbers(known[3])}
        third = [0] * 16
        for x, row in rows.items():
            weight = 1
            for o in rows:
                if o != x:
                    weight = weight * (5 - o) * pow(x - o, -1, PRIME) % PRIME
            third = [(value + weight * y) % PRIME for value, y in zip(third, row, strict=True)]
        assert join({2: known[2], 3: known[3], 5: written(third)}) == other
        assert (written(third) == known[5]) == (other == secret)


def test_a_share_alone_is_uniform() -> None:
    from scipy.stats import chisquare

    first = [number for _ in range(300) for number in numbers(split([bytes(32)], [1, 2], 2)[0, 0].tobytes())]
    assert max(first) < PRIME
    assert chisquare(np.bincount(np.array(first) >> 16, minlength=16)).pvalue > 1e-6


def test_more_holders_than_add_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedrec.privacy.shares._EXACT", 7)
    secret, points = os.urandom(32), list(range(PRIME - 60, PRIME))
    rows = split([secret], points, 45)[0]
    assert join({point: row.tobytes() for point, row in list(zip(points, rows, strict=True))[9:54]}) == secret


def test_impossible_shares_are_refused() -> None:
    for points, threshold in [([1, 1], 1), ([0, 1], 1), ([1, 2], 3), ([], 1), ([PRIME], 1)]:
        with pytest.raises(MaskingError):
            split([bytes(32)], points, threshold)
    too_large = written([PRIME - 1] * 16)
    for shares in ({}, {1: bytes(32)}, {1: b"\xff" * SHARE_BYTES}, {1: too_large}, {0: bytes(SHARE_BYTES)}):
        with pytest.raises(MaskingError):
            join(shares)
