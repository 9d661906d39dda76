"""What a score is made of adds up where it claims to, and is what leaving out would cost where it does not."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.models import portable
from fedrec.models.build import build
from fedrec.models.configs import AnyModelConfig, BlendConfig, FactorisationConfig, SpectralConfig
from fedrec.models.explain import contributions, explain
from fedrec.models.recommender import get_params
from fedrec.params import Params
from tests.contracts.recommender import KEY, RECOMMENDERS

N_ITEMS = 23
CONFIGS: dict[str, AnyModelConfig] = {name: entry.config for name, entry in RECOMMENDERS.items()}
CONFIGS["blend of factorisation"] = BlendConfig(
    prior=SpectralConfig(item_rank=4, feature_rank=3, length=16), fitted=FactorisationConfig(dim=5, length=16)
)
EXACT = {
    "popularity", "spectral", "factorisation", "nearest", "lightgcn", "factorisation machine",
    "blend of factorisation", "machine, full softmax, popularity",
}  # fmt: skip
HISTORIES = ([], [3], [1, 2, 3, 2, 7], [*range(20), 4, 5])


def drawn(config: AnyModelConfig) -> Params:
    draws = KEY.child("params").numpy()
    fresh = get_params(build(config, N_ITEMS, KEY))
    params = {name: draws.normal(0, 0.3, v.shape).astype(np.float32) for name, v in fresh.items()}
    spreads = {name: value @ value.T for name, value in params.items() if name.endswith("spread")}
    return params | spreads


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_called_exact_adds_up_and_the_rest_does_not_depend_on_the_item_of_history(name: str) -> None:
    config = CONFIGS[name]
    params = drawn(config)
    for history in HISTORIES:
        found = contributions(config, params, history, [0, 9, 22])
        assert found.history.shape == (3, len(history))
        assert np.isfinite(found.scores).all()
        np.testing.assert_allclose(found.scores, portable.score(config, params, history)[[0, 9, 22]], rtol=1e-5)
        if found.exact:
            np.testing.assert_allclose(found.history.sum(1) + found.rest, found.scores, atol=1e-6)
    assert contributions(config, params, [1, 2, 3], [0]).exact is (name in EXACT)


@pytest.mark.parametrize("name", sorted(EXACT - {"popularity"}))
def test_exact_parts_are_those_of_the_score_and_not_merely_a_remainder(name: str) -> None:
    """Moving what one history item brings moves its part, and what does not come from the history stays."""
    config, history = CONFIGS[name], [1, 2, 3, 7]
    params = drawn(config)
    nothing = portable.score(config, params, [])
    found = contributions(config, params, history, range(N_ITEMS))
    if name in ("spectral", "blend of factorisation", "nearest"):  # their rest is the score of an empty history
        np.testing.assert_allclose(found.rest, nothing, atol=1e-5)
    if name == "factorisation":
        np.testing.assert_allclose(found.rest, 0.0, atol=1e-5)
    if name == "factorisation machine":
        start = params["item"] @ params["start"] / np.sqrt(len(history) + 1)
        np.testing.assert_allclose(found.rest, start + params["bias"][:, 0], atol=1e-5)
    assert np.abs(found.history).max() > 1e-3


def test_leaving_out_is_what_leaving_out_costs() -> None:
    config = CONFIGS["transformer"]
    params = drawn(config)
    found = contributions(config, params, [4, 8, 15], [2])
    without = portable.score(config, params, [4, 15])[2]
    assert found.history[0, 1] == pytest.approx(found.scores[0] - without, abs=1e-5)


def test_an_explanation_names_items_and_shared_attributes_largest_first() -> None:
    params = {"text": np.array([[1, 0], [0.9, 0.1], [0, 1], [1, 0.05], [-1, 0]], np.float32)}
    config = CONFIGS["nearest"]
    ids, tags = ["a", "b", "c", "d", "e"], [["war"], ["war", "sea"], ["sea"], ["war"], []]
    (told,) = explain(config, params, [2, 1, 0], [3], ids, tags)
    assert [reason.name for reason in told.items] == ["a", "b", "c"]
    assert [reason.name for reason in told.attributes] == ["war"]
    assert told.attributes[0].contribution == pytest.approx(sum(reason.contribution for reason in told.items[:2]))
    assert told.words({"a": "Alien"}).startswith("Alien +")
    (against,) = explain(config, params, [4], [3], ids, tags)
    assert against.items == ()  # what speaks against an item is no reason for it
    assert against.words({}) == "nothing in the history"
