"""`fedrec export`: a release as one file for devices, or as an ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter

from fedrec.errors import FedrecError
from fedrec.models import portable
from fedrec.models.compress import DeviceModel, prune, read_device, slim, write_device
from fedrec.models.configs import AnyModelConfig, ModelConfig
from fedrec.params import n_bytes
from fedrec.random import Key
from fedrec.server.files import write_atomically
from fedrec.server.release import Release

Format = Literal["device", "onnx"]
LISTS = 50
"""Made-up histories on which the top 10 of file and release are compared."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        release: the release that it was made from.
        kind: of model, as it was written.
        bytes: size of the file.
        release_bytes: size of the release's parameters.
        overlap: mean share of the release's top 10 that the file's top 10 holds, over made-up histories.
    """

    path: str
    release: int
    kind: str
    bytes: int
    release_bytes: int
    overlap: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


def export(release: Release, path: Path, kind: Format = "device", bits: int = 8, keep: float = 1.0) -> Exported:
    """Write a release as a file for devices, or as an ONNX graph.

    Args:
        release: from the registry.
        path: of the file; replaced if it is there.
        kind: "device" (read by `fedrec.models.compress.read_device`) or "onnx".
        bits: of a device file, 8 or 32; an ONNX graph holds 32.
        keep: share that pruning keeps; 1: all.

    Raises:
        FedrecError: the model cannot be written so, a package is missing, or the disk refuses.
    """
    whole: AnyModelConfig = TypeAdapter(ModelConfig).validate_python(release.manifest.model)
    config, params = slim(whole, release.params)
    if keep != 1.0:
        config, params = prune(config, params, keep)
    if kind == "onnx":
        from fedrec.serving.export import to_onnx

        data = to_onnx(config, params).SerializeToString()
    else:
        what = DeviceModel(
            model=config,
            n_items=release.manifest.n_items,
            catalog_digest=release.manifest.catalog_digest,
            release=release.version,
            release_digest=release.manifest.params_digest,
        )
        data = write_device(what, params, bits)
        config, params = what.model, read_device(data)[1]
    try:
        write_atomically(path, data)
    except OSError as error:
        raise FedrecError(f"Cannot write '{path}': {error.strerror or error}.") from error
    overlap = _overlap((whole, release.params), (config, params), release.manifest.n_items)
    return Exported(str(path), release.version, config.kind, len(data), n_bytes(release.params), overlap)


def _overlap(one: tuple[AnyModelConfig, Any], other: tuple[AnyModelConfig, Any], n_items: int, k: int = 10) -> float:
    draws = Key.from_seed(0).child("export").numpy()
    shares = []
    for _ in range(LISTS):
        history = [int(i) for i in draws.integers(0, n_items, 1 + int(draws.integers(20)))]
        lists = [_best(portable.score(config, params, history), history, k) for config, params in (one, other)]
        shares.append(len(lists[0] & lists[1]) / max(1, len(lists[0])))
    return float(np.mean(shares))


def _best(scores: Any, history: Sequence[int], k: int) -> set[int]:
    ranked = np.array(scores, np.float64)
    ranked[list(history)] = -np.inf
    return {int(i) for i in np.argsort(-ranked, kind="stable")[:k] if np.isfinite(ranked[i])}
