"""Rounds with correlated noise: people take turns, a stage is paid once, and no row of noise meets two sums."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedrec.cli import app
from fedrec.client.pool import LogPool
from fedrec.client.workers import WorkerPool
from fedrec.config import Experiment
from fedrec.errors import BudgetExhausted, ConfigError, PrivacyError
from fedrec.grid.simulate import simulate
from fedrec.params import Params
from fedrec.privacy.accounting import epsilon
from fedrec.privacy.events import MatrixEvent
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.privacy.matrix import BandedMechanism, CorrelatedNoise, optimised
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import FitTask, LocalTraining, Turn
from fedrec.random import Key
from fedrec.server.guard import guard_of
from fedrec.server.judge import initial
from fedrec.server.round import Recipe, run_round, take_census, turn_of
from fedrec.server.run import LEDGER, check, cut
from fedrec.server.stages import NOISE, Stages
from fedrec.server.state import ServerState
from fedrec.server.work import Event
from tests.support import PoolLink, dataset_of, merged, same_bytes, small_document, small_rows

DATASET = dataset_of(small_rows())
GROUPS = 3
TURNS: dict[str, Any] = {"training__cohort": {"kind": "turns", "groups": GROUPS}}
PRIVACY: dict[str, Any] = {
    "mode": "central", "epsilon": 8.0, "delta": 1e-3, "noise": "seed", "fit_noise": {"kind": "banded", "band": 2},
}  # fmt: skip


class Crash(Exception):
    pass


def correlated(privacy: Mapping[str, Any] | None = None, **others: Any) -> Experiment:
    document = small_document(**TURNS, **others)
    document["training"]["cohort"] = {"kind": "turns", "groups": GROUPS, **others.get("cohort", {})}
    return Experiment.parse(merged(document, {"privacy": {**PRIVACY, **(privacy or {})}}))


def run(experiment: Experiment, root: Path, **more: Any) -> tuple[dict[str, Any], Path]:
    return simulate(experiment, runs=root, registry=root / "registry", dataset=DATASET, **more)


def crashing(at: int) -> Any:
    """Return an observer that dies after round `at` was computed, before it is checkpointed."""
    seen = 0

    def observe(event: Event) -> None:
        nonlocal seen
        seen += event.kind == "round"
        if seen == at:
            raise Crash

    return observe


def digests(document: Mapping[str, Any]) -> list[str]:
    return [release["digest"] for release in document["releases"]]


def test_everybody_takes_part_in_every_third_round_and_never_more_often() -> None:
    experiment, ids = correlated(), np.arange(5_000)
    taken = np.stack([turn.taken(ids) for t in range(12) if (turn := turn_of(experiment, 0, t)) is not None])
    assert (taken.reshape(4, GROUPS, -1).sum(axis=1) == 1).all()
    assert (taken[GROUPS:] == taken[:-GROUPS]).all()
    sizes = taken[:GROUPS].sum(axis=1)
    assert (np.abs(sizes - 5_000 / GROUPS) < 6 * np.sqrt(5_000 * (2 / 9))).all()
    # Nobody's group depends on who else is there, and slices are cut anew.
    turn = turn_of(experiment, 0, 1)
    assert turn is not None
    assert (turn.taken(ids[1::7]) == taken[1][1::7]).all()
    other = turn_of(experiment, 1, 1)
    assert other is not None
    assert (other.taken(ids) != taken[1]).any()
    assert turn_of(Experiment.parse(small_document()), 0, 1) is None


def plan_of(base: Any, state: ServerState, turn: Turn | None, slots: Any) -> RoundPlan:
    task = FitTask(window=base.train, local=LocalTraining(), turn=turn)
    experiment, digest = correlated(), DATASET.catalog.digest()
    return RoundPlan(0, 0, task, experiment.model, base.n_items, state.params, Key.from_seed(1), digest, slots)


def fresh(experiment: Experiment) -> tuple[Any, ServerState]:
    base, digest = cut(experiment, DATASET)[0], DATASET.catalog.digest()
    recipe = Recipe(experiment, digest, lambda: 0.0)
    params = initial(experiment.model, base.n_items, recipe)
    return base, ServerState("small/001", experiment.digest(), digest, params=params)


def test_a_pool_trains_only_those_whose_turn_it_is() -> None:
    base, state = fresh(correlated())
    turn = Turn(groups=GROUPS, group=1, key=Key.from_seed(8).hex())
    ids = 1_000 + 7 * np.arange(DATASET.log.n_users)
    pool = LogPool(DATASET.log, DATASET.catalog, ids=ids)
    n = pool.census(base.train, DATASET.catalog.digest())
    everybody = np.arange(n)
    eligible = pool._eligible(base.train).ids
    chosen = np.flatnonzero(turn.taken(eligible))
    assert 0 < len(chosen) < n
    got = pool.run(plan_of(base, state, turn, everybody))
    wanted = pool.run(plan_of(base, state, None, chosen))
    assert got.n_clients == wanted.n_clients == len(chosen)
    assert same_bytes(got.sums, wanted.sums)
    nobody = plan_of(base, state, turn, np.flatnonzero(~turn.taken(eligible)))
    assert pool.run(nobody).n_clients == 0


@pytest.mark.slow
def test_workers_train_only_those_whose_turn_it_is() -> None:
    base, state = fresh(correlated())
    turn = Turn(groups=GROUPS, group=0, key=Key.from_seed(8).hex())
    alone = LogPool.partition(DATASET.log, DATASET.catalog, 0, 1)
    plan = plan_of(base, state, turn, np.arange(alone.census(base.train, DATASET.catalog.digest())))
    with WorkerPool(DATASET.log, DATASET.catalog, 2) as workers:
        shared = workers.run(plan)
    expected = alone.run(plan)
    assert shared.n_clients == expected.n_clients
    for name, value in expected.sums.items():
        assert np.allclose(shared.sums[name], value, atol=1e-5)


def test_a_stage_is_one_charge_and_the_life_spends_the_budget(tmp_path: Path) -> None:
    document, folder = run(correlated(), tmp_path)
    book = PrivacyLedger.read(folder / LEDGER)
    stages = {e.name: e.event for e in book.entries() if isinstance(e.event, MatrixEvent)}
    assert list(stages) == [f"slice {n}: rounds" for n in range(3)]
    assert [(s.rounds, s.max_participations) for s in stages.values()] == [(6, 2), (3, 1), (3, 1)]
    assert 7.9 < book.spent() <= 8.0
    assert not [e for e in book.entries() if "round " in e.name]
    assert all(r["refused"] == [] and r["loss"] is None for r in document["rounds"])
    assert {r["slice"] for r in document["rounds"] if r["update_norm"] > 0} == {0, 1, 2}
    assert "correlated over 2" in document["privacy"]["statement"]
    assert "Poisson" not in document["privacy"]["statement"]


def test_the_same_seed_repeats_the_run_and_a_resume_between_rounds_changes_nothing(tmp_path: Path) -> None:
    whole = digests(run(correlated(), tmp_path / "a")[0])
    assert digests(run(correlated(), tmp_path / "b")[0]) == whole

    def stop(event: Event) -> None:  # a slice begins: all before it is checkpointed
        if event.kind == "slice" and event.record["slice"] == 2:
            raise Crash

    with pytest.raises(Crash):
        run(correlated(), tmp_path / "c", observe=stop)
    assert digests(run(correlated(), tmp_path / "c", resume=True)[0]) == whole
    assert digests(run(correlated({"noise": "system"}), tmp_path / "d")[0]) != whole


def test_a_round_that_was_begun_is_never_repeated_with_its_noise_and_costs_nothing_more(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run(correlated(), tmp_path, observe=crashing(3))
    folder = tmp_path / "small" / "001"
    before = PrivacyLedger.read(folder / LEDGER).entries()
    assert json.loads((folder / NOISE).read_text())["begun"] == 3
    document, _ = run(correlated(), tmp_path, resume=True)
    book = PrivacyLedger.read(folder / LEDGER)
    assert book.entries()[: len(before)] == before
    assert all(entry.attempt == 1 for entry in book.entries())
    assert book.spent() <= 8.0
    lost = [r for r in document["rounds"] if r["refused"]]
    assert [(r["slice"], r["round"]) for r in lost] == [(0, 2)]
    assert lost[0]["update_norm"] == 0.0
    assert lost[0]["bytes_down"] == 0  # nobody was asked
    assert "not repeated" in lost[0]["refused"][0]["reason"]


def test_rows_after_a_crash_are_those_that_would_have_been(tmp_path: Path) -> None:
    """A round's update is the exact mean plus the row: the noise goes on in the stream, it does not start anew."""
    experiment = correlated({"calibrate": False, "epsilon": 1e9, "fit": 1e-5})
    mechanism = BandedMechanism(experiment.training.local.clip_norm, 1.0, optimised(6, 2, GROUPS))
    key, rows = Key.from_seed(2), []
    for live in (False, True):
        path = tmp_path / str(live)
        with PrivacyLedger(path / LEDGER, epsilon=1e9, delta=1e-3) as ledger:
            stages = Stages(ledger, key)
            for t in range(3):
                row = stages.at("slice 0: rounds", t, lambda: mechanism).begin(t, {"w": (4,)})
            if live:
                rows.append(stages.at("slice 0: rounds", 3, lambda: mechanism).begin(3, {"w": (4,)}))
        if not live:
            with PrivacyLedger(path / LEDGER, epsilon=1e9, delta=1e-3) as ledger:
                stage = Stages(ledger, key).at("slice 0: rounds", 2, lambda: mechanism)
                assert stage.begin(2, {"w": (4,)}) is None
                assert row is not None
                rows.append(stage.begin(3, {"w": (4,)}))
                assert len(ledger.entries()) == 1
    assert rows[0] is not None
    assert rows[1] is not None
    assert same_bytes(rows[0], rows[1])


