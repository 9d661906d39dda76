"""A private run pays before it asks, divides by public numbers, and stops when the budget is spent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedrec.cli import app
from fedrec.config import Experiment
from fedrec.data.slices import TimeSlice
from fedrec.errors import BudgetExhausted, ConfigError, FedrecError, PrivacyError
from fedrec.grid.simulate import simulate
from fedrec.params import Params, norm
from fedrec.privacy.accounting import epsilon
from fedrec.privacy.events import GaussianEvent
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.protocol.link import Reply, Verb
from fedrec.protocol.parcels import Freight
from fedrec.protocol.task import CooccurrenceTask, CountTask, EvaluateTask, FitTask
from fedrec.server.gather import Ask
from fedrec.server.guard import Guard, calibrated, guard_of, planned, user_level
from fedrec.server.judge import initial
from fedrec.server.private import private_gather
from fedrec.server.round import Recipe, run_round, take_census
from fedrec.server.run import LEDGER, check, cut
from fedrec.server.state import ServerState
from tests.support import PoolLink, dataset_of, merged, small_document, small_experiment, small_rows, without_clock

DATASET = dataset_of(small_rows())
CENTRAL: dict[str, Any] = {"mode": "central", "epsilon": 8.0, "delta": 1e-3, "noise": "seed"}


def private(changes: Mapping[str, Any] | None = None, **others: Any) -> Experiment:
    return Experiment.parse(merged(small_document(**others), {"privacy": {**CENTRAL, **(changes or {})}}))


SPECTRAL: dict[str, Any] = {
    "model": {"kind": "spectral", "item_rank": 5, "feature_rank": 4, "length": 8},
    "training": {
        "statistics": {"features": {"rank": 4, "fourier": 0}},
        "base": {"rounds": 0},
        "later": {"rounds": 0},
    },
}


def spectral(privacy: Mapping[str, Any] | None) -> Experiment:
    document = merged(small_document(), SPECTRAL)
    return Experiment.parse(document if privacy is None else merged(document, {"privacy": {**CENTRAL, **privacy}}))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def recipe_of(experiment: Experiment, ledger: PrivacyLedger, n_people: int = 20) -> Recipe:
    guard = guard_of(experiment, ledger, n_people)
    return Recipe(experiment, DATASET.catalog.digest(), lambda: 0.0, guard)


def in_memory(experiment: Experiment) -> PrivacyLedger:
    settings = user_level(experiment)
    return PrivacyLedger(None, epsilon=settings.epsilon, delta=settings.delta)


def fresh(experiment: Experiment, base: TimeSlice, recipe: Recipe) -> ServerState:
    return ServerState(
        "small/001",
        experiment.digest(),
        DATASET.catalog.digest(),
        params=initial(experiment.model, base.n_items, recipe),
    )


def test_the_charge_is_written_before_anybody_is_asked(tmp_path: Path, stack: ExitStack) -> None:
    experiment, path = private(), tmp_path / LEDGER
    ledger = stack.enter_context(PrivacyLedger(path, epsilon=8.0, delta=1e-3))
    recipe, base = recipe_of(experiment, ledger), cut(experiment, DATASET)[0]
    on_disk: list[int] = []

    class Watching(PoolLink):
        def exchange(
            self,
            verb: Verb,
            documents: Mapping[int, bytes],
            timeout_seconds: float | None,
            freight: Freight | None = None,
        ) -> Any:
            if verb == "run":
                on_disk.append(len(PrivacyLedger.read(path).entries()))
            return super().exchange(verb, documents, timeout_seconds, freight)

    link = Watching(DATASET, 2)
    state, roster = fresh(experiment, base, recipe), take_census(link, base.train, recipe)
    for _ in range(3):
        state, _ = run_round(state, link, recipe, base, roster)
    assert on_disk == [1, 2, 3]
    assert [entry.name for entry in ledger.entries()] == [f"slice 0: round {n}" for n in range(3)]


def test_a_promotion_by_exact_metrics_is_refused_in_a_private_run() -> None:
    margin = {"evaluation": {"promotion_margin": 0.1}}
    check(private({"metrics": "private"}, **margin), DATASET)
    with pytest.raises(PrivacyError, match="nobody pays for it"):
        check(private({"metrics": "research"}, **margin), DATASET)


def test_the_planned_life_is_what_the_ledger_holds_and_spends_the_budget(tmp_path: Path) -> None:
    experiment = private()
    document, folder = simulate(experiment, runs=tmp_path, registry=tmp_path / "registry", dataset=DATASET)
    book = PrivacyLedger.read(folder / LEDGER)
    n_people = document["rounds"][0]["cohort"]  # at least somebody
    assert n_people >= 0
    spent = book.spent()
    assert 7.9 < spent <= 8.0
    assert document["privacy"]["epsilon"] == document["totals"]["epsilon"] == spent
    assert document["privacy"]["unit"] == "user"
    assert [r["epsilon"] for r in document["releases"]] == sorted(r["epsilon"] for r in document["releases"])
    rates = {e.event.sampling for e in book.entries() if "round" in e.name and isinstance(e.event, GaussianEvent)}
    assert len(rates) == 1
    scale = document["privacy"]["scale"]
    (rate,) = rates
    people = round(8.0 / rate)
    life = planned(experiment, (people, people), scale)
    assert epsilon([event for _, event in life], 1e-3) == pytest.approx(spent, rel=1e-3)


def test_nothing_exact_about_people_is_in_a_private_record(tmp_path: Path) -> None:
    document, _ = simulate(private(), runs=tmp_path, registry=tmp_path / "registry", dataset=DATASET)
    assert all(record["loss"] is None and record["clipped"] == 0.0 for record in document["rounds"])
    for release in document["releases"]:
        assert release["rows"].keys() == {"release", "popularity"}
        assert all(groups.keys() == {"all"} for groups in release["rows"].values())
        assert release["differences"] == {}


def test_research_metrics_are_exact_and_said_to_be_outside_the_guarantee(tmp_path: Path) -> None:
    experiment = private({"metrics": "research"})
    document, folder = simulate(experiment, runs=tmp_path, registry=tmp_path / "registry", dataset=DATASET)
    assert "NOT covered" in document["privacy"]["statement"]
    assert {"release", "popularity", "local_only"} <= document["releases"][0]["rows"].keys()
    assert not [e for e in PrivacyLedger.read(folder / LEDGER).entries() if "metrics" in e.name]


def test_the_same_seed_gives_the_same_private_run_and_the_system_never_does(tmp_path: Path) -> None:
    def digests(name: str, noise: str) -> list[str]:
        document, _ = simulate(
            private({"noise": noise}), runs=tmp_path / name, registry=tmp_path / name / "registry", dataset=DATASET
        )
        return [release["digest"] for release in document["releases"]]

    assert digests("a", "seed") == digests("b", "seed")
    assert digests("c", "system") != digests("d", "system")


def test_a_spent_budget_stops_the_run_and_the_last_release_stands(tmp_path: Path) -> None:
    experiment = private({"calibrate": False, "epsilon": 5.0, "fit": 0.9})
    link_calls = tmp_path / "registry"
    with pytest.raises(BudgetExhausted, match="The last release stands"):
        simulate(experiment, runs=tmp_path, registry=link_calls, dataset=DATASET)
    book = PrivacyLedger.read(tmp_path / "small" / "001" / LEDGER)
    assert 0 < book.spent() <= 5.0


class Crash(Exception):
    pass


def died_after_paying(experiment: Experiment, root: Path) -> tuple[dict[str, Any], Path, bytes]:
    """Run, die in the fourth round before its checkpoint, and go on; return the report, the folder, the ledger left."""
    calls = 0

    def observe(event: Any) -> None:
        nonlocal calls
        calls += event.kind == "round"
        if calls == 4:
            raise Crash

    with pytest.raises(Crash):
        simulate(experiment, runs=root, registry=root / "r", dataset=DATASET, observe=observe)
    left = (root / "small" / "001" / LEDGER).read_bytes()
    document, folder = simulate(experiment, runs=root, registry=root / "r", dataset=DATASET, resume=True)
    return document, folder, left


def test_a_run_that_died_between_paying_and_receiving_pays_again(tmp_path: Path) -> None:
    experiment = private({"calibrate": False, "epsilon": 1000.0, "noise": "system"})
    document, folder, left = died_after_paying(experiment, tmp_path)
    after = PrivacyLedger.read(folder / LEDGER)
    assert (folder / LEDGER).read_bytes().startswith(left)
    retried = [entry.name for entry in after.entries() if entry.attempt == 2]
    assert retried == ["slice 0: round 3"]
    assert all(entry.source is None for entry in after.entries())
    (tmp_path / "left").write_bytes(left)
    assert document["totals"]["epsilon"] == after.spent() > PrivacyLedger.read(tmp_path / "left").spent()


@pytest.mark.parametrize("changes", [{}, {"adaptive": {"quantile": 0.6}}])
def test_a_seeded_run_that_died_repeats_the_release_and_ends_with_the_same_bytes(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    experiment = private({"calibrate": False, "epsilon": 1000.0, **changes})
    document, folder, _ = died_after_paying(experiment, tmp_path / "died")
    whole, untouched = simulate(experiment, runs=tmp_path / "whole", registry=tmp_path / "whole" / "r", dataset=DATASET)
    assert (folder / LEDGER).read_bytes() == (untouched / LEDGER).read_bytes()
    assert [r["digest"] for r in document["releases"]] == [r["digest"] for r in whole["releases"]]
    assert without_clock(document) == without_clock(whole)


def silent(verb: Verb, reply: Reply) -> list[Reply]:
    return []


def gathered(guard: Guard, link: PoolLink, multiplier: float, rate: float, cohort: float) -> Params:
    experiment = private()
    recipe = Recipe(experiment, DATASET.catalog.digest(), lambda: 0.0, guard)
    base = cut(experiment, DATASET)[0]
    roster = take_census(link, base.train, recipe)
    shapes = {"counts": ((base.n_items,), np.dtype(np.float32))}

    def plan_for(slots: Any) -> Any:
        from fedrec.models.configs import PopularityConfig
        from fedrec.protocol.plan import RoundPlan
        from fedrec.random import Key

        task = CountTask(window=base.train, clip_norm=2.0)
        digest = DATASET.catalog.digest()
        return RoundPlan(0, 0, task, PopularityConfig(), base.n_items, {}, Key.from_seed(0), digest, slots)

    mechanism = guard.mechanism(multiplier, 2.0)
    return private_gather(guard, "counts", mechanism, rate, cohort, Ask(link, roster, plan_for, shapes)).sums


def test_the_noised_sum_is_the_sum_plus_noise_of_clip_times_multiplier() -> None:
    experiment = private({"calibrate": False, "epsilon": 1e12})
    guard = guard_of(experiment, in_memory(experiment), 20)
    link = PoolLink(DATASET, 2)
    quiet = gathered(guard, link, 1e-4, 1.0, 1.0)["counts"].astype(np.float64)
    errors = np.concatenate([gathered(guard, link, 3.0, 1.0, 1.0)["counts"] - quiet for _ in range(40)])
    assert errors.std() == pytest.approx(6.0, rel=6 / np.sqrt(2 * len(errors)))
    assert abs(errors.mean()) < 6 * 6.0 / np.sqrt(len(errors))


def test_a_cohort_of_nobody_is_noised_like_any_other() -> None:
    experiment = private({"calibrate": False, "epsilon": 1e12})
    guard = guard_of(experiment, in_memory(experiment), 20)
    sums = gathered(guard, PoolLink(DATASET, 2), 3.0, 1e-9, 2.0)
    assert norm(sums) > 0
    assert len(guard.ledger.entries()) == 1


def test_cohorts_follow_the_declared_population_and_are_no_function_of_the_plan() -> None:
    experiment = private({"population": 1000, "later_population": 400})
    guard = guard_of(experiment, in_memory(experiment), 1000)
    assert guard.rate(0, 8.0) == pytest.approx(0.008)
    assert guard.rate(1, 8.0) == guard.rate(2, 8.0) == pytest.approx(0.02)
    charges = [guard.ledger.charge("round", GaussianEvent(noise_multiplier=50.0)) for _ in range(2)]
    assert guard.secret(charges[0]) != guard.secret(charges[1])


@pytest.mark.parametrize("budget", [None, {"metrics": "research"}])
def test_a_spectral_model_is_published_with_and_without_privacy(tmp_path: Path, budget: dict[str, Any] | None) -> None:
    experiment = spectral(budget)
    document, folder = simulate(experiment, runs=tmp_path, registry=tmp_path / "registry", dataset=DATASET)
    assert len(document["releases"]) == 3
    if budget is None:
        assert "Not private" in document["privacy"]["statement"]
        assert not (folder / LEDGER).exists()
        last = document["releases"][-1]["rows"]
        assert last["release"]["all"]["metrics"]["ndcg@10"]["value"] > 0
    else:
        names = [entry.name for entry in PrivacyLedger.read(folder / LEDGER).entries()]
        assert names == [
            f"slice {n}: {what}" for n in range(3) for what in ("popularity counts", "co-occurrence statistic")
        ]


def test_calibration_spends_more_noise_on_a_smaller_budget() -> None:
    scales = [calibrated(private({"epsilon": budget}), (200, 200)) for budget in (8.0, 2.0)]
    assert scales[0] < scales[1]
    assert calibrated(private({"calibrate": False}), (200, 200)) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "privacy.epsilon"),
        ({"epsilon": -1.0}, "privacy.epsilon"),
        ({"delta": 1.0}, "privacy.delta"),
        ({"mode": "secret"}, "privacy"),
        ({"epsilom": 3.0}, "epsilom"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        private(changes)


def test_a_cohort_of_fixed_size_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    experiment = private(training__cohort={"kind": "fixed", "size": 5})
    with pytest.raises(PrivacyError, match="fixed size"):
        check(experiment, DATASET)
    with pytest.raises(PrivacyError, match="fixed size"):
        simulate(experiment, runs=tmp_path, registry=tmp_path / "registry", dataset=DATASET)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("codec", [{"kind": "quantised"}, {"kind": "half"}, {"kind": "low_rank"}])
def test_a_codec_that_rounds_is_refused(codec: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError, match="rounds sums"):
        check(private(training__codec=codec), DATASET)
    check(private(training__codec={"kind": "sparse"}), DATASET)


def test_a_spectral_model_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(FedrecError, match="statistics"):
        check(small_experiment(model={"kind": "spectral"}), DATASET)
    document = merged(merged(small_document(), SPECTRAL), {"training": {"base": {"rounds": 3}}})
    with pytest.raises(FedrecError, match="not fitted"):
        check(Experiment.parse(document), DATASET)


def test_tasks_of_a_private_run_are_bounded() -> None:
    base = cut(private(), DATASET)[0]
    assert CountTask(window=base.train, clip_norm=4.0).clip_norm == 4.0
    assert FitTask(window=base.train).local.clip_norm > 0
    assert EvaluateTask(window=base.test, n_known_items=3).private is False
    shares = CooccurrenceTask(window=base.train)
    assert shares.item_share + shares.feature_share <= 1


def test_the_command_line_plans_and_shows(tmp_path: Path) -> None:
    runner, experiment = CliRunner(), private()
    _, folder = simulate(experiment, runs=tmp_path, registry=tmp_path / "registry", dataset=DATASET)
    shown = runner.invoke(app, ["privacy", "show", str(folder), "--json"])
    assert shown.exit_code == 0, shown.output
    document = json.loads(shown.output)
    assert document["spent"] <= document["budget"] == 8.0
    assert document["entries"][0]["name"] == "slice 0: popularity counts"
    assert "Spent: epsilon" in runner.invoke(app, ["privacy", "show", str(folder)]).output
    plan = ["privacy", "plan", "quickstart", "--population", "900", "--epsilon", "4", "--json"]
    planned_life = json.loads(runner.invoke(app, plan).output)
    assert 3.9 < planned_life["epsilon"] <= 4.0
    assert planned_life["epsilon"] <= planned_life["epsilon_rdp"]
    given = runner.invoke(app, [*plan[:-1], "--as-given", "--json"])
    assert json.loads(given.output)["scale"] == 1.0
    for wrong in (["privacy", "plan", "quickstart"], ["privacy", "show", str(tmp_path / "nowhere")]):
        assert isinstance(runner.invoke(app, wrong).exception, PrivacyError)
