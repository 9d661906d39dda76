"""A release of a registry as devices take it: the model, the catalogue, and the server's signature."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import TypeAdapter, ValidationError

from fedrec.data.catalog import ItemCatalog
from fedrec.errors import RegistryError
from fedrec.models.configs import AnyModelConfig, ModelConfig, PopularityConfig
from fedrec.models.portable import check_params
from fedrec.protocol.signing import DeviceRelease, sign
from fedrec.server.release import Release


def signed_release(release: Release, key: Ed25519PrivateKey, catalog: ItemCatalog | None = None) -> bytes:
    """Return a release as a signed document for devices.

    Args:
        release: from the registry.
        key: the server's.
        catalog: the catalogue that plans number items by, if it has grown since; the release's own if not given.

    Raises:
        RegistryError: a device without torch could not score with this model.
    """
    try:
        config: AnyModelConfig = TypeAdapter(ModelConfig).validate_python(release.manifest.model)
        check_params(config, release.manifest.n_items, release.params)
    except (ValidationError, ValueError, KeyError) as error:
        raise RegistryError(f"Release {release.version} holds a model that devices cannot score with.") from error
    items = catalog or release.catalog
    made = DeviceRelease(release.version, config, release.params, items, release.manifest.n_items)
    return sign("release", made.to_bytes(), key)


def first_release(catalog: ItemCatalog, key: Ed25519PrivateKey) -> bytes:
    """Return release 0: the catalogue and no taste yet, so that devices can take part in the first round."""
    nothing = {"counts": np.zeros(len(catalog), np.float32)}
    return sign("release", DeviceRelease(0, PopularityConfig(), nothing, catalog).to_bytes(), key)
