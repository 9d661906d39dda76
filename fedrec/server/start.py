"""Beginning from a release of another, public domain: what it knows of text and sequences, and nothing of its items."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from fedrec.config import Experiment
from fedrec.data.catalog import ItemCatalog
from fedrec.data.cleaning import Dataset
from fedrec.data.features import YEAR, Matrix, item_features
from fedrec.errors import ConfigError
from fedrec.models.build import MODELS
from fedrec.models.configs import (
    AnyModelConfig,
    LanguageConfig,
    ModelConfig,
    NearestConfig,
    SequenceConfig,
    TextTransformerConfig,
)
from fedrec.models.portable import expected_shapes
from fedrec.params import Array
from fedrec.server.registry import Registry
from fedrec.server.release import Release


def source_of(experiment: Experiment) -> Release | None:
    """Return the release that the experiment begins from; None: it begins from nothing.

    Raises:
        ConfigError: the two models differ in more than what is trained.
        RegistryError: there is no such release.
    """
    if experiment.start is None:
        return None
    registry = Registry(Path(experiment.start.registry))
    release = registry.load(experiment.start.release)
    theirs: AnyModelConfig = TypeAdapter(ModelConfig).validate_python(release.manifest.model)
    ours = experiment.model
    if not isinstance(ours, TextTransformerConfig) or not isinstance(theirs, TextTransformerConfig):
        raise ConfigError(
            'Only what is known by text can begin from another domain; use model.kind = "text_transformer" in both, '
            f"here it is '{ours.kind}' and there '{theirs.kind}'."
        )
    if theirs.features != ours.features:
        raise ConfigError(
            "[start]: the release was made with other model.features; copy its table into this experiment."
        )
    wanted, had = expected_shapes(ours, 1), expected_shapes(theirs, 1)
    odd = [name for name in sorted(wanted.keys() & had.keys()) if wanted[name] != had[name]]
    if odd or had.keys() - wanted.keys():
        name = (odd or sorted(had.keys() - wanted.keys()))[0]
        raise ConfigError(f"[start]: '{name}' of the release does not fit this model; give both the same sizes.")
    return release


def check_context(experiment: Experiment, dataset: Dataset) -> None:
    """Refuse a model that looks at times of day where only the order of interactions is known.

    Raises:
        ConfigError: it does.
    """
    model = experiment.model
    context = model.context if isinstance(model, SequenceConfig) else None
    if context is not None and context.timed and dataset.provenance.get("time_unit") in ("order", "blocks"):
        raise ConfigError(
            f"'{experiment.data.source}' knows no times of day, only the order of interactions; set "
            "model.context.hours to 0 and weekdays to false."
        )


def carried(experiment: Experiment, source: Release | None) -> dict[str, Array]:
    """Return the parameters that mean the same for any items: all but the rows, the last norm by the confidence."""
    if source is None or experiment.start is None:
        return {}
    config: AnyModelConfig = TypeAdapter(ModelConfig).validate_python(source.manifest.model)
    rows = MODELS[type(config)].row_names
    found = {name: value for name, value in source.params.items() if name not in rows}
    weighed = {name: found[name] * np.float32(experiment.start.confidence) for name in ("norm.weight", "norm.bias")}
    return {**found, **weighed}


def public_vectors(
    experiment: Experiment, catalog: ItemCatalog, n_fitted: int, source: Release | None = None
) -> Matrix | None:
    """Return [n, d] public vectors of all items; None: the model needs none.

    The space is the one that the first `n_fitted` items lay down, or that of the release to begin from.

    Raises:
        DataError: the items have neither text nor attributes, or the encoder is not installed.
    """
    model = experiment.model
    if not isinstance(model, TextTransformerConfig | LanguageConfig | NearestConfig):
        return None
    if source is None or experiment.start is None:
        return item_features(catalog, model.features, n_fitted)
    first = Registry(Path(experiment.start.registry)).lineage(source.version)[-1]
    n_first = Registry(Path(experiment.start.registry)).manifest(first.version).n_items
    if experiment.start.ages:
        catalog = moved(catalog, newest(source.catalog.prefix(n_first)) - newest(catalog.prefix(n_fitted)))
    return item_features(joined(source.catalog, catalog), model.features, n_first)[len(source.catalog) :]


def newest(catalog: ItemCatalog) -> int:
    """Return the latest year that a title ends with; 0: none does."""
    return max((int(found[1]) for title in catalog.titles if (found := YEAR.search(title))), default=0)


def moved(catalog: ItemCatalog, years: int) -> ItemCatalog:
    """Return the catalogue with the years at the ends of titles moved; only for its text.

    >>> moved(ItemCatalog(("1",), ("Gravity (2013)",), ((),), np.zeros(1, np.int64)), -13).titles
    ('Gravity (2000)',)
    """
    titles = (YEAR.sub(lambda found: f"({int(found[1]) + years})", title) for title in catalog.titles)
    return replace(catalog, titles=tuple(titles))


def joined(first: ItemCatalog, second: ItemCatalog) -> ItemCatalog:
    """Return both catalogues as one, the first one's items first; only for their text."""
    return ItemCatalog(
        (*(f"1/{item}" for item in first.ids), *(f"2/{item}" for item in second.ids)),
        (*first.titles, *second.titles),
        (*first.attributes, *second.attributes),
        np.zeros(len(first) + len(second), np.int64),
    )
