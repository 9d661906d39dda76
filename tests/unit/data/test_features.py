"""Item features are public, deterministic, white over the items they were fitted on, and stay when others join."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.data.catalog import ItemCatalog
from fedrec.data.features import FeatureSettings, HashedText, item_features, make_encoder
from fedrec.errors import DataError

GENRES = (("Drama",), ("Comedy", "Drama"), ("Horror",), (), ("Comedy",))


def catalog(n: int) -> ItemCatalog:
    return ItemCatalog(
        tuple(f"i{place}" for place in range(n)),
        tuple(f"The film number {place} of {place % 7} ({1950 + place % 60})" for place in range(n)),
        tuple(GENRES[place % 5] for place in range(n)),
        np.arange(n, dtype=np.int64),
    )


@pytest.mark.parametrize("fourier", [0, 64])
def test_features_are_white_over_the_items_they_were_fitted_on(fourier: int) -> None:
    settings = FeatureSettings(rank=12, fourier=fourier, spread=0.0)
    found = item_features(catalog(80), settings)
    assert found.shape == (80, 12)
    assert found.dtype == np.float32
    gram = found.T @ found
    np.testing.assert_allclose(gram, np.eye(12) * gram[0, 0], atol=1e-3 * gram[0, 0])
    assert float(np.linalg.norm(found, axis=1).mean()) == pytest.approx(1.0, rel=1e-4)


def test_popular_items_and_large_differences_shape_the_space() -> None:
    popular = 1.0 / np.arange(1, 81)
    weights = (popular + 0.2 * popular.mean())[:, None]
    gram: dict[float, np.ndarray] = {}
    for spread in (0.0, 0.5):
        settings = FeatureSettings(rank=12, fourier=0, popularity=1.0, spread=spread)
        found = item_features(catalog(80), settings, popular=popular)
        gram[spread] = (weights * found).T @ found
        np.testing.assert_allclose((weights * found).sum(axis=0), 0.0, atol=1e-4)
        np.testing.assert_allclose(gram[spread], np.diag(np.diag(gram[spread])), atol=1e-3 * gram[spread][0, 0])
    np.testing.assert_allclose(np.diag(gram[0.0]), gram[0.0][0, 0], rtol=1e-3)
    assert (np.diff(np.diag(gram[0.5])) < 0).all()


def test_the_same_catalogue_gives_the_same_bytes() -> None:
    settings = FeatureSettings(rank=8, fourier=32)
    assert item_features(catalog(50), settings).tobytes() == item_features(catalog(50), settings).tobytes()


def test_an_item_keeps_its_vector_when_others_join() -> None:
    settings = FeatureSettings(rank=8, fourier=32)
    before = item_features(catalog(50), settings)
    after = item_features(catalog(70), settings, n_fitted=50)
    popular = np.arange(70.0)
    weighed = [item_features(catalog(n), settings, n_fitted=50, popular=popular[:n]) for n in (50, 70)]
    np.testing.assert_allclose(weighed[1][:50], weighed[0], atol=1e-5)
    np.testing.assert_allclose(after[:50], before, atol=1e-5)
    assert np.linalg.norm(after[50:], axis=1).min() > 0


def test_fewer_directions_than_asked_for_leave_zeros() -> None:
    found = item_features(catalog(6), FeatureSettings(rank=20, fourier=0))
    assert found.shape == (6, 20)
    assert not found[:, 6:].any()


def test_a_catalogue_without_any_text_is_refused() -> None:
    bare = ItemCatalog(("a", "b", "c"), ("", "", ""), ((), (), ()), np.arange(3))
    with pytest.raises(DataError, match="no text"):
        item_features(bare, FeatureSettings(rank=4))


def test_like_texts_get_like_vectors() -> None:
    vectors = HashedText().encode(["Star Wars", "Star Wars II", "Gone with the Wind", ""])
    assert np.linalg.norm(vectors, axis=1).tolist() == pytest.approx([1, 1, 1, 0], abs=1e-6)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3


def test_the_static_encoder_knows_meanings() -> None:
    pytest.importorskip("wordllama")
    vectors = make_encoder("wordllama").encode(["a scary ghost movie", "horror film with spirits", "wedding comedy"])
    assert vectors.shape == (3, 256)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedrec.data.features.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"fedrec\[text\]"):
        make_encoder("wordllama")
