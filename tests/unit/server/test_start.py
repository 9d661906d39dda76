"""What was learnt elsewhere is begun with, in the space of texts that it was learnt in; items are not carried over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.config import Experiment
from fedrec.data.features import item_features
from fedrec.errors import ConfigError, RegistryError
from fedrec.grid.simulate import simulate
from fedrec.models.adapters import LENGTH
from fedrec.models.portable import score
from fedrec.server.pretrain import pretrain
from fedrec.server.registry import Registry
from fedrec.server.start import joined, newest, public_vectors
from tests.support import dataset_of, merged, small_document, small_rows

ELSEWHERE = dataset_of(small_rows(seed=1, n_items=40, n=500))
HERE = dataset_of([(user, f"x{item}", time) for user, item, time in small_rows(seed=2)])
MODEL: dict[str, Any] = {
    "kind": "text_transformer", "dim": 8, "heads": 2, "expand": 1, "length": 8, "residual": 2,
    "features": {"rank": 6, "fourier": 0}, "softmax": {"kind": "sampled", "negatives": 8},
}  # fmt: skip


def experiment(**changes: Any) -> Experiment:
    base = {**small_document(), "model": MODEL}
    return Experiment.parse(
        merged(base, {"split": {"later": 1}, "evaluation": {"local_only": {"people": 0}}, **changes})
    )


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    simulate(experiment(), runs=folder, registry=folder / "r", dataset=ELSEWHERE)
    return folder / "r"


def test_shared_weights_and_the_space_of_texts_are_carried_and_items_are_not(elsewhere: Path, tmp_path: Path) -> None:
    none = {"rounds": 0}
    wanted = experiment(start={"registry": str(elsewhere)}, training={"base": none, "later": none, "average": 0.0})
    simulate(wanted, runs=tmp_path, registry=tmp_path / "r", dataset=HERE)
    theirs, ours = Registry(elsewhere).load(), Registry(tmp_path / "r").load()
    for name in theirs.params:
        if name not in ("text", "residual"):
            assert np.array_equal(theirs.params[name], ours.params[name]), name
    assert not ours.params["residual"].any()
    n_first = Registry(elsewhere).load(1).manifest.n_items
    assert n_first < theirs.manifest.n_items  # the space is that of the first slice, not of the newest release
    space = item_features(joined(theirs.catalog, ours.catalog), wanted.model.features, n_first)  # type: ignore[union-attr]
    np.testing.assert_allclose(space[: len(theirs.catalog)], theirs.params["text"], atol=1e-5)
    np.testing.assert_allclose(space[len(theirs.catalog) :], ours.params["text"], atol=1e-5)


def test_confidence_shrinks_the_scores_that_begin(elsewhere: Path, tmp_path: Path) -> None:
    none = {"base": {"rounds": 0}, "later": {"rounds": 0}, "average": 0.0}
    found = {}
    for confidence in (1.0, 0.25):
        start = {"registry": str(elsewhere), "confidence": confidence}
        root = tmp_path / str(confidence)
        simulate(experiment(start=start, training=none), runs=root, registry=root / "r", dataset=HERE)
        found[confidence] = score(experiment().model, Registry(root / "r").load().params, [1, 4])
    assert np.abs(found[1.0]).max() > 0.01
    np.testing.assert_allclose(found[0.25], found[1.0] / 4, atol=1e-6)


def test_years_are_read_as_ages_where_the_experiment_says_so(elsewhere: Path) -> None:
    source = Registry(elsewhere).load()
    there = source.catalog
    dated = replace(source, catalog=replace(there, titles=tuple(f"T{n} ({1990 + n % 10})" for n in range(len(there)))))
    titles = tuple(f"T{n} ({2004 + n % 10})" for n in range(len(HERE.catalog)))
    catalog = replace(HERE.catalog, titles=titles)
    plain, aged = (
        public_vectors(experiment(start={"registry": str(elsewhere), "ages": ages}), catalog, len(catalog), dated)
        for ages in (False, True)
    )
    assert plain is not None
    assert aged is not None
    same = replace(catalog, titles=tuple(f"T{n} ({1990 + n % 10})" for n in range(len(catalog))))
    wanted = public_vectors(experiment(start={"registry": str(elsewhere)}), same, len(catalog), dated)
    np.testing.assert_array_equal(aged, wanted)  # as if the films were of the years of the other catalogue
    assert np.abs(plain - aged).max() > 0.01
    later = replace(catalog, titles=(*titles[:-1], "T (2019)"))
    first = len(catalog) - 1
    grown = public_vectors(experiment(start={"registry": str(elsewhere), "ages": True}), later, first, dated)
    assert grown is not None
    np.testing.assert_array_equal(grown[:first], aged[:first])  # an item that joins moves nobody
    assert newest(replace(catalog, titles=("no year",) * len(catalog))) == 0


def test_a_release_of_another_shape_or_kind_is_refused_before_anything_is_written(
    elsewhere: Path, tmp_path: Path
) -> None:
    start = {"registry": str(elsewhere)}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": {**MODEL, "dim": 16}}, "does not fit"),
        ({"model": {**MODEL, "features": {"rank": 7, "fourier": 0}}}, "features"),
        ({"model": {"kind": "transformer", "dim": 8, "length": 8}}, "text_transformer"),
    ]
    for changes, words in cases:
        with pytest.raises(ConfigError, match=words):
            simulate(experiment(start=start, **changes), runs=tmp_path / "x", registry=tmp_path / "r", dataset=HERE)
    with pytest.raises(RegistryError):
        simulate(experiment(start={"registry": str(tmp_path / "no")}), runs=tmp_path / "x", dataset=HERE)
    assert not (tmp_path / "x").exists()


def test_adapters_can_be_put_beside_what_came_without_them(elsewhere: Path, tmp_path: Path) -> None:
    wanted = experiment(
        start={"registry": str(elsewhere)}, model={"lora": 2, "train": "adapters"}, training={"average": 0.0}
    )
    simulate(wanted, runs=tmp_path, registry=tmp_path / "r", dataset=HERE)
    theirs, ours = Registry(elsewhere).load().params, Registry(tmp_path / "r").load().params
    assert np.array_equal(theirs["blocks.0.widen.weight"], ours["blocks.0.widen.weight"])
    assert ours["blocks.0.widen.up"].any()


def test_the_server_pre_trains_on_public_data_and_a_run_elsewhere_begins_from_it(tmp_path: Path) -> None:
    losses: list[float] = []
    steps = {"training": {"base": {"rounds": 80}, "server": {"kind": "adam", "learning_rate": 1e-2}}}
    made = pretrain(experiment(**steps), ELSEWHERE, Registry(tmp_path / "p"), lambda step, loss: losses.append(loss))
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.3
    assert made.manifest.privacy["epsilon"] is None
    assert "public data" in made.manifest.privacy["statement"]
    none = {"base": {"rounds": 0}, "later": {"rounds": 0}, "average": 0.0}
    wanted = experiment(start={"registry": str(tmp_path / "p")}, training=none)
    simulate(wanted, runs=tmp_path, registry=tmp_path / "r", dataset=HERE)
    ours = Registry(tmp_path / "r").load()
    assert np.array_equal(made.params["projection.weight"], ours.params["projection.weight"])
    assert pretrain(experiment(**steps), ELSEWHERE, Registry(tmp_path / "p")).version == made.version  # the same bytes


def test_pre_training_lays_adapters_without_moving_what_the_weights_say(tmp_path: Path) -> None:
    steps: dict[str, Any] = {"training": {"base": {"rounds": 5}}}
    plain = pretrain(experiment(**steps), ELSEWHERE, Registry(tmp_path / "p"))
    beside = pretrain(experiment(model={"lora": 2}, **steps), ELSEWHERE, Registry(tmp_path / "b"))
    none = experiment(
        model={"lora": 2}, start={"registry": str(tmp_path / "p")}, training={"base": {"rounds": 0, "warmup": 0}}
    )
    later = pretrain(none, ELSEWHERE, Registry(tmp_path / "l"))
    for release in (beside, later):
        for name in ("projection.weight", "blocks.0.widen.weight", "position"):
            assert np.array_equal(release.params[name], plain.params[name])
        down = release.params["blocks.0.widen.down"]
        np.testing.assert_allclose(down @ down.T, LENGTH**2 * np.eye(2), atol=1e-4)
        assert not release.params["blocks.0.widen.up"].any()
        assert not np.array_equal(release.params["mix"], plain.params["mix"])
    wanted = experiment(
        model={"lora": 2, "train": "ffa"}, start={"registry": str(tmp_path / "b")}, training={"average": 0.0}
    )
    simulate(wanted, runs=tmp_path, registry=tmp_path / "r", dataset=HERE)
    ours = Registry(tmp_path / "r").load().params
    assert np.array_equal(ours["blocks.0.widen.down"], beside.params["blocks.0.widen.down"])
    assert np.array_equal(ours["projection.up"], beside.params["projection.up"])
    assert ours["projection.down"].any()
    trained = pretrain(experiment(model={"lora": 2, "train": "adapters"}, **steps), ELSEWHERE, Registry(tmp_path / "a"))
    assert trained.params["blocks.0.widen.up"].any()  # then they are what is trained


def test_pre_training_refuses_what_it_would_not_do(tmp_path: Path) -> None:
    private = {"privacy": {"mode": "central", "epsilon": 8.0}}
    spectral = {"model": {"kind": "spectral"}, "training": {"statistics": {}, "base": {"rounds": 0}}}
    many = {"model": {"lora": 7}}
    for changes, words in ((private, "public data"), (spectral, "models of sequences"), (many, "at most 6 directions")):
        with pytest.raises(ConfigError, match=words):
            pretrain(experiment(**changes), ELSEWHERE, Registry(tmp_path / "r"))
    assert not (tmp_path / "r").exists()