@pytest.mark.parametrize("noise", ["system", "seed"])
def test_the_secret_is_its_owners_alone_and_is_gone_when_the_stage_is_over(tmp_path: Path, noise: str) -> None:
    with pytest.raises(Crash):
        run(correlated({"noise": noise}), tmp_path, observe=crashing(2))
    path = tmp_path / "small" / "001" / NOISE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(json.loads(path.read_text())["key"]) == 64
    run(correlated({"noise": noise}), tmp_path, resume=True)
    assert json.loads(path.read_text())["key"] == ""
    checkpoint = (path.parent / "state.fedrec").read_bytes()
    assert b"coefficients" not in checkpoint


def test_without_its_secret_the_rest_of_a_stage_is_paid_anew_or_refused(tmp_path: Path) -> None:
    experiment = correlated({"calibrate": False, "epsilon": 1e6})
    with pytest.raises(Crash):
        run(experiment, tmp_path, observe=crashing(3))
    folder = tmp_path / "small" / "001"
    (folder / NOISE).unlink()
    document, _ = run(experiment, tmp_path, resume=True)
    again = [e for e in PrivacyLedger.read(folder / LEDGER).entries() if e.attempt == 2]
    assert [e.name for e in again] == ["slice 0: rounds"]
    assert isinstance(again[0].event, MatrixEvent)
    assert again[0].event.rounds == 4  # rounds 2 to 5
    assert not [r for r in document["rounds"] if r["refused"]]

    with pytest.raises(Crash):
        run(correlated(), tmp_path / "tight", observe=crashing(3))
    (tmp_path / "tight" / "small" / "001" / NOISE).unlink()
    with pytest.raises(BudgetExhausted):
        run(correlated(), tmp_path / "tight", resume=True)


