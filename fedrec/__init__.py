"""fedrec: a federated lifelong recommender framework.

Importing fedrec does no work and loads nothing heavy: the names below are looked up when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Experiment": "fedrec.config",
    "FedrecError": "fedrec.errors",
    "InteractionLog": "fedrec.data.log",
    "ItemCatalog": "fedrec.data.catalog",
    "Key": "fedrec.random",
    "Registry": "fedrec.server.registry",
}

__all__ = ["Experiment", "FedrecError", "InteractionLog", "ItemCatalog", "Key", "Registry", "__version__"]


def __getattr__(name: str) -> Any:
    """Load a public name from its home module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedrec' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
