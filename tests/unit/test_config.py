"""An experiment file is read whole or refused in one sentence that says where the mistake is."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedrec.config import Experiment, simulations_folder
from fedrec.errors import ConfigError
from fedrec.models.configs import SampledSoftmax, TransformerConfig
from tests.support import merged, small_document, small_experiment, to_toml


def refused(document: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        Experiment.parse(document, "'a.toml'")
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    assert "'a.toml'" in message
    return message


@pytest.mark.parametrize(
    ("changes", "dotted", "meant", "known"),
    [
        ({"trainin__average": 0.5}, "trainin", "training", "evaluation"),
        ({"sed": 3}, "sed", "seed", "split"),
        ({"data__sorce": "ml-100k"}, "data.sorce", "source", "source"),
        ({"split__bse": 0.5}, "split.bse", "base", "holdout"),
        ({"model__dimm": 8}, "model.dimm", "dim", "dropout"),
        ({"model__softmax__negative": 8}, "model.softmax.negative", "negatives", "kind"),
        ({"training__cohort__expectd": 8}, "training.cohort.expectd", "expected", "kind"),
        ({"training__local__step": 8}, "training.local.step", "steps", "clip_norm"),
        ({"training__server__learning_rat": 1.0}, "training.server.learning_rat", "learning_rate", "weight_decay"),
        ({"training__base__round": 1}, "training.base.round", "rounds", "warmup"),
        ({"evaluation__local_only__peple": 1}, "evaluation.local_only.peple", "people", "training"),
        ({"evaluation__local_only__training__step": 1}, "evaluation.local_only.training.step", "steps", "clip_norm"),
        ({"runtime__node": 1}, "runtime.node", "nodes", "threads"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_known_one(
    changes: dict[str, Any], dotted: str, meant: str, known: str
) -> None:
    message = refused(small_document(**changes))
    assert f"Unknown key '{dotted}'" in message
    assert f"did you mean '{meant}'?" in message
    assert known in message.split("Known here: ")[1]


def test_an_unknown_key_of_another_member_of_a_union_is_checked_against_the_chosen_one() -> None:
    message = refused(small_document(training__server={"kind": "sgd", "beta1": 0.9}))
    assert "Unknown key 'training.server.beta1'" in message
    assert message.split("Known here: ")[1] == "kind, learning_rate, momentum."


def test_an_unknown_key_unlike_any_other_gets_no_guess() -> None:
    assert "did you mean" not in refused(small_document(zzzzqqqq=1))


def test_an_unknown_key_is_named_before_what_is_missing() -> None:
    document = small_document()
    document["modell"] = document.pop("model")
    assert "Unknown key 'modell' in 'a.toml'; did you mean 'model'?" in refused(document)


@pytest.mark.parametrize(
    ("changes", "dotted", "got"),
    [
        ({"seed": "many"}, "seed", "many"),
        ({"seed": 1.5}, "seed", "1.5"),
        ({"name": 7}, "name", "7"),
        ({"name": "../escape"}, "name", "../escape"),
        ({"name": ""}, "name", "''"),
        ({"training": 3}, "training", "3"),
        ({"training__base__rounds": "x"}, "training.base.rounds", "x"),
        ({"training__base__rounds": -1}, "training.base.rounds", "-1"),
        ({"training__base__final": 1.5}, "training.base.final", "1.5"),
        ({"training__cohort__expected": 0}, "training.cohort.expected", "0"),
        ({"training__server__learning_rate": float("nan")}, "training.server.learning_rate", "nan"),
        ({"training__server__learning_rate": float("inf")}, "training.server.learning_rate", "inf"),
        ({"training__average": 1.0}, "training.average", "1.0"),
        ({"training__timeout_seconds": 0}, "training.timeout_seconds", "0"),
        ({"split__base": 1.0}, "split.base", "1.0"),
        ({"split": {"kind": "leave_one_out", "test": "train"}}, "split.test", "train"),
        ({"model__softmax__negatives": 0}, "model.softmax.negatives", "0"),
        ({"evaluation__ks": 10}, "evaluation.ks", "10"),
        ({"evaluation__ks": [5, 0]}, "evaluation.ks.1", "0"),
        ({"evaluation__ks": []}, "evaluation.ks", "[]"),
        ({"runtime__engine": "fast"}, "runtime.engine", "fast"),
        ({"runtime__nodes": 0}, "runtime.nodes", "0"),
    ],
)
def test_a_wrong_value_is_named_with_its_path_and_what_was_given(
    changes: dict[str, Any], dotted: str, got: str
) -> None:
    message = refused(small_document(**changes))
    assert message.startswith(f"'{dotted}' in 'a.toml': ")
    assert got in message.split("(got ")[1]


@pytest.mark.parametrize(
    ("changes", "dotted", "known"),
    [
        ({"model": {"kind": "transfomer"}}, "model", "'transformer'"),
        ({"split": {"kind": "strem"}}, "split", "'leave_one_out'"),
        ({"training__cohort": {"kind": "all"}}, "training.cohort", "'poisson'"),
        ({"training__server": {"kind": "adamw"}}, "training.server", "'adam'"),
        ({"model__softmax": {"kind": "hard"}}, "model.softmax", "'sampled'"),
    ],
)
def test_an_unknown_kind_names_the_known_ones(changes: dict[str, Any], dotted: str, known: str) -> None:
    message = refused(small_document(**changes))
    assert message.startswith(f"'{dotted}' in 'a.toml': ")
    assert known in message


def test_a_missing_model_and_a_missing_kind_are_named() -> None:
    document = small_document()
    del document["model"]
    assert refused(document) == "'model' is missing in 'a.toml'."
    assert refused(small_document(model={"dim": 8}) | {"model": {"dim": 8}}).startswith("'model' in 'a.toml': ")


def test_a_required_key_of_a_table_that_is_there_is_named() -> None:
    document = small_document()
    document["training"]["base"] = {"warmup": 1}
    assert refused(document) == "'training.base.rounds' is missing in 'a.toml'."


def test_a_good_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(to_toml(small_document()), encoding="utf-8")
    found = Experiment.load(path)
    assert found == small_experiment()
    assert isinstance(found.model, TransformerConfig)
    assert found.model.softmax == SampledSoftmax(negatives=8)
    assert (found.training.base.rounds, found.evaluation.ks) == (6, (5, 10))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"name = ", "is not valid TOML"),
        (b"name = 'a'\nname = 'b'\n", "is not valid TOML"),
        (b"\xff\xfe", "not a text"),
    ],
)
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=told) as caught:
        Experiment.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read '.*none\.toml': No such file or directory\."):
        Experiment.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"Cannot read '.*': Is a directory\."):
        Experiment.load(tmp_path)


def test_the_digest_ignores_how_the_run_is_carried_out() -> None:
    digest = small_experiment().digest()
    assert len(digest) == 64
    for changes in ({"nodes": 7}, {"engine": "each"}, {"threads": 2}, {"checkpoint_every": 99}):
        assert small_experiment(runtime=changes).digest() == digest


def leaves(document: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for key, value in document.items():
        found += leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]
    return found


def test_the_digest_changes_with_everything_else() -> None:
    whole = small_experiment().model_dump(mode="json", exclude={"runtime"})
    digests = {small_experiment().digest()}
    changed = 0
    for path in leaves(whole):
        old = whole
        for key in path:
            old = old[key]
        new = _other(path[-1], old)
        if new is None:
            continue
        change: Any = new
        for key in reversed(path):
            change = {key: change}
        changed += 1
        digests.add(Experiment.parse(merged(whole, change)).digest())
    assert changed > 35
    assert len(digests) == changed + 1


def _other(key: str, old: Any) -> Any:
    """Return another valid value of a setting, or None for the tag of a union."""
    words: dict[str, Any] = {"name": "other", "source": "ml-1m", "windows": "last", "download": "float16"}
    words |= {"statistics": {"lag": 3}, "promotion_margin": 0.1, "distil": {"steps": 3}}
    words |= {"student": {"model": {"kind": "spectral"}}, "rehearsal": {"share": 0.2}, "drift": {"speed": 3.0}}
    words |= {"tasks": {"value_weight": 0.5}, "start": {"registry": "elsewhere"}}
    words |= {"ewc": {"decay": 0.1}, "curriculum": {"start": 0.1}, "dropout": 0.15}
    words |= {"tiers": {"share": 0.2}, "context": {"hours": 4}, "stopping": {"patience": 3}}
    words |= {"adapt": {"steps": 3}}
    if key in words or key in ("kind", "mode"):
        return words.get(key)
    if isinstance(old, list):
        return [*old, 50]
    if old is None:
        return 7
    if isinstance(old, bool):
        return not old
    return old + 1 if isinstance(old, int) else old / 2 + 0.01


@pytest.mark.parametrize("path", sorted(simulations_folder().glob("*.toml")), ids=lambda path: path.stem)
def test_every_bundled_experiment_is_valid(path: Path) -> None:
    found = Experiment.load(path)
    assert found.digest() == Experiment.parse(tomllib.loads(path.read_text(encoding="utf-8"))).digest()


def test_find_takes_a_path_or_the_name_of_a_bundled_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bundled = Experiment.load(simulations_folder() / "quickstart.toml")
    assert Experiment.find("quickstart") == Experiment.find("quickstart.toml") == bundled
    (tmp_path / "quickstart.toml").write_text(to_toml(small_document(name="mine")), encoding="utf-8")
    assert Experiment.find(str(tmp_path / "quickstart.toml")).name == "mine"
    assert Experiment.find("quickstart.toml").name == "mine"  # what lies here comes first
    assert Experiment.find("quickstart") == bundled


def test_find_says_what_is_not_there_and_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^No experiment 'no/such\.toml': there is no such file.* quickstart\.$"):
        Experiment.find("no/such.toml")
    with pytest.raises(ConfigError, match=r"^No experiment 'quickstar': .*; did you mean 'quickstart'\?$"):
        Experiment.find("quickstar")


def test_a_path_elsewhere_never_stands_for_a_bundled_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        Experiment.find("elsewhere/quickstart.toml")


def test_a_setting_cannot_be_changed_after_reading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        small_experiment().training.average = 0.5  # type: ignore[misc]