def test_a_damaged_record_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run(correlated(), tmp_path, observe=crashing(3))
    (tmp_path / "small" / "001" / NOISE).write_text("{}")
    with pytest.raises(PrivacyError, match="damaged; delete it"):
        run(correlated(), tmp_path, resume=True)


def step_of(experiment: Experiment, n_rounds: int) -> list[Params]:
    """Return what the rounds of a stage release, as the difference that a server of plain SGD makes of them."""
    base, state = fresh(experiment)
    ledger = PrivacyLedger(None, epsilon=None, delta=1e-3)
    recipe = Recipe(experiment, DATASET.catalog.digest(), lambda: 0.0, guard_of(experiment, ledger, 20))
    link = PoolLink(DATASET, 2)
    roster, steps = take_census(link, base.train, recipe), []
    for _ in range(n_rounds):
        before = state.params
        state, _ = run_round(state, link, recipe, base, roster)
        state, steps = state.advanced(params=before), [*steps, {n: state.params[n] - before[n] for n in before}]
    return steps


def test_a_round_releases_the_sum_of_its_group_plus_its_row_over_the_public_cohort() -> None:
    plain = {"training__server": {"kind": "sgd"}, "training__average": 0.0, "training__base__warmup": 0,
             "training__base__final": 1.0}  # fmt: skip
    loud = correlated({"calibrate": False, "epsilon": 1e12, "fit": 3.0}, **plain)
    quiet = correlated({"calibrate": False, "epsilon": 1e12, "fit": 1e-7}, **plain)
    mechanism = BandedMechanism(loud.training.local.clip_norm, 3.0, optimised(6, 2, GROUPS))
    root = Key.from_seed(loud.seed).child("privacy", "charge", "slice 0: rounds", 1)
    with_noise, without = step_of(loud, 4), step_of(quiet, 4)
    noise = CorrelatedNoise(mechanism.strategy, root, {name: v.shape for name, v in without[0].items()})
    for t in range(4):
        row = noise.row(t)
        for name, value in without[t].items():
            expected = mechanism.deviation * row[name] / (20 / GROUPS)
            assert np.allclose(with_noise[t][name] - value, expected, atol=1e-3 * mechanism.deviation)


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (lambda: correlated({"fit_noise": {"kind": "banded", "band": 4}}), "lower privacy.fit_noise.band"),
        (lambda: correlated({"fit_noise": {"kind": "independent"}}), "not sampled"),
        (lambda: correlated({"adaptive": {}}), "leave out privacy.adaptive"),
        (
            lambda: Experiment.parse(merged(small_document(), {"privacy": PRIVACY})),
            'set training.cohort.kind to "turns"',
        ),
    ],
)
def test_mixtures_that_cannot_be_accounted_are_refused_before_anything_is_written(
    tmp_path: Path, experiment: Any, message: str
) -> None:
    with pytest.raises(PrivacyError, match=message):
        check(experiment(), DATASET)
    with pytest.raises(PrivacyError, match=message):
        run(experiment(), tmp_path)
    assert not (tmp_path / "small").exists()


