"""Why an item is recommended: what each item of the history adds to its score, in NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedrec.models.configs import (
    AnyModelConfig,
    BlendConfig,
    FactorisationConfig,
    LightGcnConfig,
    MachineConfig,
    NearestConfig,
    PopularityConfig,
    SpectralConfig,
)
from fedrec.models.portable import part_of, score
from fedrec.params import Params

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Contributions:
    """What the scores of k items are made of.

    Attributes:
        history: [k, n] what each of the n history items adds to each score; 0 for those that the model no longer sees.
        rest: [k] what does not come from the history: popularity, weights of items, a common start.
        scores: [k] the scores.
        exact: whether ``history.sum(1) + rest`` is the score. If not, an entry is how much the score falls when that
            one interaction is left out, and entries need not add up.
    """

    history: Floats
    rest: Floats
    scores: Floats
    exact: bool


@dataclass(frozen=True)
class Reason:
    """One item of the history, or an attribute shared with such items, and what it adds to the score."""

    name: str
    contribution: float


@dataclass(frozen=True)
class Explanation:
    """Why one item has its score.

    Attributes:
        items: the history items that add most, by external id, largest first.
        attributes: attributes of the item that history items share, with the sum of what those items add.
        rest: what does not come from the history.
        exact: whether contributions add up to the score.
    """

    items: tuple[Reason, ...]
    attributes: tuple[Reason, ...]
    rest: float
    exact: bool

    def words(self, titles: Mapping[str, str]) -> str:
        """Return it as one line: ``Toy Story +0.41, Aladdin +0.10; shared: comedy +0.51``.

        Args:
            titles: what to call the items, by external id.
        """
        items = ", ".join(f"{titles.get(reason.name, reason.name)} {reason.contribution:+.2f}" for reason in self.items)
        shared = ", ".join(f"{reason.name} {reason.contribution:+.2f}" for reason in self.attributes)
        told = "; shared: ".join(part for part in (items, shared) if part)
        return told or "nothing in the history"


def contributions(
    config: AnyModelConfig, params: Params, history: Sequence[int], items: Sequence[int]
) -> Contributions:
    """Return what the scores of these items are made of.

    Exact for models whose score is a sum over the history once the person's scale is fixed: spectral, factorisation,
    nearest, factorisation machine, LightGCN, popularity, and blends of them. Others are asked again without each
    interaction.

    Args:
        config: the model's settings.
        params: its parameters, as released.
        history: item numbers, oldest first.
        items: k item numbers to explain.
    """
    chosen, n = np.asarray(items, np.int64), len(history)
    scores = score(config, params, history)[chosen].astype(np.float64)
    found = _linear(config, params, history, chosen)
    if found is not None:
        return Contributions(found, scores - found.sum(1), scores, exact=True)
    without = [score(config, params, [*history[:place], *history[place + 1 :]])[chosen] for place in range(n)]
    added = scores[:, None] - np.stack(without, axis=1) if n else np.zeros((len(chosen), 0))
    nothing = score(config, params, [])[chosen].astype(np.float64)
    return Contributions(added, nothing, scores, exact=False)


def _linear(config: AnyModelConfig, params: Params, history: Sequence[int], chosen: NDArray[np.int64]) -> Floats | None:
    """Return [k, n] parts of the scores, None if the model's scores are no sum over the history."""
    numbers, n = np.asarray(history, np.int64), len(history)
    found = np.zeros((len(chosen), n))
    if isinstance(config, PopularityConfig) or not n:
        return found
    if isinstance(config, BlendConfig):
        prior = _linear(config.prior, part_of(params, "prior."), history, chosen)
        fitted = _linear(config.fitted, part_of(params, "fitted."), history, chosen)
        if prior is None or fitted is None or not isinstance(config.fitted, FactorisationConfig):
            return None
        own = part_of(params, "fitted.")
        user = _solved(config.fitted, own, numbers[-config.fitted.length :]).sum(0)
        return np.asarray(prior + fitted * float(params["weight"][0]) / _spread(user, params["spread"]))
    if isinstance(config, SpectralConfig):
        later = config.decay if config.feature_decay is None else config.feature_decay
        seen = numbers[-config.length :]
        for table, spread, factor, decay in (
            ("items", "item_spread", config.item_weight, config.decay),
            ("features", "feature_spread", config.feature_weight, later),
        ):
            weighted = (decay ** np.arange(len(seen))[::-1])[:, None] * params[table][seen]
            scale = factor / _spread(weighted.sum(0), params[spread])
            found[:, n - len(seen) :] += scale * (params[table][chosen] @ weighted.T)
        return found
    if isinstance(config, FactorisationConfig):
        seen = numbers[-config.length :]
        found[:, n - len(seen) :] = params["item"][chosen] @ _solved(config, params, seen).T
        return found
    if isinstance(config, NearestConfig):
        unit = params["text"] / np.maximum(np.linalg.norm(params["text"], axis=1, keepdims=True), 1e-12)
        seen = numbers[-config.length :]
        weighted = (config.decay ** np.arange(len(seen))[::-1])[:, None] * unit[seen]
        scale = max(float(np.linalg.norm(weighted.sum(0))), 1e-12)
        found[:, n - len(seen) :] = unit[chosen] @ weighted.T / scale
        return found
    if isinstance(config, MachineConfig | LightGcnConfig):
        # A vector stands before the first interaction and counts as one, while it is in sight.
        seen = numbers[-config.length :] if n >= config.length else numbers
        count = min(n + 1, config.length)
        table, factor = ("taken", 1.0) if isinstance(config, MachineConfig) else ("item", _odd(config))
        found[:, n - len(seen) :] = factor * (params["item"][chosen] @ params[table][seen].T) / math.sqrt(count)
        return found
    return None


