"""Keys: the same name gives the same numbers, another name others, and the numbers are uniform."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.random import Key, bits_of, uniforms_of

KEY = Key.from_seed(3)


def test_a_path_names_a_stream() -> None:
    assert KEY.child("round", 3) == KEY.child("round").child(3)
    assert len({KEY, KEY.child("a"), KEY.child("b"), KEY.child("a", "b"), KEY.child("b", "a"), Key.from_seed(4)}) == 6


def test_text_and_numbers_are_different_names() -> None:
    assert KEY.child("3") != KEY.child(3)
    assert KEY.child("int:3") != KEY.child(3)
    assert KEY.child("ab") != KEY.child("a", "b")


def test_a_numpy_integer_is_the_number_that_it_holds() -> None:
    assert KEY.child(np.int64(3)) == KEY.child(np.int32(3)) == KEY.child(3)
    with pytest.raises(TypeError):
        KEY.child(3.0)  # type: ignore[arg-type]


def test_hex_goes_there_and_back() -> None:
    assert len(KEY.hex()) == 64
    assert Key.from_hex(KEY.hex()) == KEY


@pytest.mark.parametrize("text", ["", "ab", "zz" * 32, "00" * 33])
def test_what_is_not_a_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"32 bytes|hexadecimal"):
        Key.from_hex(text)


def test_integers_seed_any_generator() -> None:
    values = [KEY.child(i).integer() for i in range(200)]
    assert all(0 <= value < 2**63 for value in values)
    assert len(set(values)) == 200
    assert max(values) > 2**62


def test_numpy_starts_the_same_stream_each_time() -> None:
    assert np.array_equal(KEY.numpy().random(5), KEY.numpy().random(5))
    assert not np.array_equal(KEY.numpy().random(5), KEY.child(0).numpy().random(5))


def test_the_numbers_of_a_seed_never_change() -> None:
    """Written down from this code when the package began: a release must be reproducible by a later version."""
    assert Key.from_seed(0).hex() == "44a19fde9a0fb356857ae498b2347721d6504ee2d38ec2569fcacbcf3684f20a"
    assert KEY.child("round", 3).integer() == 186095735329631196
    np.testing.assert_array_equal(
        KEY.bits(np.array([0, 7]), 2),
        np.array([[14529071734532378324, 2023437736730903286], [1185346166698074268, 8774236690750646503]], np.uint64),
    )


def test_an_entity_draws_the_same_alone_in_a_batch_and_with_more_draws() -> None:
    together = KEY.bits(np.array([5, 17, 0, 5]), 4)
    assert np.array_equal(together[1], KEY.bits(np.array([17]), 4)[0])
    assert np.array_equal(together[0], together[3])
    assert np.array_equal(together, KEY.bits(np.array([5, 17, 0, 5]), 9)[:, :4])
    assert KEY.bits(np.array([], np.int64), 3).shape == (0, 3)


def test_neighbouring_entities_and_draws_do_not_share_numbers() -> None:
    """A counter-based generator that adds counters to entities would repeat itself along the diagonal."""
    bits = KEY.bits(np.arange(300), 300)
    assert len(np.unique(bits)) == bits.size


def test_uniforms_are_uniform_and_independent_of_entity_and_draw() -> None:
    """Chi-square over 64 bins of 90,000 numbers; 103.4 is the 99.9 % quantile at 63 degrees of freedom (scipy)."""
    u = KEY.uniforms(np.arange(300), 300)
    assert u.min() >= 0
    assert u.max() < 1
    for values in (u.ravel(), u[:, 0].repeat(1), u[0]):
        observed = np.histogram(values, 64, (0, 1))[0]
        expected = len(values) / 64
        assert ((observed - expected) ** 2 / expected).sum() < 103.4
    n = u.size - 300
    for one, other in ((u[1:].ravel(), u[:-1].ravel()), (u[:, 1:].ravel(), u[:, :-1].ravel())):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(n)


def test_every_bit_is_fair() -> None:
    bits = KEY.bits(np.arange(2000), 8)
    share = np.array([((bits >> np.uint64(place)) & np.uint64(1)).mean() for place in range(64)])
    assert np.abs(share - 0.5).max() < 4.5 * 0.5 / np.sqrt(bits.size)


def test_several_keys_at_once_give_what_each_gives_alone() -> None:
    keys, entities = [KEY.child(step) for step in range(3)], np.array([5, 0, 2**40])
    for key, bits, uniforms in zip(keys, bits_of(keys, entities, 4), uniforms_of(keys, entities, 4), strict=True):
        np.testing.assert_array_equal(bits, key.bits(entities, 4))
        np.testing.assert_array_equal(uniforms, key.uniforms(entities, 4))
