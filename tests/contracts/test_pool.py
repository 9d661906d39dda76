"""The contract of every `ClientPool`: a new kind of pool joins by one more entry in `POOLS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import numpy as np
import pytest

from fedrec.client.device_pool import DevicePool
from fedrec.client.pool import ClientPool, LogPool
from fedrec.client.store import Store
from fedrec.data.batches import draw
from fedrec.data.catalog import ItemCatalog
from fedrec.data.log import InteractionLog
from fedrec.data.slices import LastWindow, TimeWindow
from fedrec.errors import ProtocolError
from fedrec.models.build import build
from fedrec.models.configs import SampledSoftmax
from fedrec.models.recommender import get_params
from fedrec.params import non_finite, same_shapes
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Expectation
from fedrec.protocol.task import AnyTask, CountTask, FitTask, LocalTraining
from tests.contracts.recommender import KEY, RECOMMENDERS, everybody, uneven_log

N_ITEMS = 25
LENGTHS = (3, 0, 7, 1, 5, 2)
CONFIG = RECOMMENDERS["transformer"].config
WINDOW = LastWindow(skip=0)
Make = Callable[[InteractionLog, ItemCatalog], ClientPool]
FOLDERS = TemporaryDirectory()
OPENED: list[Store] = []


def device_pool(log: InteractionLog, catalog: ItemCatalog) -> ClientPool:
    """Return a pool of one encrypted store for each user of the log."""
    stores = []
    for user in range(log.n_users):
        store = Store(Path(mkdtemp(dir=FOLDERS.name)))
        for row in range(int(log.offsets[user]), int(log.offsets[user + 1])):
            store.record(catalog.ids[log.item[row]], time=int(log.time[row]))
        OPENED.append(store)
        stores.append(store)
    return DevicePool(stores, catalog, ids=np.arange(log.n_users))


POOLS: dict[str, Make] = {
    "log, batched": LogPool,
    "log, each": lambda log, catalog: LogPool(log, catalog, engine="each"),
    "log, small blocks": lambda log, catalog: LogPool(log, catalog, block=2),
    "log, the only partition": lambda log, catalog: LogPool.partition(log, catalog, 0, 1),
    "devices": device_pool,
}
TASKS: list[AnyTask] = [FitTask(window=WINDOW, local=LocalTraining(clip_norm=0.5)), CountTask(window=WINDOW)]


@pytest.fixture(params=POOLS.values(), ids=POOLS.keys())
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    found: Make = request.param
    yield found
    while OPENED:
        OPENED.pop().close()


@pytest.fixture(scope="module", autouse=True)
def _folders() -> Iterator[None]:
    yield
    FOLDERS.cleanup()


def log() -> InteractionLog:
    return uneven_log(LENGTHS, N_ITEMS, KEY)


def catalog(title: str = "") -> ItemCatalog:
    return ItemCatalog(
        tuple(map(str, range(N_ITEMS))), (title,) * N_ITEMS, ((),) * N_ITEMS, np.zeros(N_ITEMS, np.int64)
    )


def plan(task: AnyTask, slots: list[int]) -> RoundPlan:
    params = get_params(build(CONFIG, N_ITEMS, KEY))
    return RoundPlan(0, 0, task, CONFIG, N_ITEMS, params, KEY, catalog().digest(), np.array(slots, np.int64))


def test_a_pool_has_a_name(make: Make) -> None:
    assert make(log(), catalog()).name


def test_the_census_counts_people_with_something_in_the_window(make: Make) -> None:
    pool, digest = make(log(), catalog()), catalog().digest()
    assert pool.census(WINDOW, digest) == 5
    assert pool.census(LastWindow(skip=2), digest) == 3
    assert pool.census(TimeWindow(start=3, end=11), digest) == 2
    assert pool.census(TimeWindow(start=50, end=60), digest) == 0


def test_another_catalogue_is_refused_before_anything_is_done(make: Make) -> None:
    pool = make(log(), catalog("other titles"))
    with pytest.raises(ProtocolError, match=r"numbers items by catalogue .* give both the same data set"):
        pool.census(WINDOW, catalog().digest())
    with pytest.raises(ProtocolError, match="numbers items by catalogue"):
        pool.run(plan(TASKS[0], [0]))


@pytest.mark.parametrize("slots", [[5], [-1], [0, 9], [-3, 2]])
def test_clients_that_are_not_there_are_refused(make: Make, slots: list[int]) -> None:
    with pytest.raises(ProtocolError, match=f"names clients {min(slots)} to {max(slots)} of 5 eligible"):
        make(log(), catalog()).run(plan(TASKS[1], slots))


@pytest.mark.parametrize("task", TASKS, ids=["fit", "count"])
def test_the_tally_passes_the_servers_checks(make: Make, task: AnyTask) -> None:
    asked = plan(task, [0, 2, 4])
    tally = make(log(), catalog()).run(asked)
    if isinstance(task, FitTask):
        assert same_shapes(tally.sums, asked.params)
        Expectation({n: (v.shape, v.dtype) for n, v in asked.params.items()}, 3, task.local.clip_norm).check(tally)
    else:
        Expectation({"counts": ((N_ITEMS,), np.dtype(np.float32))}, 3).check(tally)
    assert tally.n_clients == 3


def test_only_the_named_clients_histories_matter(make: Make) -> None:
    """Eligible clients 0, 1 and 4 are users 0, 2 and 5; everybody else's items are exchanged."""
    asked = plan(TASKS[0], [0, 1, 4])
    original = log()
    items = original.item.copy()
    others = ~np.isin(original.user, [0, 2, 5])
    items[others] = (items[others] + 1) % N_ITEMS
    one, other = make(original, catalog()).run(asked), make(replace(original, item=items), catalog()).run(asked)
    assert one.to_bytes() == other.to_bytes()
    everyone = replace(asked, slots=np.arange(5))
    before = make(original, catalog()).run(everyone)
    assert before.to_bytes() != make(replace(original, item=items), catalog()).run(everyone).to_bytes()


