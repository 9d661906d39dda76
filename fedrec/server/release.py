"""What a release is: its manifest, its line in the registry, and the thing itself."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict
from safetensors import numpy as safetensors

from fedrec.data.catalog import ItemCatalog
from fedrec.errors import CorruptRelease
from fedrec.params import Array, Params
from fedrec.server.files import read_file


def plain(value: Any) -> Any:
    """Return `value` as it comes back from JSON: text keys, lists, Python numbers; None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


Document = Annotated[dict[str, Any], BeforeValidator(plain)]


class Manifest(BaseModel):
    """What a release is; it holds no time of day, so an interrupted and resumed run writes the same bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    """Version of this layout."""
    version: int
    """Number of the release in its registry, from 1."""
    run: str
    """Name of the run that made it."""
    slice: int
    """Index of the time slice after which it was made."""
    parent: int | None
    """The release it grew from; None for the first of a line."""
    model: Document
    """The model's configuration."""
    catalog_digest: str
    """SHA-256 of the `ItemCatalog`."""
    n_items: int
    """How many items the model knows."""
    experiment: Document
    """The whole experiment file, defaults included."""
    experiment_digest: str
    """Digest of the experiment."""
    metrics: Document
    """What was measured, by recommender, group of people and metric."""
    privacy: Document
    """What the release cost: the guarantee and its unit."""
    lesson: Document | None = None
    """Who taught it after the rounds, on what, and at what cost; None if nobody did."""
    student: Document | None = None
    """The small recommender for devices beside it: "model", "sha256" of ``student.safetensors``, and its "facts"."""
    sha256: str
    """SHA-256 of the bytes of ``model.safetensors``."""
    params_digest: str
    """`fedrec.params.digest` of the tensors."""

    def to_bytes(self) -> bytes:
        """Return the JSON document; equal manifests give equal bytes."""
        text = json.dumps(self.model_dump(), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode()


@dataclass(frozen=True)
class ReleaseRow:
    """One line of the registry.

    Attributes:
        version: number of the release, from 1.
        run: name of the run that made it.
        slice: index of the time slice.
        parent: the release it grew from.
        digest: SHA-256 of the manifest.
        catalog_digest: SHA-256 of the catalogue.
        experiment_digest: digest of the experiment.
        created_at: seconds since 1970 UTC.
        promoted: whether it ever was the current release.
        current: whether it is now.
    """

    version: int
    run: str
    slice: int
    parent: int | None
    digest: str
    catalog_digest: str
    experiment_digest: str
    created_at: int
    promoted: bool
    current: bool


@dataclass(frozen=True, eq=False)
class Student:
    """A small recommender for devices, to be published beside a release.

    Attributes:
        model: its configuration.
        params: its tensors.
        facts: its size beside the release's, how it was taught, and at what cost of privacy.
    """

    model: dict[str, Any]
    params: dict[str, Array]
    facts: dict[str, Any]

    def document(self, sha256: str) -> dict[str, Any]:
        """Return what a manifest says of it; `sha256` is that of its file."""
        return {"model": self.model, "facts": self.facts, "sha256": sha256}


@dataclass(frozen=True, eq=False)
class Release:
    """A release with all that is needed to recommend from it."""

    version: int
    manifest: Manifest
    params: dict[str, Array]
    catalog: ItemCatalog
    student: dict[str, Array] | None = None


def read_part(version: int, path: Path) -> bytes:
    """Return a file of a release.

    Raises:
        CorruptRelease: it is missing.
    """
    data = read_file(path)
    if data is None:
        raise corrupt(version, path, "is missing")
    return data


def checked_part(version: int, path: Path, sha256: str) -> bytes:
    """Return a file of a release whose digest is known.

    Raises:
        CorruptRelease: it is missing or was changed.
    """
    data = read_part(version, path)
    if sha256_of(data) != sha256:
        raise corrupt(version, path, "does not match its SHA-256")
    return data


def tensor_bytes(params: Params) -> bytes:
    """Return tensors as a release holds them."""
    data: bytes = safetensors.save({name: np.asarray(value, order="C") for name, value in params.items()})
    return data


def sha256_of(data: bytes) -> str:
    """Return the digest of a file, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def corrupt(version: int, path: Path, what: str) -> CorruptRelease:
    """Return the error for a release that cannot be trusted."""
    return CorruptRelease(
        f"Release {version} is damaged: '{path}' {what}; restore that file from a backup, or serve another release "
        "with `fedrec releases rollback` or `promote VERSION`."
    )
