"""What somebody gets from a release, whoever they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedrec.data.catalog import ItemCatalog
from fedrec.errors import UnknownItem
from fedrec.models.build import build
from fedrec.models.configs import AnyModelConfig, FactorisationConfig, PopularityConfig, TransformerConfig
from fedrec.models.recommender import get_params
from fedrec.random import Key
from fedrec.server.recommend import recommend
from fedrec.server.registry import Registry, Release

N = 12
CATALOG = ItemCatalog(
    tuple(f"i{n}" for n in range(N)),
    tuple(f"Title {n}" for n in range(N)),
    tuple(("drama", "war") if n % 2 else () for n in range(N)),
    np.arange(N, dtype=np.int64),
)
COUNTS = {"counts": np.array([5, 9, 1, 9, 0, 3, 3, 3, 8, 2, 7, 6], np.float32)}


def release(root: Path, model: AnyModelConfig, params: dict[str, np.ndarray]) -> Release:
    """Publish and load, as a server and a client would."""
    Registry(root).publish(
        params, CATALOG, run="r/001", slice=0, parent=None, model=model.model_dump(mode="json"),
        experiment={}, experiment_digest="", metrics={}, privacy={},
    )  # fmt: skip
    return Registry(root).load()


def test_the_best_items_come_first_ties_in_order_of_arrival(tmp_path: Path) -> None:
    found = recommend(release(tmp_path, PopularityConfig(), COUNTS), [], 5)
    assert found.history_titles == ()
    assert [item.id for item in found.items] == ["i1", "i3", "i8", "i10", "i11"]
    assert [item.rank for item in found.items] == [1, 2, 3, 4, 5]
    assert [item.score for item in found.items] == [9.0, 9.0, 8.0, 7.0, 6.0]
    first = found.items[0].to_dict()
    assert first == {"rank": 1, "id": "i1", "title": "Title 1", "attributes": ("drama", "war"), "score": 9.0}


def test_nothing_that_is_in_the_history_comes_back(tmp_path: Path) -> None:
    found = recommend(release(tmp_path, PopularityConfig(), COUNTS), ["i3", "i8", "i3"], 3)
    assert found.history_titles == ("Title 3", "Title 8", "Title 3")
    assert [item.id for item in found.items] == ["i1", "i10", "i11"]


def test_asking_for_more_than_there_is_gives_all_there_is(tmp_path: Path) -> None:
    loaded = release(tmp_path, PopularityConfig(), COUNTS)
    assert len(recommend(loaded, ["i0", "i1"], 50).items) == N - 2
    assert recommend(loaded, list(CATALOG.ids), 50).items == ()


def test_an_unknown_item_is_named(tmp_path: Path) -> None:
    loaded = release(tmp_path, PopularityConfig(), COUNTS)
    with pytest.raises(UnknownItem, match=r"Unknown item id 'i99': the catalogue of 12 items has none"):
        recommend(loaded, ["i1", "i99"], 5)


def test_the_history_and_its_order_matter_to_a_model_of_sequences(tmp_path: Path) -> None:
    config = TransformerConfig(dim=8, heads=2, length=4, expand=1)
    params = {name: value * 20 for name, value in get_params(build(config, N, Key.from_seed(1))).items()}
    loaded = release(tmp_path, config, params)
    histories = ([], ["i1", "i2"], ["i2", "i1"], [f"i{n}" for n in range(9)])
    scores = [[item.score for item in recommend(loaded, history, N).items] for history in histories]
    assert all(len(one) == N - len(set(history)) for one, history in zip(scores, histories, strict=True))
    assert all(one == sorted(one, reverse=True) for one in scores)
    assert scores[1] != scores[2]
    assert recommend(loaded, histories[1], N) == recommend(loaded, histories[1], N)


def test_reasons_come_only_if_asked_for_and_name_the_history(tmp_path: Path) -> None:
    rows = np.eye(N, 4, dtype=np.float32) + 0.1
    loaded = release(tmp_path, FactorisationConfig(dim=4), {"item": rows})
    assert "why" not in recommend(loaded, ["i0"], 3).items[0].to_dict()
    found = recommend(loaded, ["i0", "i1"], 3, why=True).items[0]
    assert found.why is not None
    assert {reason.name for reason in found.why.items} <= {"i0", "i1"}
    assert found.to_dict()["why"]["exact"] is True
