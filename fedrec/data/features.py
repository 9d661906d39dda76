"""Public vectors of items: text, attributes and year, mixed and whitened. Nothing here depends on anybody's history."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedrec.data.catalog import ItemCatalog
from fedrec.errors import DataError
from fedrec.random import Key

Matrix = NDArray[np.float32]
YEARS = np.linspace(1920.0, 2040.0, 61)
"""Centres of the bumps that a year is written as; each is three years wide."""
YEAR = re.compile(r"\((\d{4})\)\s*$")
_WORD = re.compile(r"\w+")


class TextEncoder(Protocol):
    """Turns texts into vectors; the same text always gets the same vector."""

    name: str

    def encode(self, texts: Sequence[str]) -> Matrix:
        """Return [n, d] vectors of length 1, or 0 for a text without a word that the encoder knows."""
        ...


class HashedText:
    """Words and their parts, hashed into a fixed number of places: needs no package, knows no meaning.

    Source: Weinberger et al., ICML 2009 (signed feature hashing); the parts are those of fastText.
    """

    name = "hashed"

    def __init__(self, dim: int = 256) -> None:
        """Hash into `dim` places."""
        self.dim = dim

    def encode(self, texts: Sequence[str]) -> Matrix:
        """Return [n, dim] vectors."""
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for row, text in enumerate(texts):
            for word in _WORD.findall(text.lower()):
                padded = f"<{word}>"
                for part in {word, *(padded[i : i + 4] for i in range(max(1, len(padded) - 3)))}:
                    place, sign = _hashed(part)
                    vectors[row, place % self.dim] += sign
        return _unit(vectors)


class StaticText:
    """The mean of static word-piece vectors of 256 numbers, distilled from large language models.

    Weights and tokenizer come with the package wordllama; its own loader looks for them on the network, so they are
    read from its folder here.

    Source: https://github.com/dleemiller/WordLlama (model "l2_supercat").
    """

    name = "wordllama"

    def __init__(self) -> None:
        """Find the package.

        Raises:
            DataError: it is not installed.
        """
        spec = find_spec("wordllama")
        if spec is None or spec.origin is None or find_spec("tokenizers") is None:
            raise DataError(
                "The text encoder 'wordllama' is not installed; install it with: pip install 'fedrec[text]', or choose "
                'encoder = "hashed", which needs no package.'
            )
        self._folder = Path(spec.origin).parent

    def encode(self, texts: Sequence[str]) -> Matrix:
        """Return [n, 256] vectors."""
        table, tokenizer = _static(self._folder)
        vectors = np.zeros((len(texts), table.shape[1]), np.float32)
        for row, found in enumerate(tokenizer.encode_batch(list(texts), add_special_tokens=False)):
            if found.ids:
                vectors[row] = table[found.ids].mean(axis=0)
        return _unit(vectors)


@lru_cache(maxsize=1)
def _static(folder: Path) -> tuple[Matrix, Any]:
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    (table,) = load_file(folder / "weights" / "l2_supercat_256.safetensors").values()
    return table.astype(np.float32), Tokenizer.from_file(
        str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json")
    )


class FeatureSettings(BaseModel):
    """How items become vectors."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")
    encoder: Literal["hashed", "wordllama", "minilm", "transformers", "vectors"] = "hashed"
    """"hashed" needs no package; "wordllama" (`pip install 'fedrec[text]'`) and "minilm" know meanings; "transformers"
    is any encoder at `path`; "vectors" reads plain vectors of items, of images for example, from the file at `path`."""
    path: str | None = None
    """Folder or hub name of a transformer, or a .npy or .safetensors file of vectors; read on the server only."""
    rank: int = Field(default=256, ge=2)
    """Length of the vectors; at most as many as items or raw features."""
    fourier: int = Field(default=2048, ge=0)
    """How many random Fourier features of the raw vectors stand beside them; 0: none."""
    bandwidth: float = Field(default=0.9, gt=0)
    """How fast the Fourier features vary: the inverse width of the kernel that they stand for."""
    popularity: float = Field(default=0.5, ge=0, le=1)
    """By which power of their released popularity items count when the directions are chosen, so that the space tells
    items apart that people take; 0: all alike."""
    spread: float = Field(default=0.0, ge=0, le=1)
    """Power of a direction's spread over the items that stays in its column, so that little of a contribution goes to
    directions in which items hardly differ; 0: all columns are of one length."""

    @model_validator(mode="after")
    def _path_where_needed(self) -> Self:
        if (self.path is not None) is not (self.encoder in ("transformers", "vectors")):
            raise ValueError('`path` goes with encoder = "transformers" or "vectors", and with no other')
        return self

    def digest(self) -> str:
        """Return the SHA-256 of the settings."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()


def make_encoder(name: str, path: str | None = None) -> TextEncoder:
    """Return a text encoder by name, or the transformer at `path`.

    Raises:
        DataError: its package is not installed.
    """
    if name == "wordllama":
        return StaticText()
    if name in ("minilm", "transformers"):
        from fedrec.data.encoders import TransformerText

        return TransformerText.minilm() if path is None else TransformerText(path)
    return HashedText()


def item_features(
    catalog: ItemCatalog, settings: FeatureSettings, n_fitted: int | None = None, popular: NDArray[Any] | None = None
) -> Matrix:
    r"""Return [n_items, rank] vectors of all items: principal components of their raw features.

    .. math:: B = (X - 1 \mu^T) \, V S^{t - 1}, \qquad \mu = X^T q, \quad
              V S^2 V^T = (X - 1 \mu^T)^T \mathrm{diag}(q) (X - 1 \mu^T), \quad q_i \propto c_i^a

    with c the items' popularity, a `settings.popularity` and t `settings.spread`. Means, scales and directions are
    taken from the first `n_fitted` items alone, so an item's vector never changes when others join later.

    Args:
        catalog: titles and attributes.
        settings: encoder and size.
        n_fitted: how many items there were when the space was laid down; None: all.
        popular: [>= n_fitted] released counts of when the space was laid down; None: all items count alike.

    Raises:
        DataError: the items have neither titles nor attributes, or the encoder is not installed.
    """
    n = len(catalog) if n_fitted is None else n_fitted
    raw = np.concatenate([_scaled(part, n) for part in _raw(catalog, settings, n)], axis=1)
    if settings.fourier:
        half = settings.fourier // 2
        directions = Key.from_seed(0).child("fourier").numpy().normal(0.0, settings.bandwidth, (raw.shape[1], half))
        angles = raw @ directions
        waves = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * (2.0 / np.sqrt(half))
        raw = np.concatenate([0.5 * raw, waves], axis=1)
    weights = _weights(popular, n) ** settings.popularity if popular is not None else np.ones(n)
    weights = weights[:, None] / weights.sum()
    centred = raw - (weights * raw[:n]).sum(axis=0)
    # Eigenvectors of the small Gram matrix are the right singular vectors, at a fraction of the cost.
    squares, columns = np.linalg.eigh((weights * centred[:n]).T @ centred[:n])
    spread = np.sqrt(np.maximum(squares[::-1], 0.0))
    rank = min(settings.rank, int((spread > spread[0] * 1e-4).sum()))
    # A sign that does not depend on the machine: the largest entry of a direction is positive.
    kept = columns.T[::-1][:rank]
    kept = kept * np.sign(np.take_along_axis(kept, np.abs(kept).argmax(axis=1)[:, None], axis=1))
    scale = spread[:rank, None] * (spread[0] / spread[:rank, None]) ** settings.spread
    vectors = centred @ (kept / scale).T
    vectors /= np.linalg.norm(vectors[:n], axis=1).mean()
    found = np.zeros((len(catalog), settings.rank), np.float32)
    found[:, :rank] = vectors
    return found


def _weights(popular: NDArray[Any], n: int) -> NDArray[np.float64]:
    """Return [n] positive popularity: a fifth of the mean is added, so that noise near 0 is not stretched."""
    taken = np.maximum(popular[:n].astype(np.float64), 0.0)
    return taken + 0.2 * taken.mean() if taken.any() else np.ones(n)


def _raw(catalog: ItemCatalog, settings: FeatureSettings, n: int) -> list[NDArray[np.float64]]:
    """Return text vectors, attributes and years of all items; the attributes known are those of the first n."""
    texts = [f"{title} {' '.join(tags)}" for title, tags in zip(catalog.titles, catalog.attributes, strict=True)]
    names = {tag: j for j, tag in enumerate(sorted({tag for tags in catalog.attributes[:n] for tag in tags}))}
    tags = np.zeros((len(catalog), max(1, len(names))))
    for row, own in enumerate(catalog.attributes):
        tags[row, [names[tag] for tag in own if tag in names]] = 1.0
    years = np.array([float(found[1]) if (found := YEAR.search(title)) else np.nan for title in catalog.titles])
    bumps = np.exp(-(((years[:, None] - YEARS) / 3.0) ** 2) / 2.0)
    if settings.encoder == "vectors":
        from fedrec.data.encoders import vectors_from

        main = _rows(vectors_from(Path(settings.path or ""), catalog.ids).astype(np.float64))
    else:
        main = make_encoder(settings.encoder, settings.path).encode(texts).astype(np.float64)
    parts = [main, _rows(tags), _rows(np.nan_to_num(bumps))]
    told = [part for part in parts if part.any()]
    if not told:
        raise DataError(
            "The catalogue has no text and no attributes, so its items have no features; set "
            "training.statistics.feature_share to 0."
        )
    return told


def _rows(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-9))


def _scaled(part: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Return the part centred and with rows of mean square length 1, as the first n rows say."""
    centred = part - part[:n].mean(axis=0)
    return np.asarray(centred / max(float(np.sqrt((centred[:n] ** 2).sum(axis=1).mean())), 1e-9))


def _unit(vectors: Matrix) -> Matrix:
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    return np.asarray(vectors / lengths, np.float32)


@lru_cache(maxsize=1 << 16)
def _hashed(part: str) -> tuple[int, float]:
    number = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
    return number >> 1, 1.0 if number & 1 else -1.0