def _odd(config: LightGcnConfig) -> float:
    return math.sqrt(config.dim) * ((config.layers + 1) // 2) / (config.layers + 1)


def _spread(user: NDArray[Any], covariance: NDArray[Any]) -> float:
    variance = float(user @ covariance @ user)
    return math.sqrt(variance) if variance > 0 else math.inf


def _solved(config: FactorisationConfig, params: Params, seen: NDArray[np.int64]) -> Floats:
    """Return [n, d] rows that add up to the user vector: ``A^-1 v_j`` for each item of the history."""
    item = params["item"].astype(np.float64)
    own = item[seen]
    ridge = config.regularisation * max(len(seen), 1) * np.eye(config.dim)
    gram = own.T @ own + config.unobserved_weight * (item.T @ item) + ridge
    return np.asarray(np.linalg.solve(gram, own.T).T, np.float64)


def explain(
    config: AnyModelConfig,
    params: Params,
    history: Sequence[int],
    items: Sequence[int],
    ids: Sequence[str],
    attributes: Sequence[Sequence[str]] = (),
    most: int = 3,
) -> list[Explanation]:
    """Return why each of the items has its score.

    Args:
        config: the model's settings.
        params: its parameters, as released.
        history: item numbers, oldest first.
        items: item numbers to explain.
        ids: external ids of the whole catalogue.
        attributes: the tags of every item of the catalogue; without them no attribute is named.
        most: how many history items and attributes to name; only those that add something are.
    """
    parts = contributions(config, params, history, items)
    told = []
    for row, item in enumerate(items):
        by_item: dict[int, float] = {}
        for place, number in enumerate(history):  # somebody may have taken an item twice
            by_item[number] = by_item.get(number, 0.0) + float(parts.history[row, place])
        by_tag: dict[str, float] = {}
        for number, added in by_item.items() if attributes else ():
            for tag in set(attributes[number]) & set(attributes[item]):
                by_tag[tag] = by_tag.get(tag, 0.0) + added
        named = {ids[number]: added for number, added in by_item.items()}
        told.append(Explanation(_largest(named, most), _largest(by_tag, most), float(parts.rest[row]), parts.exact))
    return told


def _largest(parts: dict[str, float], most: int) -> tuple[Reason, ...]:
    ordered = sorted((name for name in parts if parts[name] > 0), key=lambda name: (-parts[name], name))
    return tuple(Reason(name, parts[name]) for name in ordered[:most])