def test_masked_sums_know_neither_correlated_noise_nor_turns(tmp_path: Path) -> None:
    document = small_document()
    masked: dict[str, Any] = {"mode": "distributed", "epsilon": 8.0, "secure_sum": {"minimum": 3}}
    with pytest.raises(ConfigError, match="fit_noise"):
        Experiment.parse(merged(document, {"privacy": {**masked, "fit_noise": {"kind": "banded"}}}))
    document["training"]["cohort"] = {"kind": "turns", "groups": GROUPS}
    with pytest.raises(PrivacyError, match="not sampled"):
        check(Experiment.parse(merged(document, {"privacy": masked})), DATASET)


def test_turns_need_no_privacy(tmp_path: Path) -> None:
    document = small_document()
    document["training"]["cohort"] = {"kind": "turns", "groups": GROUPS}
    rounds = run(Experiment.parse(document), tmp_path)[0]["rounds"]
    asked = {record["cohort"] for record in rounds if record["slice"] == 0}
    assert len(asked) == 1
    assert sum(record["clients"] for record in rounds[:GROUPS]) == asked.pop()


def test_the_plan_shows_the_stage(tmp_path: Path) -> None:
    from fedrec.evaluation.report import toml

    path = tmp_path / "small.toml"
    path.write_text(toml(correlated().model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    command = ["privacy", "plan", str(path), "--population", "900"]
    shown = CliRunner().invoke(app, [*command, "--json"])
    assert shown.exit_code == 0, shown.output
    document = json.loads(shown.output)
    purposes = [row["purpose"] for row in document["events"] if row["kind"] == "matrix"]
    assert purposes[0] == (
        "slice 0: 6 rounds, one release: noise correlated over 2, each person every 3 rounds, 2 times at most"
    )
    assert 7.9 < document["epsilon"] <= 8.0
    events = [MatrixEvent.model_validate({k: v for k, v in row.items() if k not in ("purpose", "sampling", "count")})
              for row in document["events"] if row["kind"] == "matrix"]  # fmt: skip
    assert epsilon(events, 1e-3) < document["epsilon"]
    assert "one release" in CliRunner().invoke(app, command).output.replace("\n", " ")
