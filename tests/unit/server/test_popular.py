"""Released popularity as a model's prior: filled in by the server, known to scores and losses, never trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.config import Experiment
from fedrec.grid.simulate import simulate
from fedrec.models.build import build, restore
from fedrec.models.configs import BlendConfig, TransformerConfig
from fedrec.models.freeze import PRIOR, trainable
from fedrec.models.recommender import get_params
from fedrec.params import n_bytes
from fedrec.random import Key
from fedrec.server.popular import log_popularity, with_popularity
from fedrec.server.pretrain import pretrain
from fedrec.server.recommend import recommend
from fedrec.server.registry import Registry
from fedrec.server.student import begun
from tests.support import dataset_of, merged, small_document, small_rows

DATASET = dataset_of(small_rows())
PRIVATE = {
    "mode": "central", "epsilon": 8.0, "delta": 1e-3, "noise": "seed", "metrics": "research", "population": 29,
}  # fmt: skip


def experiment(**changes: Any) -> Experiment:
    return Experiment.parse(merged(small_document(), merged({"model": {"popularity_weight": 1.0}}, changes)))


def test_each_slice_has_the_counts_of_all_so_far_and_no_round_moves_them(tmp_path: Path) -> None:
    wanted = experiment()
    document, _ = simulate(wanted, runs=tmp_path, registry=tmp_path / "r", dataset=DATASET)
    registry = Registry(tmp_path / "r")
    for version in (1, 2, 3):
        release = registry.load(version)
        popularity = release.params[PRIOR]
        assert popularity.shape == (release.manifest.n_items, 1)
        assert PRIOR not in trainable(wanted.model, release.params)
    counts = registry.load(1).params[PRIOR][:, 0], registry.load(3).params[PRIOR][:, 0]
    assert np.allclose(np.expm1(counts[0]), np.rint(np.expm1(counts[0])), atol=1e-4)  # logarithms of whole numbers
    assert (counts[1][: len(counts[0])] >= counts[0]).all()
    assert counts[1].sum() > counts[0].sum()
    plain, _ = simulate(
        experiment(model={"popularity_weight": 0.0}),
        runs=tmp_path / "p",
        registry=tmp_path / "p" / "r",
        dataset=DATASET,
    )
    up = [[r["bytes_up"] for r in one["rounds"] if r["clients"]] for one in (document, plain)]
    assert up[0] == up[1]  # it never travels back


def test_without_rounds_the_most_popular_come_first_and_who_trains_alone_knows_no_counts(tmp_path: Path) -> None:
    wanted = experiment(
        model={"popularity_weight": 50.0}, training={"base": {"rounds": 0}, "later": {"rounds": 0}}, split={"later": 0}
    )
    document, _ = simulate(wanted, runs=tmp_path, registry=tmp_path / "r", dataset=DATASET)
    release = Registry(tmp_path / "r").load()
    popularity = release.params[PRIOR][:, 0]
    ranked = [popularity[release.catalog.numbers([item.id])[0]] for item in recommend(release, ["i1"], 20).items]
    assert ranked == sorted(ranked, reverse=True)
    rows = document["releases"][-1]["rows"]
    ndcg = {name: rows[name]["all"]["metrics"]["ndcg@10"]["value"] for name in ("release", "local_only")}
    assert ndcg["local_only"] < ndcg["release"]


def test_under_noise_the_unit_is_the_noise(tmp_path: Path) -> None:
    wanted = experiment(privacy=PRIVATE, training={"cohort": {"expected": 15.0}}, split={"later": 0})
    document, _ = simulate(wanted, runs=tmp_path, registry=tmp_path / "r", dataset=DATASET)
    assert document["totals"]["epsilon"] <= 8.0
    simulate(experiment(split={"later": 0}), runs=tmp_path, registry=tmp_path / "e", dataset=DATASET)
    noised, plain = (Registry(tmp_path / name).load().params[PRIOR] for name in ("r", "e"))
    assert (noised >= 0).all()
    assert noised.max() < plain.max()
    counts, sigma = np.array([-5.0, 0.0, 3.0, 30.0], np.float32), 3.0
    assert np.allclose(log_popularity(counts, sigma), np.log([1, 1, 2, 11]))
    assert np.allclose(log_popularity(counts, 0.2), np.log([1, 1, 4, 31]))


def test_pre_training_counts_what_it_trains_on(tmp_path: Path) -> None:
    wanted = experiment(split={"later": 0})
    made = pretrain(wanted, DATASET, Registry(tmp_path / "p"))
    simulate(wanted, runs=tmp_path, registry=tmp_path / "r", dataset=DATASET)
    assert np.array_equal(made.params[PRIOR], Registry(tmp_path / "r").load().params[PRIOR])


def test_a_student_starts_from_the_vectors_alone_and_has_the_counts_beside_them() -> None:
    n, key = 20, Key.from_seed(0)
    config = TransformerConfig(dim=6, heads=1, expand=1, length=5, popularity_weight=2.0)
    counts = np.arange(n, dtype=np.float32)
    histories = key.child("h").numpy().integers(0, n, (8, 5))
    found = {}
    for name, weight in (("with", 2.0), ("without", 0.0)):
        same = config.model_copy(update={"popularity_weight": weight})
        params = with_popularity(same, get_params(build(same, n, key)), counts)
        small = build(same.model_copy(update={"dim": 4}), n, key.child("small"))
        found[name] = begun(small, restore(same, n, params), histories, counts)
    assert np.allclose(found["with"]["item"], found["without"]["item"], atol=1e-5)
    assert np.array_equal(found["with"][PRIOR][:, 0], log_popularity(counts))
    assert n_bytes(found["with"]) == n_bytes(found["without"]) + 4 * n


def test_a_blend_has_its_popularity_in_the_prior() -> None:
    with pytest.raises(ValueError, match="popularity in its prior"):
        BlendConfig(fitted=TransformerConfig(popularity_weight=1.0))
