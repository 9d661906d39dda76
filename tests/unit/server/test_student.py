"""The device student: small, taught by its release alone, kept beside it, and checked byte by byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedrec.errors import ConfigError, CorruptRelease, RegistryError
from fedrec.models.build import restore
from fedrec.models.configs import SpectralConfig, TransformerConfig
from fedrec.models.recommender import get_params
from fedrec.models.transfer import StudentConfig
from fedrec.random import Key
from fedrec.server.recommend import recommend
from fedrec.server.registry import Registry
from fedrec.server.spectral import spectral_params
from fedrec.server.student import check_student, device_student, n_params
from tests.contracts.recommender import lively
from tests.support import same_bytes, small_experiment
from tests.unit.server.test_teach import STATISTICS, live

N = 40
RELEASE = SpectralConfig(item_rank=24, feature_rank=8, length=10)
SETTINGS = StudentConfig(
    model=SpectralConfig(item_rank=5, feature_rank=0, length=10), share=0.2, steps=30, learning_rate=3e-3, batch=8,
    places=4, histories=64, length=8,
)  # fmt: skip
COUNTS = np.arange(N, dtype=np.float32)


def made(settings: StudentConfig = SETTINGS):  # type: ignore[no-untyped-def]
    params = get_params(lively(RELEASE, N))
    return params, device_student(RELEASE, params, COUNTS, settings, N, Key.from_seed(4))


def test_it_is_a_function_of_the_key_and_says_its_size_and_cost() -> None:
    params, student = made()
    _, again = made()
    assert same_bytes(student.params, again.params)
    facts = student.facts
    assert facts["n_params"] == n_params(SETTINGS.model, N) == sum(v.size for v in student.params.values())
    assert facts["share_of_params"] == facts["n_params"] / sum(v.size for v in params.values())
    assert facts["epsilon"] == 0.0
    assert facts["loss"][1] < facts["loss"][0]


@pytest.mark.parametrize("kind", ["spectral", "transformer", "factorisation"])
def test_every_form_can_be_taught(kind: str) -> None:
    model = {"kind": kind, "length": 10} | ({"item_rank": 3, "feature_rank": 0} if kind == "spectral" else {"dim": 4})
    settings = StudentConfig.model_validate({**SETTINGS.model_dump(), "model": model, "steps": 2})
    _, student = made(settings)
    restored = restore(settings.model, N, student.params)
    assert all(np.isfinite(value).all() for value in get_params(restored).values())


def test_it_stands_beside_its_release_and_one_changed_byte_is_noticed(tmp_path: Path) -> None:
    experiment = small_experiment(
        split__later=1, model=RELEASE.model_dump(), training__statistics=STATISTICS,
        training__base__rounds=0, training__later__rounds=0, training__student=SETTINGS.model_dump(),
    )  # fmt: skip
    check_student(experiment, N)
    states, registry = live(tmp_path, experiment)
    assert [record["student"]["epsilon"] for record in states[-1].releases] == [0.0, 0.0]
    assert all("student" in record["rows"] for record in states[-1].releases)
    loaded = registry.load(2)
    assert loaded.student is not None
    found = recommend(loaded, list(loaded.catalog.ids[:2]), 3, student=True)
    assert len(found.items) == 3
    assert registry.verify() == []
    registry.rollback()
    assert registry.load().student is not None
    path = tmp_path / "releases" / "0002" / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptRelease, match=r"student\.safetensors' does not match"):
        registry.load(2)


def test_a_spectral_student_begins_with_the_statistic_cut_to_its_ranks(tmp_path: Path) -> None:
    """No step could bring it so near: the rows still span what the statistic's leading directions span."""
    few = SETTINGS.model_dump() | {"steps": 1, "learning_rate": 1e-9}
    experiment = small_experiment(
        split__later=1, model=RELEASE.model_dump(), training__statistics=STATISTICS,
        training__base__rounds=0, training__later__rounds=0, training__student=few,
    )  # fmt: skip
    states, registry = live(tmp_path, experiment)
    for version, state in ((1, next(s for s in states if s.slice == 1)), (2, states[-1])):
        n_items = registry.manifest(version).n_items
        made = spectral_params(state.statistic, state.counts["counts"], SETTINGS.model, None, n_items)
        found = registry.load(version).student
        assert found is not None
        np.testing.assert_allclose(found["items"], made["items"], atol=1e-6)
        np.testing.assert_allclose(found["popularity"], made["popularity"], atol=1e-6)


def test_without_a_student_nobody_answers_for_it(tmp_path: Path) -> None:
    states, registry = live(tmp_path, small_experiment(split__later=0, training__base__rounds=1))
    assert states[-1].releases[0]["student"] is None
    with pytest.raises(RegistryError, match="has no device student"):
        recommend(Registry(tmp_path).load(), [], 3, student=True)
    assert registry.manifest().student is None


def test_one_that_is_too_large_is_refused() -> None:
    wide = TransformerConfig(dim=8, length=8)
    experiment = small_experiment(training__student={"model": wide.model_dump()})
    with pytest.raises(ConfigError, match=r"would have [\d,]+ parameters, \d+\.\d% of the release's"):
        check_student(experiment, N)
