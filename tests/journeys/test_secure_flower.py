"""A secure sum over Flower messages: ServerApp and ClientApp on a Grid, real histories, each kind of task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedrec.client.app import client_app
from fedrec.client.pool import LogPool
from fedrec.data.slices import LastWindow
from fedrec.grid.in_process import SERVER_NODE_ID, InProcessGrid
from fedrec.models.configs import PopularityConfig
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.settings import SecureSum
from fedrec.protocol.codec import Shapes
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import AnyTask, CooccurrenceTask, CountTask, FitTask, LocalTraining
from fedrec.random import Key
from fedrec.server.app import GridLink, server_app
from fedrec.server.gather import Ask, Roster, gather
from fedrec.server.secure import SecureGathered, secure_gather
from tests.support import dataset_of, small_experiment, small_rows

DATASET = dataset_of(small_rows())
N = len(DATASET.catalog.ids)
WINDOW = LastWindow(skip=1)


def run(task: AnyTask, params: Any, inputs: Any, shapes: Shapes, clip: float, nodes: int) -> tuple[Any, SecureGathered]:
    pools = [LogPool.partition(DATASET.log, DATASET.catalog, index, nodes) for index in range(nodes)]
    grid = InProcessGrid(client_app(lambda context: pools[context.node_id - SERVER_NODE_ID - 1]), [{}] * nodes, {})
    found: list[Any] = []
    model = small_experiment().model if params else PopularityConfig()

    def plan_for(slots: Any) -> RoundPlan:
        return RoundPlan(0, 2, task, model, N, params, Key.from_seed(4), DATASET.catalog.digest(), slots, inputs)

    def main(link: GridLink, context: Any) -> None:
        sizes = [pool.census(WINDOW, DATASET.catalog.digest()) for pool in pools]
        roster = Roster(
            tuple((node, pool.name, size) for node, pool, size in zip(link.nodes(), pools, sizes, strict=True))
        )
        ask = Ask(link, roster, plan_for, shapes)
        found.append(gather(ask, bound=clip))
        mechanism = GaussianMechanism(clip, 1e-4)
        charge = PrivacyLedger(None, epsilon=None, delta=1e-5).charge("sum", mechanism.event(1.0), clip_norm=clip)
        settings = SecureSum(minimum=5, neighbours=28)
        found.append(secure_gather(ask, ask.everybody, mechanism, charge, settings))

    server_app(main)(grid, grid.server_context())
    return found[0], found[1]


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 7])
@pytest.mark.parametrize("kind", ["count", "features", "fit"])
def test_the_noised_secure_sum_is_the_plain_one_but_for_little_noise(kind: str, nodes: int) -> None:
    f32 = np.dtype(np.float32)
    params: Any = {}
    inputs: Any = {}
    clip = 1.0
    if kind == "count":
        task: AnyTask = CountTask(window=WINDOW, clip_norm=2.0)
        shapes, clip = {"counts": ((N,), f32)}, 2.0
    elif kind == "features":
        task = CooccurrenceTask(window=WINDOW, sketch="features", item_share=0.0, feature_share=1.0)
        inputs = {"features": Key.from_seed(1).numpy().standard_normal((N, 6)).astype(np.float32)}
        shapes = {"features": ((21,), f32)}
    else:
        from fedrec.models.build import build

        task = FitTask(window=WINDOW, local=LocalTraining(learning_rate=0.5, clip_norm=1.0))
        fresh = build(small_experiment().model, N, Key.from_seed(2))
        params = {name: value.detach().numpy() for name, value in fresh.named_parameters()}
        shapes = {name: (value.shape, value.dtype) for name, value in params.items()}
    plain, secure = run(task, params, inputs, shapes, clip, nodes)
    assert plain.n_clients == secure.n_clients > 20
    assert secure.refused == ()
    assert secure.stats == {}
    for name, value in plain.sums.items():
        np.testing.assert_allclose(secure.sums[name], value, atol=clip * 1e-4 * 8 + 1e-4)
    assert any(float(np.abs(value).max()) > 0.05 for value in plain.sums.values())
