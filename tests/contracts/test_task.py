"""The contract of every task: what clients contribute adds up, is bounded, travels, and depends on nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import TypeAdapter

from fedrec.client.pool import LogPool
from fedrec.data.catalog import ItemCatalog
from fedrec.data.slices import LastWindow, TimeWindow
from fedrec.models.build import build
from fedrec.models.recommender import get_params
from fedrec.params import Accumulator, digest, non_finite, norm
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import AnyTask, CountTask, EvaluateTask, FisherTask, FitTask, LocalTraining, Task
from tests.contracts.recommender import KEY, RECOMMENDERS, uneven_log

N_ITEMS = 30
LENGTHS = (4, 1, 9, 2, 6, 12, 3)
N = len(LENGTHS)
CLIP = 3.0
FIT = FitTask(window=LastWindow(skip=1), local=LocalTraining(steps=2, learning_rate=0.5, clip_norm=CLIP))
TASKS: dict[str, AnyTask] = {
    "fit": FIT,
    "fisher": FisherTask(window=LastWindow(skip=1), clip_norm=2.0),
    "count": CountTask(window=LastWindow(skip=0), clip_norm=1.5),
    "count, not bounded": CountTask(window=TimeWindow(start=2, end=25)),
    "evaluate": EvaluateTask(window=LastWindow(skip=0, take=1), n_known_items=N_ITEMS - 5, ks=(5,), replicates=3),
    "evaluate, local only": EvaluateTask(
        window=LastWindow(skip=0, take=2), probes=2, n_known_items=N_ITEMS, ks=(5,), replicates=3, personalise=FIT
    ),
}
ADAPTER: TypeAdapter[AnyTask] = TypeAdapter(Task)


def pool() -> LogPool:
    catalog = ItemCatalog(
        tuple(map(str, range(N_ITEMS))), ("",) * N_ITEMS, (("red",), ()) * (N_ITEMS // 2), np.zeros(N_ITEMS, np.int64)
    )
    return LogPool(uneven_log(LENGTHS, N_ITEMS, KEY), catalog)


def plan(task: AnyTask, hosted: LogPool, slots: list[int] | None = None) -> RoundPlan:
    config = RECOMMENDERS["transformer"].config
    n = hosted.census(task.window, hosted.catalog.digest())
    return RoundPlan(
        slice=0,
        round=0,
        task=task,
        model=config,
        n_items=N_ITEMS,
        params=get_params(build(config, N_ITEMS, KEY)),
        key=KEY,
        catalog_digest=hosted.catalog.digest(),
        slots=np.arange(n) if slots is None else np.array(slots, np.int64),
        inputs={"popularity": np.arange(N_ITEMS, dtype=np.float32)},
    )


@pytest.fixture(params=TASKS.values(), ids=TASKS.keys())
def task(request: pytest.FixtureRequest) -> AnyTask:
    found: AnyTask = request.param
    return found


def added(tallies: list[Tally]) -> Tally:
    sums = Accumulator()
    for tally in tallies:
        sums.fold(tally.sums)
    stats = {name: sum(tally.stats[name] for tally in tallies) for name in tallies[0].stats}
    return Tally(sums.value(), sum(tally.n_clients for tally in tallies), stats)


def assert_alike(one: Tally, other: Tally) -> None:
    assert one.n_clients == other.n_clients
    assert one.stats == pytest.approx(other.stats, rel=1e-5)
    assert one.sums.keys() == other.sums.keys()
    for name, value in one.sums.items():
        assert value.dtype == other.sums[name].dtype
        np.testing.assert_allclose(value, other.sums[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_task_survives_json(task: AnyTask) -> None:
    again = ADAPTER.validate_json(task.model_dump_json())
    assert again == task
    assert type(again) is type(task)


def test_what_clients_contribute_adds_up(task: AnyTask) -> None:
    hosted = pool()
    together = hosted.run(plan(task, hosted))
    assert together.n_clients == hosted.census(task.window, hosted.catalog.digest())
    assert norm(together.sums) > 0
    alone = [hosted.run(plan(task, hosted, [slot])) for slot in range(together.n_clients)]
    assert_alike(added(alone), together)


def test_a_contribution_is_finite_and_bounded_where_the_task_says_so(task: AnyTask) -> None:
    hosted = pool()
    bound = task.local.clip_norm if isinstance(task, FitTask) else getattr(task, "clip_norm", None)
    norms = []
    for slot in range(hosted.census(task.window, hosted.catalog.digest())):
        tally = hosted.run(plan(task, hosted, [slot]))
        assert tally.n_clients == 1
        assert not non_finite(tally.sums)
        norms.append(norm(tally.sums))
    if bound is not None:
        assert max(norms) == pytest.approx(bound, rel=1e-5)  # somebody is at the bound, nobody above it
        assert min(norms) < 0.99 * bound


def test_names_shapes_and_dtypes_do_not_tell_who_took_part(task: AnyTask) -> None:
    hosted = pool()
    kinds = set()
    for slots in ([0], [2, 4], [1, 3, 5]):
        tally = hosted.run(plan(task, hosted, slots))
        kinds.add((tuple((n, v.shape, v.dtype.str) for n, v in sorted(tally.sums.items())), tuple(sorted(tally.stats))))
    assert len(kinds) == 1


def test_the_order_of_slots_and_who_else_takes_part_do_not_matter(task: AnyTask) -> None:
    hosted = pool()
    assert_alike(hosted.run(plan(task, hosted, [4, 0, 2])), hosted.run(plan(task, hosted, [0, 2, 4])))


def test_the_same_plan_gives_the_same_bytes_and_the_wire_changes_nothing(task: AnyTask) -> None:
    hosted = pool()
    asked = plan(task, hosted)
    tally = hosted.run(asked)
    document = tally.to_bytes()
    assert pool().run(RoundPlan.from_bytes(asked.to_bytes())).to_bytes() == document
    again = Tally.from_bytes(document)
    assert digest(again.sums) == digest(tally.sums)
    assert (again.n_clients, dict(again.stats)) == (tally.n_clients, dict(tally.stats))


def test_running_a_task_changes_neither_plan_nor_log(task: AnyTask) -> None:
    hosted = pool()
    asked = plan(task, hosted)
    before = digest(asked.params), hosted.log.digest()
    hosted.run(asked)
    assert (digest(asked.params), hosted.log.digest()) == before


def test_nobody_contributes_nothing(task: AnyTask) -> None:
    hosted = pool()
    tally = hosted.run(plan(task, hosted, []))
    assert (dict(tally.sums), tally.n_clients, dict(tally.stats)) == ({}, 0, {})


def test_another_round_key_changes_only_what_is_random(task: AnyTask) -> None:
    hosted = pool()
    asked = plan(task, hosted)
    one, other = hosted.run(asked), hosted.run(replace(asked, key=KEY.child("other")))
    assert (digest(one.sums) == digest(other.sums)) is isinstance(task, CountTask)