def test_external_ids_and_exact_times_never_show(make: Make) -> None:
    original = log()
    renamed = replace(original, user_ids=tuple(f"somebody {i}" for i in range(6)), time=original.time * 3 + 7)
    asked = plan(TASKS[0], [0, 1, 2])
    assert make(original, catalog()).run(asked).to_bytes() == make(renamed, catalog()).run(asked).to_bytes()


def test_a_client_whose_update_is_not_finite_is_left_out_and_the_others_are_not(make: Make) -> None:
    """One item has an absurd vector: user 2 took it, and nobody else took it or drew it as a negative."""
    config = CONFIG.model_copy(update={"softmax": SampledSoftmax(negatives=1)})
    model = build(config, N_ITEMS, KEY)
    everyone = everybody(log())
    negatives = draw(replace(everyone, ids=everyone.users), model.spec, N_ITEMS, KEY.child("step", 0)).negatives
    broken = next(item for item in range(N_ITEMS) if item not in negatives)
    original = log()
    items = np.where(original.item == broken, (broken + 1) % N_ITEMS, original.item)
    items[original.offsets[2]] = broken
    pool = make(replace(original, item=items), catalog())
    params = get_params(model)
    params["item"][broken] = 1e30
    asked = replace(plan(TASKS[0], [0, 1, 2, 3, 4]), model=config, params=params)
    tally, without = pool.run(asked), pool.run(replace(asked, slots=np.array([0, 2, 3, 4])))
    assert tally.n_clients == without.n_clients == 4
    assert tally.stats["loss"] == pytest.approx(without.stats["loss"], rel=1e-5)
    assert np.isfinite(tally.stats["loss"])
    assert not non_finite(tally.sums)
    for name, value in tally.sums.items():
        np.testing.assert_allclose(value, without.sums[name], atol=1e-6)
