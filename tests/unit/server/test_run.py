"""A run's folder, its report, and going on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedrec.config import LeaveOneOutSplit
from fedrec.data.slices import LastWindow
from fedrec.errors import ConfigError, DataError, RegistryError, RunError
from fedrec.grid.simulate import simulate
from fedrec.server.registry import Registry
from fedrec.server.run import CHECKPOINT, REPORT, RunFolder, cut
from fedrec.server.work import Event
from tests.support import dataset_of, release_files, simulated, small_experiment, small_rows, without_clock

DATASET = dataset_of(small_rows())
EXPERIMENT = small_experiment(runtime__nodes=2)
ORDERED = dataset_of(small_rows(), time_unit="order")


class Stop(Exception):
    """The process dies here."""


def stop_at(kind: str, number: int) -> Any:
    """Return an observer that stops the run at the n-th event of a kind."""
    left = number

    def observe(event: Event) -> None:
        nonlocal left
        left -= event.kind == kind
        if not left:
            raise Stop

    return observe


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Registry]:
    """Run the experiment once without interruption."""
    return simulated(EXPERIMENT, DATASET, tmp_path_factory.mktemp("whole"))


def test_a_run_leaves_a_checkpoint_and_a_report_in_a_numbered_folder(tmp_path: Path) -> None:
    document, registry = simulated(EXPERIMENT, DATASET, tmp_path)
    folder = tmp_path / "runs" / "small" / "001"
    assert {path.name for path in folder.iterdir()} == {
        CHECKPOINT,
        f"{CHECKPOINT}.previous",
        REPORT,
        "report.json",
    }
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(document))
    assert document["run"] == "small/001"
    assert document["experiment_digest"] == EXPERIMENT.digest()
    assert document["data"]["n_users"] == DATASET.log.n_users
    assert document["totals"]["rounds"] == len(document["rounds"]) == 12
    assert document["totals"]["epsilon"] is None
    assert document["privacy"]["statement"].startswith("Not private")
    assert [row.run for row in registry.list()] == ["small/001"] * 3
    again, _ = simulated(EXPERIMENT, DATASET, tmp_path)
    assert again["run"] == "small/002"
    assert [row.run for row in registry.list()] == ["small/001"] * 3 + ["small/002"] * 3


@pytest.mark.parametrize(("kind", "number"), [("slice", 1), ("round", 3), ("evaluate", 1), ("slice", 2), ("round", 11)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, whole: tuple[dict[str, Any], Registry], kind: str, number: int
) -> None:
    places = {"runs": tmp_path / "runs", "registry": tmp_path / "registry", "dataset": DATASET}
    with pytest.raises(Stop):
        simulate(EXPERIMENT, observe=stop_at(kind, number), **places)
    events: list[Event] = []
    document, folder = simulate(EXPERIMENT, resume=True, observe=events.append, **places)
    assert without_clock(document) == without_clock(whole[0])
    assert release_files(tmp_path / "registry") == release_files(whole[1].root)
    assert [event.record["version"] for event in events if event.kind == "release"] == [1, 2, 3]
    n_before = 12 - sum(event.kind == "round" for event in events)
    assert n_before == {("round", 3): 2, ("evaluate", 1): 6, ("slice", 2): 6, ("round", 11): 9}.get((kind, number), 0)
    assert (folder / REPORT).is_file()


def test_resuming_needs_a_run_that_is_not_complete(tmp_path: Path) -> None:
    places = {"runs": tmp_path / "runs", "registry": tmp_path / "registry", "dataset": DATASET}
    with pytest.raises(RunError, match=r"^Nothing to resume: no run in '.*small'; start one without --resume\.$"):
        simulate(EXPERIMENT, resume=True, **places)
    assert not (tmp_path / "runs").exists()
    simulate(EXPERIMENT, **places)
    with pytest.raises(RunError, match=r"^Nothing to resume: run '.*001' is complete; start a new one"):
        simulate(EXPERIMENT, resume=True, **places)


def test_resuming_with_another_experiment_or_other_data_is_refused(tmp_path: Path) -> None:
    places = {"runs": tmp_path / "runs", "registry": tmp_path / "registry"}
    with pytest.raises(Stop):
        simulate(EXPERIMENT, dataset=DATASET, observe=stop_at("round", 3), **places)
    with pytest.raises(RunError, match="was started with another experiment"):
        simulate(small_experiment(seed=9), dataset=DATASET, resume=True, **places)
    with pytest.raises(RunError, match="was started on another catalogue"):
        simulate(EXPERIMENT, dataset=dataset_of(small_rows(seed=1)), resume=True, **places)


def test_where_the_last_checkpoint_is_damaged_a_run_goes_on_from_the_one_before_and_says_so(
    tmp_path: Path, whole: tuple[dict[str, Any], Registry]
) -> None:
    places = {"runs": tmp_path / "runs", "registry": tmp_path / "registry", "dataset": DATASET}
    with pytest.raises(Stop):
        simulate(EXPERIMENT, observe=stop_at("evaluate", 2), **places)
    path = tmp_path / "runs" / "small" / "001" / CHECKPOINT
    for damaged in (path, path.with_name(f"{CHECKPOINT}.previous")):
        bytes_before = damaged.read_bytes()
        damaged.write_bytes(bytes_before[:-1] + bytes([bytes_before[-1] ^ 1]))
    with pytest.raises(RegistryError, match=r"^The checkpoint '.*' is damaged"):
        simulate(EXPERIMENT, resume=True, **places)
    damaged.write_bytes(bytes_before)
    events: list[Event] = []
    document, _ = simulate(EXPERIMENT, resume=True, observe=events.append, **places)
    notes = [event.record["text"] for event in events if event.kind == "note"]
    assert any("the run goes on from the one before it" in note for note in notes)
    assert [one["digest"] for one in document["releases"]] == [one["digest"] for one in whole[0]["releases"]]


def test_data_that_knows_only_an_order_cannot_be_cut_by_time_and_nothing_is_written(tmp_path: Path) -> None:
    message = r"knows only the order within each person.*use split\.kind = \"leave_one_out\"\.$"
    with pytest.raises(RunError, match=message):
        simulate(EXPERIMENT, runs=tmp_path / "runs", registry=tmp_path / "registry", dataset=ORDERED)
    assert list(tmp_path.iterdir()) == []


def test_data_that_knows_only_an_order_can_be_left_one_out() -> None:
    [one] = cut(small_experiment(split=LeaveOneOutSplit().model_dump()), ORDERED)
    assert (one.train, one.test) == (LastWindow(skip=2), LastWindow(skip=0, take=1))


def test_shares_that_leave_nothing_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a slice would be empty"):
        simulate(
            small_experiment(split__base=0.9, split__holdout=0.3),
            runs=tmp_path / "runs", registry=tmp_path / "registry", dataset=DATASET,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_run_folders_are_numbered_after_the_highest(tmp_path: Path) -> None:
    assert RunFolder.new(tmp_path, EXPERIMENT) == RunFolder(tmp_path / "small" / "001", "small/001")
    (tmp_path / "small" / "notes").mkdir()
    (tmp_path / "small" / "012").mkdir()
    assert RunFolder.new(tmp_path, EXPERIMENT).name == "small/013"
    assert RunFolder.unfinished(tmp_path, EXPERIMENT).name == "small/013"


def test_the_engines_and_the_number_of_nodes_give_nearly_the_same_releases(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"training__cohort": {"kind": "fixed", "size": 1000}}  # everybody, however many nodes
    documents = [
        simulated(small_experiment(runtime=runtime, **changes), DATASET, tmp_path / str(number))[0]
        for number, runtime in enumerate(({"nodes": 1}, {"nodes": 3}, {"nodes": 1, "engine": "each"}))
    ]
    tables = [Registry(tmp_path / str(number) / "registry").load(3).params["item"] for number in range(3)]
    losses = [[record["loss"] for record in document["rounds"]] for document in documents]
    for table, loss in zip(tables[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-4)
        assert abs(table - tables[0]).max() < 1e-2 * abs(tables[0]).max()


@pytest.mark.parametrize(
    ("changes", "told"), [({"model__heads": 3}, "heads"), ({"evaluation__ks": [5, 5]}, "cut-offs of the metrics")]
)
def test_settings_that_contradict_each_other_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    experiment = small_experiment(**changes)
    with pytest.raises(ConfigError, match=told):
        simulate(experiment, runs=tmp_path / "runs", registry=tmp_path / "registry", dataset=DATASET)
    assert list(tmp_path.iterdir()) == []
