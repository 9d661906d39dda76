"""Which parameters rounds train and updates carry; without torch, since the server's checks need no model."""

from __future__ import annotations

from collections.abc import Iterable

from fedrec.models.configs import AnyModelConfig, LanguageConfig, NearestConfig, SequenceConfig, TextTransformerConfig

PUBLIC = "text"
"""The table of public item vectors: never trained, and filled in by the server as items join."""
PRIOR = "popularity"
"""[n, 1] logarithms of the released counts in a model of sequences: never trained, filled in as a slice begins."""
_SMALL = frozenset({"residual", "start", "moment"})
_SMALL_ENDS = (".up", ".bias", ".recency", "norm.weight", "norm1.weight", "norm2.weight")
_NOT_UNDER_NOISE = frozenset({"projection.bias", "projection.up"})
"""The bias moves every item alike, so it hardly tells items apart; yet its gradient would take a third of a clipped
update. Of the projection the inward half is trained, see `Adapted`."""
_HEAD = frozenset({"residual", "mix", "moment", "norm.weight", "norm.bias"})


def trains(config: AnyModelConfig, name: str) -> bool:
    """Return whether rounds train this parameter of a model of these settings."""
    if isinstance(config, NearestConfig):
        return False
    if isinstance(config, SequenceConfig) and name == PRIOR:
        return False
    if isinstance(config, LanguageConfig):
        return name != PUBLIC
    if not isinstance(config, TextTransformerConfig):
        return True
    if name == PUBLIC:
        return False
    if config.train == "all" or name.startswith("heads."):
        return True
    small = name in _SMALL or name.endswith(_SMALL_ENDS)
    if config.train == "adapters":
        return small or name == "mix" or name.endswith(".down")
    if config.train == "ffa":
        return (small and name not in _NOT_UNDER_NOISE) or name == "projection.down"
    if name in _HEAD:
        return True
    lowest = config.blocks - config.top if config.train == "top" else config.blocks
    return name.startswith("blocks.") and int(name.split(".")[1]) >= lowest


def needs_vectors(config: AnyModelConfig) -> bool:
    """Return whether the model knows items by public vectors, which the server has to make."""
    return isinstance(config, TextTransformerConfig | LanguageConfig | NearestConfig)


def trainable(config: AnyModelConfig, names: Iterable[str]) -> list[str]:
    """Return those of the names that rounds train, in their order."""
    return [name for name in names if trains(config, name)]
