"""A single upload tells which items were touched; under the noise of a release it does not."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.audit.uploads import Leak, touched
from fedrec.client.pool import LogPool
from fedrec.data.slices import LastWindow
from fedrec.data.synthetic import checkerboard
from fedrec.models.build import build
from fedrec.models.configs import PopularityConfig, TransformerConfig
from fedrec.models.recommender import get_params
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.protocol.codec import Sparse
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import AnyTask, CooccurrenceTask, CountTask, FitTask, LocalTraining
from fedrec.random import Key

KEY = Key.from_seed(3)
DATA = checkerboard(40, 200, 2, 12, KEY)
WINDOW = LastWindow(skip=0)


def leaks(task: AnyTask, plan: RoundPlan | None = None, clip_norm: float = 1.0) -> dict[tuple[str, str], Leak]:
    empty = RoundPlan(0, 0, task, PopularityConfig(), 200, {}, KEY, DATA.catalog.digest(), np.arange(0))
    mechanism = GaussianMechanism(clip_norm, 8.0)
    found = touched(LogPool(DATA.log, DATA.catalog), plan or empty, mechanism, 30, KEY)
    return {(leak.part, leak.view): leak for leak in found}


def test_counts_name_every_item_and_noise_hides_them() -> None:
    found = leaks(CountTask(window=WINDOW, clip_norm=1.0))
    alone, noised = found["counts", "upload"], found["counts", "noised"]
    assert (alone.precision, alone.recall, alone.auc) == (1.0, 1.0, 1.0)
    assert alone.people == 30
    assert alone.chance == pytest.approx(12 / 200)
    assert noised.auc_low < 0.5 + 0.03
    assert noised.precision < 3 * noised.chance


def test_of_masked_uploads_only_the_noised_sum_is_attacked() -> None:
    task = CountTask(window=WINDOW, clip_norm=1.0)
    plan = RoundPlan(0, 0, task, PopularityConfig(), 200, {}, KEY, DATA.catalog.digest(), np.arange(0))
    found = touched(LogPool(DATA.log, DATA.catalog), plan, GaussianMechanism(1.0, 8.0), 5, KEY, masked=True)
    assert [leak.view for leak in found] == ["noised"]


def test_the_rows_of_a_model_update_name_targets_among_the_drawn_negatives() -> None:
    config = TransformerConfig(dim=8, blocks=1, heads=2, expand=1, length=12)
    config = config.model_copy(update={"softmax": config.softmax.model_copy(update={"negatives": 12})})
    task = FitTask(window=WINDOW, local=LocalTraining(clip_norm=1.0))
    params = get_params(build(config, 200, KEY))
    digest = DATA.catalog.digest()
    plan = RoundPlan(0, 0, task, config, 200, params, KEY, digest, np.arange(0), codec=Sparse())
    found = leaks(task, plan)["rows", "upload"]
    assert found.recall > 0.95
    assert 0.3 < found.precision < 0.9  # the others are negatives
    assert found.auc > 0.95
    assert leaks(task, plan)["rows", "noised"].auc_low < 0.53


def test_a_dense_sketch_of_features_still_tells_of_items() -> None:
    """A client's matrix in feature space lies in the span of the features of what the client took."""
    features = KEY.child("features").numpy().standard_normal((200, 16)).astype(np.float32)
    task = CooccurrenceTask(window=WINDOW, sketch="features", item_share=0.0, feature_share=1.0)  # no counts beside it
    plan = RoundPlan(
        0, 0, task, PopularityConfig(), 200, {}, KEY, DATA.catalog.digest(), np.arange(0), {"features": features}
    )
    found = leaks(task, plan)
    assert found.keys() == {("features", "upload"), ("features", "noised")}
    assert found["features", "upload"].auc_low > 0.55
    assert found["features", "noised"].auc_low < 0.53
