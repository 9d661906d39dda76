"""A blend is made of a prior and a fit, and takes no more of the fit than validation, which is paid for, allows."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.config import Experiment
from fedrec.data.slices import LastWindow, TimeWindow, resolve, with_validation
from fedrec.errors import ConfigError
from fedrec.grid.simulate import simulate
from fedrec.models import portable
from fedrec.models.blend import blended, joined, mixed, started, turned
from fedrec.models.build import build
from fedrec.models.configs import BlendConfig, SpectralConfig, TransformerConfig
from fedrec.models.recommender import get_params
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.random import Key
from fedrec.server.adopt import best, sure_gain
from fedrec.server.guard import planned
from fedrec.server.lifelong import run_stream
from fedrec.server.registry import Registry
from fedrec.server.round import Recipe
from fedrec.server.run import LEDGER, cut
from fedrec.server.state import ServerState
from fedrec.server.work import Desk
from tests.support import PoolLink, dataset_of, merged, same_bytes, small_document, small_rows

DATASET = dataset_of(small_rows())
KEY = Key.from_seed(5)
MODEL: dict[str, Any] = {
    "kind": "blend",
    "prior": {"item_rank": 5, "feature_rank": 4, "length": 8},
    "fitted": {"kind": "transformer", "dim": 8, "heads": 1, "length": 8},
    "weights": [0.2, 1.0],
}
CENTRAL = {"mode": "central", "epsilon": 8.0, "delta": 1e-3, "noise": "seed", "metrics": "research", "population": 29}


def blend(privacy: Mapping[str, Any] | None = None, **changes: Any) -> Experiment:
    document = {**small_document(), "model": MODEL}
    training = {
        "statistics": {"features": {"rank": 4, "fourier": 0}},
        "cohort": {"kind": "poisson", "expected": 15.0},
        "base": {"rounds": 3},
        "later": {"rounds": 2},
    }
    document = merged(document, {"training": training, **changes})
    return Experiment.parse(merged(document, {"privacy": dict(privacy)}) if privacy else document)


def test_a_release_holds_both_parts_and_what_was_tried_stands_in_the_report(tmp_path: Path) -> None:
    document, _ = simulate(blend(), runs=tmp_path, registry=tmp_path / "registry", dataset=DATASET)
    again, _ = simulate(blend(), runs=tmp_path / "2", registry=tmp_path / "registry2", dataset=DATASET)
    assert [r["digest"] for r in document["releases"]] == [r["digest"] for r in again["releases"]]
    for record in document["releases"]:
        adoption = record["adoption"]
        assert set(adoption["tried"]) == {"weight 0", "weight 0.2", "weight 1"}
        assert adoption["weight"] == best((0.0, 0.2, 1.0), adoption["tried"], 0.0)
        assert {"release", "popularity"} <= record["rows"].keys()
    params = Registry(tmp_path / "registry").load("newest").params
    assert params["weight"] == pytest.approx(document["releases"][-1]["adoption"]["weight"])
    assert float(np.abs(params["prior.items"]).max()) > 0
    assert params["fitted.item"].shape == (document["releases"][-1]["n_items"], 8)


def stored(root: Path, begin: ServerState | None = None) -> tuple[list[ServerState], Registry]:
    """Live a blend with a device student, from birth or a stored state, and return all states that were stored."""
    student = {"model": {"kind": "spectral", "item_rank": 2, "feature_rank": 0}, "share": 0.9, "steps": 2}
    training = {
        "statistics": {"item_share": 1.0, "feature_share": 0.0, "recency": 0.5}, "local": {"replay": 0.5},
        "student": student,
    }  # fmt: skip
    model = {"prior": {"feature_rank": 0}, "follow": "all"}
    alone = {"local_only": {"people": 0}}
    experiment = blend(training=training, model=model, runtime={"checkpoint_every": 1}, evaluation=alone)
    recipe, states = Recipe(experiment, DATASET.catalog.digest(), lambda: 0.0), list[ServerState]()
    desk = Desk(Registry(root), DATASET.catalog, states.append, lambda event: None)
    state = begin or ServerState("small/001", experiment.digest(), recipe.catalog_digest)
    for _ in run_stream(state, PoolLink(DATASET, 1), cut(experiment, DATASET), recipe, desk):
        pass
    return states, desk.registry


@pytest.mark.parametrize("places", [(2, 3, 4), pytest.param(range(9), marks=pytest.mark.slow)])
def test_from_every_state_that_was_stored_a_life_goes_on_to_the_same_bytes(
    tmp_path: Path, places: Sequence[int]
) -> None:
    states, registry = stored(tmp_path / "whole")
    assert len({(state.slice, state.round) for state in states}) == len(states) > 8
    for number in places:
        state = states[number]
        root = tmp_path / str(number)
        shutil.copytree(registry.root, root)  # what was published since is published once more
        again, other = stored(root, ServerState.from_record(*state.to_record()))
        assert same_bytes(again[-1].prior, states[-1].prior)
        assert same_bytes(again[-1].params, states[-1].params)
        assert [one.digest for one in other.list()] == [one.digest for one in registry.list()]


def test_every_weight_that_is_tried_is_paid_for_even_where_metrics_are_exact(tmp_path: Path) -> None:
    experiment = blend(CENTRAL)
    document, folder = simulate(experiment, runs=tmp_path, registry=tmp_path / "registry", dataset=DATASET)
    names = [entry.name for entry in PrivacyLedger.read(folder / LEDGER).entries()]
    for index in range(experiment.n_slices):
        tried = [name for name in names if name.startswith(f"slice {index}: metrics of weight")]
        assert len(tried) == 3
    assert 7.5 < document["privacy"]["epsilon"] <= 8.0
    life = [name for name, event in planned(experiment, (29, 29), 1.0) if "validation" in name]
    assert len(life) == experiment.n_slices
    assert all(record["adoption"]["margin"] > 0 for record in document["releases"])


def test_the_parts_of_the_prior_are_weighed_by_validation_too(tmp_path: Path) -> None:
    mixes = [[1, 4, 1], [4, 1, 0], [1, 1, 8]]
    wanted = blend(model={"mixes": mixes})
    document, _ = simulate(wanted, runs=tmp_path, registry=tmp_path / "registry", dataset=DATASET)
    for record in document["releases"]:
        adoption = record["adoption"]
        assert {"mix 1 4 1", "mix 4 1 0", "mix 1 1 8", "weight 0", "weight 0.2", "weight 1"} == set(adoption["tried"])
        best_mix = max((adoption["tried"][f"mix {' '.join(map(str, mix))}"], mix) for mix in mixes)
        better = best_mix[0] > adoption["tried"][f"weight {adoption['weight']:g}"]
        assert adoption["mix"] == (best_mix[1] if better else [1, 1, 1])
    private, folder = simulate(
        blend(CENTRAL, model={"mixes": mixes}), runs=tmp_path / "p", registry=tmp_path / "pr", dataset=DATASET
    )
    names = [entry.name for entry in PrivacyLedger.read(folder / LEDGER).entries()]
    assert sum(name.startswith("slice 0: metrics of mix") for name in names) == 3
    assert 7.0 < private["privacy"]["epsilon"] <= 8.0


def test_a_mix_multiplies_the_scores_of_the_parts() -> None:
    random = np.random.default_rng(0)
    config = SpectralConfig(item_rank=3, feature_rank=2, popularity_weight=0.5, length=8)
    rows = {
        "items": random.normal(size=(9, 3)),
        "features": random.normal(size=(9, 2)),
        "popularity": random.normal(size=9),
    }
    prior = {name: value.astype(np.float32) for name, value in rows.items()}
    prior |= {"item_spread": np.cov(rows["items"].T).astype(np.float32)}
    prior |= {"feature_spread": np.cov(rows["features"].T).astype(np.float32)}
    weighed = config.model_copy(update={"item_weight": 2.0, "feature_weight": 0.5, "popularity_weight": 1.5})
    np.testing.assert_allclose(
        portable.score(config, mixed(prior, (2.0, 0.5, 3.0)), [1, 2]), portable.score(weighed, prior, [1, 2]), rtol=1e-4
    )


def test_a_gain_within_the_noise_is_none() -> None:
    tried = {"weight 0": 0.10, "weight 0.2": 0.13, "weight 1": 0.05}
    assert best((0.0, 0.2, 1.0), tried, 0.02) == 0.2
    assert best((0.0, 0.2, 1.0), tried, 0.04) == 0.0
    assert best((0.0, 0.2, 1.0), {}, 0.0) == 0.0


def test_a_fit_that_does_not_help_is_hardly_ever_adopted_and_one_that_does_is() -> None:
    weights, n, deviation = (0.0, 0.1, 0.3, 1.0), 943, 10.0
    draws = KEY.child("adoption").numpy().standard_normal((20_000, len(weights), 2)) * deviation

    def adopted_share(gain: float) -> float:
        """Return how often weight 0.3, which adds `gain` to a mean of .09, or another weight is taken."""
        true = np.array([0.09, 0.09, 0.09 + gain, 0.09])
        people = n + draws[:, :, 1]
        means = np.clip((n * true + draws[:, :, 0]) / people, 0.0, 1.0)
        taken = 0
        for row, counted in zip(means, people, strict=True):
            tried = {f"weight {weight:g}": float(mean) for weight, mean in zip(weights, row, strict=True)}
            taken += best(weights, tried, sure_gain(deviation, round(counted.min()), row.max())) > 0
        return taken / len(draws)

    # The union bound of three normal tails beyond 3 standard errors is .41 % (beyond two it would be 6.8 %); 20,000
    # draws add three standard errors of .045 %.
    assert adopted_share(0.0) < 0.0055
    assert adopted_share(6 * math.sqrt(2) * deviation / n) > 0.99


def test_validation_windows_lie_after_training_and_nothing_is_lost_between_slices() -> None:
    plain = cut(Experiment.parse(small_document()), DATASET)
    kept = with_validation(plain, 0.1)
    trained = np.zeros(len(DATASET.log), np.int64)
    for one, whole in zip(kept, plain, strict=True):
        assert isinstance(one.train, TimeWindow)
        assert isinstance(one.validation, TimeWindow)
        assert isinstance(whole.train, TimeWindow)
        assert one.train.end == one.validation.start < one.validation.end == whole.train.end
        assert one.test == whole.test
        low, high = resolve(DATASET.log, one.train)
        for user, (a, b) in enumerate(zip(low, high, strict=True)):
            trained[DATASET.log.offsets[user] + a : DATASET.log.offsets[user] + b] += 1
    last = kept[-1].validation
    assert isinstance(last, TimeWindow)
    before = DATASET.log.time < last.start
    np.testing.assert_array_equal(trained, before.astype(np.int64))


def test_of_histories_the_interaction_before_the_tested_one_is_kept() -> None:
    from fedrec.data.slices import leave_one_out

    (tested,) = with_validation(leave_one_out(DATASET.catalog), 0.1)
    assert (tested.train, tested.validation) == (LastWindow(skip=2), LastWindow(skip=1, take=1))
    (chosen,) = with_validation(leave_one_out(DATASET.catalog, "validation"), 0.1)
    assert (chosen.train, chosen.validation) == (LastWindow(skip=3), LastWindow(skip=2, take=1))


def test_the_fit_starts_from_the_priors_geometry_at_its_own_temperature() -> None:
    config = BlendConfig(
        prior=SpectralConfig(item_rank=3, feature_rank=2), fitted=TransformerConfig(dim=8, heads=1, length=8)
    )
    random = KEY.numpy()
    prior = {
        "items": random.standard_normal((30, 3)).astype(np.float32),
        "features": random.standard_normal((30, 2)).astype(np.float32),
    }
    prior["items"][27:] = 0.0
    prior["features"][27:] = 0.0
    fresh = get_params(build(config.fitted, 30, KEY))
    item = started(prior, fresh, config)["item"]
    rows = np.concatenate([prior["items"], prior["features"]], axis=1)[:27]
    mine, theirs = item[:27] @ item[:27].T, rows @ rows.T
    np.testing.assert_allclose(mine / np.linalg.norm(mine), theirs / np.linalg.norm(theirs), atol=1e-5)
    np.testing.assert_array_equal(item[27:], fresh["item"][27:])
    assert item[:27, :5].std() == pytest.approx(float(fresh["item"].std()), rel=0.05)


def test_items_that_join_stand_where_the_prior_has_them() -> None:
    config = BlendConfig(
        prior=SpectralConfig(item_rank=4, feature_rank=0), fitted=TransformerConfig(dim=8, heads=1, length=8)
    )
    random = KEY.numpy()
    rows, turn = random.standard_normal((30, 4)), random.standard_normal((4, 8))
    rows[29] = 0.0
    prior = {"items": rows.astype(np.float32), "features": np.zeros((30, 0), np.float32)}
    fitted = get_params(build(config.fitted, 30, KEY))
    fresh = fitted["item"].copy()
    fitted["item"] = (rows @ turn).astype(np.float32)
    fitted["item"][20:] = fresh[20:]
    found = joined(prior, fitted, 20, config)["item"]
    np.testing.assert_array_equal(found[:20], fitted["item"][:20])
    np.testing.assert_allclose(found[20:29], (rows @ turn)[20:29], atol=0.03)
    np.testing.assert_array_equal(found[29], fresh[29])
    np.testing.assert_array_equal(joined(prior, fitted, 30, config)["item"], fitted["item"])


def test_all_items_can_be_laid_anew_and_only_be_turned() -> None:
    config = BlendConfig(
        prior=SpectralConfig(item_rank=4, feature_rank=0), fitted=TransformerConfig(dim=8, heads=1, length=8)
    )
    random = KEY.numpy()
    prior = {"items": random.standard_normal((30, 4)).astype(np.float32), "features": np.zeros((30, 0), np.float32)}
    fresh = get_params(build(config.fitted, 30, KEY))
    begun = started(prior, fresh, config)
    turn = np.linalg.qr(random.standard_normal((8, 8)))[0].astype(np.float32)
    learnt = {**begun, "item": 3.0 * begun["item"] @ turn}
    learnt["item"][20:] = fresh["item"][20:]
    found = turned(prior, learnt, 20, config)["item"]
    mine, theirs = found @ found.T, begun["item"] @ begun["item"].T
    np.testing.assert_allclose(mine / np.linalg.norm(mine), theirs / np.linalg.norm(theirs), atol=1e-5)
    np.testing.assert_allclose(found[:20], learnt["item"][:20], rtol=0.02, atol=0.02 * np.abs(found).max())
    assert turned(prior, learnt, 0, config)["item"] is not None


def test_fitted_scores_have_spread_one_and_the_weight_scales_them() -> None:
    import torch

    from fedrec.data.batches import histories_of
    from fedrec.models.build import restore

    config = BlendConfig(prior=SpectralConfig(item_rank=3, feature_rank=2), fitted=TransformerConfig(dim=8, heads=1))
    prior = get_params(build(config.prior, 30, KEY))
    fitted = get_params(build(config.fitted, 30, KEY))
    model = restore(config, 30, blended(prior, fitted, 0.5))
    items, mask = (torch.from_numpy(part) for part in histories_of([[1, 2, 3], list(range(28))], model.spec))
    with torch.no_grad():
        scores = model.score(model.encode(items, mask))
    np.testing.assert_allclose(scores.std(dim=1, correction=0), 0.5, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"statistics": None}}, r"add a table \[training\.statistics\]"),
        ({"privacy": {"mode": "local", "epsilon": 8.0, "metrics": "research"}}, "nobody pays for"),
    ],
)
def test_a_blend_that_cannot_be_made_or_chosen_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    document = merged(blend().model_dump(mode="json", exclude_unset=True), changes)
    with pytest.raises(ConfigError, match=words):
        simulate(Experiment.parse(document), runs=tmp_path, registry=tmp_path / "registry", dataset=DATASET)
    assert not list(tmp_path.rglob("*"))
