"""Shares, masks, and whole numbers with discrete noise."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrec.errors import MaskingError
from fedrec.privacy.discrete import Grid, client_noise, effective_multiplier, finest
from fedrec.privacy.masking import KeyPair, add_mask, derive, keystream, seal, unseal
from fedrec.privacy.settings import SecureSum
from fedrec.privacy.terms import agree_on, ring_neighbours
from fedrec.random import Key


def test_two_agree_and_their_masks_cancel() -> None:
    a, b = KeyPair.generate(), KeyPair.generate()
    key = derive(a.agree(b.public), "shared mask", "s", 1, 2)
    assert key == derive(b.agree(a.public), "shared mask", "s", 1, 2)
    assert (
        len(
            {
                key,
                *(
                    derive(a.agree(b.public), *rest)
                    for rest in (("x", "s", 1, 2), ("shared mask", "t", 1, 2), ("shared mask", "s", 2, 1))
                ),
            }
        )
        == 4
    )  # type: ignore[arg-type]
    for dtype in (np.dtype(np.uint32), np.dtype(np.uint64)):
        total = np.arange(100).astype(dtype)
        add_mask(total, key, 1)
        assert (total != np.arange(100)).all()
        add_mask(total, key, -1)
        assert total.tolist() == list(range(100))
        assert keystream(key, 100, dtype).dtype == dtype
    assert b"private" not in repr(a).encode()
    assert a.private.hex() not in repr(a)


def test_the_keystream_is_chacha20() -> None:
    """RFC 8439, appendix A.1, test vector 1: zero key, nonce and counter."""
    words = keystream(bytes(32), 4, np.dtype(np.uint32))
    assert words.tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_a_letter_opens_only_as_it_was_sent() -> None:
    key = os.urandom(32)
    sealed = seal(key, b"share", "s", 1, 2)
    assert unseal(key, sealed, "s", 1, 2) == b"share"
    for attempt in (("t", 1, 2), ("s", 2, 1), ("s", 1, 3)):
        with pytest.raises(MaskingError):
            unseal(key, sealed, *attempt)  # type: ignore[arg-type]
    with pytest.raises(MaskingError):
        unseal(key, sealed[:-1] + bytes([sealed[-1] ^ 1]), "s", 1, 2)


@given(st.integers(0, 2**32), st.floats(0.01, 100), st.integers(1, 300), st.integers(-3, 12))
@settings(max_examples=60, deadline=None)
def test_no_contribution_is_longer_than_the_sensitivity(seed: int, size: float, d: int, exponent: int) -> None:
    generator = np.random.Generator(np.random.Philox(seed))
    grid = Grid(1.0, d, exponent, 32)
    units = grid.encode(generator.standard_normal(d) * size, lambda n: 1.0 - generator.random(n))
    assert float(np.linalg.norm(units.astype(np.float64))) <= grid.sensitivity
    c = 2.0**exponent
    assert grid.sensitivity <= (c + math.sqrt(d)) * (1 + 1e-7)


def test_rounding_is_right_on_average_and_what_is_not_finite_is_nothing() -> None:
    generator = Key.from_seed(0).numpy()
    grid = Grid(1.0, 4, 3, 32)
    values = np.array([0.3, -0.41, 0.05, 0.0])
    mean = np.mean([grid.encode(values, lambda n: 1.0 - generator.random(n)) for _ in range(20_000)], axis=0)
    np.testing.assert_allclose(mean, values * 8, atol=0.02)  # deviation 0.5 / sqrt(20000) = 0.0035
    assert not grid.encode(np.array([1.0, np.nan, 0, 0]), generator.random).any()
    assert not grid.encode(np.array([1.0, np.inf, 0, 0]), generator.random).any()


@pytest.mark.parametrize("bits", [32, 64])
def test_the_ring_holds_signed_numbers_and_never_overflows(bits: int) -> None:
    grid = finest(Grid(1.0, 1000, 0, bits), 500, 2.0, 1.5)
    extreme = np.full(3, 500 * math.floor(grid.sensitivity))
    for units in (extreme, -extreme, np.array([0, 1, -1])):
        assert grid.from_ring(grid.to_ring(units)).tolist() == units.tolist()
    assert grid.reach(500, 2.0, 1.5) < 2.0 ** (bits - 1)
    if bits == 32:
        finer = Grid(1.0, 1000, grid.exponent + 1, 32)
        assert finer.reach(500, 2.0, 1.5) >= 2.0**31
    assert grid.decode(np.array([3])) == [3 * 2.0**-grid.exponent]


def test_rounding_costs_next_to_nothing_and_too_coarse_a_grid_is_refused() -> None:
    grid = finest(Grid(1.0, 135_034, 0, 32), 6_040, 1.0, 1.5)
    assert grid.sensitivity / 2.0**grid.exponent < 1.0001
    noise = client_noise(grid, 1.0, 4_000, 6_040)
    for total in (4_000 * (noise.base**2 + noise.extra**2), 6_040 * noise.base**2):
        assert math.sqrt(total) == pytest.approx(grid.sensitivity, rel=1e-9)
        part = min(noise.base, noise.extra)
        assert effective_multiplier(grid.sensitivity, math.sqrt(total), part, 12_080, grid.n_values) >= 1.0 - 1e-12
    with pytest.raises(MaskingError, match="coarse"):
        client_noise(Grid(1.0, 10, 0, 32), 1.0, 4_000, 6_040)


def test_a_sum_of_discrete_gaussians_is_as_private_as_is_claimed() -> None:
    """Renyi divergence of the exact convolution between shifted sums, against the bound, in one dimension."""
    x = np.arange(-200, 201)
    for parts, shift, alpha in [
        ([0.7] * 3, 1, 2), ([1.0] * 4, 2, 3), ([0.6] * 8, 3, 2), ([0.5] * 3 + [0.9] * 2, 2, 3), ([2.0, 0.5, 0.5], 1, 4),
    ]:  # fmt: skip
        total = np.ones(1)
        for s in parts:
            one = np.exp(-(x.astype(float) ** 2) / (2 * s * s))
            total = np.convolve(total, one / one.sum())
        p, q = total[shift:], total[:-shift]
        kept = (p > 1e-200) & (q > 1e-200)
        divergence = math.log(float((np.exp(alpha * np.log(p[kept]) + (1 - alpha) * np.log(q[kept]))).sum())) / (
            alpha - 1
        )
        z = effective_multiplier(shift, math.sqrt(sum(s * s for s in parts)), min(parts), len(parts), 1)
        assert divergence <= alpha / (2 * z * z) * (1 + 1e-9)
    assert effective_multiplier(1.0, 1.0, 0.4, 5, 1) == 0.0


@pytest.mark.parametrize(("n", "colluding"), [(12, 0.0), (30, 0.1), (943, 0.0), (943, 0.05)])
def test_noise_is_never_below_the_charge_and_hardly_above_it_whoever_stays(n: int, colluding: float) -> None:
    chosen = SecureSum(minimum=5, colluding=colluding)
    terms = agree_on("0" * 32, 0, 0, chosen, n, (("x", (9,)),), 1.0, 1.0, "system")
    noise, told = terms.client_noise(n), terms.colluding(n)
    charged = terms.grid.sensitivity**2
    for arrived in range(terms.needed(n), n + 1):
        kept = terms.keepers(n, arrived)
        assert kept <= arrived
        # At worst all that collude are among those who keep the extra part, so that it counts least.
        honest = (arrived - told) * noise.base**2 + max(0, kept - told) * noise.extra**2
        assert honest >= charged * (1 - 1e-9)
        assert honest - charged <= noise.extra**2 * (1 + 1e-9)
        assert terms.noise_excess(n, arrived) * charged == pytest.approx(
            arrived * noise.base**2 + kept * noise.extra**2, rel=1e-6
        )
    assert terms.keepers(n, n) == 0
    assert terms.keepers(n, terms.needed(n)) == terms.needed(n)


def test_without_removal_everybody_adds_noise_for_the_fewest() -> None:
    chosen = SecureSum(minimum=5, remove_excess=False)
    terms = agree_on("0" * 32, 0, 0, chosen, 30, (("x", (9,)),), 1.0, 1.0, "system")
    assert terms.client_noise(30).extra == 0.0
    assert 20 * terms.client_noise(30).base ** 2 == pytest.approx(terms.grid.sensitivity**2)
    assert [terms.noise_excess(30, n) for n in (20, 30)] == [1.0, 1.5]


def test_neighbours_know_each_other() -> None:
    found = ring_neighbours(list(range(50)), 10)
    assert all(own in found[other] and own != other for own, row in found.items() for other in row)
    assert {len(set(row)) for row in found.values()} == {10}
    assert {len(row) for row in ring_neighbours(list(range(5)), 4).values()} == {4}


def test_expected_dropouts_leave_enough_survivors() -> None:
    with pytest.raises(ValueError, match="more dropouts"):
        SecureSum(survivors=0.8, dropouts=0.3)
