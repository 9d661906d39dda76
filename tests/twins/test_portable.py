"""The NumPy scores of a device equal those of the torch models."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.data.batches import histories_of
from fedrec.errors import ProtocolError
from fedrec.models import portable
from fedrec.models.build import build
from fedrec.models.recommender import get_params, score_all, set_params
from tests.contracts.recommender import KEY, RECOMMENDERS

N_ITEMS = 23


@pytest.mark.parametrize("kind", RECOMMENDERS)
def test_scores_equal_those_of_torch(kind: str) -> None:
    config = RECOMMENDERS[kind].config
    model = build(config, N_ITEMS, KEY)
    draws = KEY.child("params").numpy()
    params = {name: draws.normal(0, 0.3, v.shape).astype(np.float32) for name, v in get_params(model).items()}
    for name in params.keys() & {"item_spread", "feature_spread"}:
        params[name] = params[name] @ params[name].T
    set_params(model, params)
    model.eval()
    portable.check_params(config, N_ITEMS, params)
    for length in (0, 1, 5, 15, 16, 17, 90):
        history = [int(i) for i in draws.integers(0, N_ITEMS, length)]
        expected = score_all(model, histories_of([history], model.spec))[0]
        np.testing.assert_allclose(portable.score(config, params, history), expected, rtol=1e-3, atol=1e-4)


def test_params_of_another_model_are_refused() -> None:
    config = RECOMMENDERS["popularity"].config
    with pytest.raises(ProtocolError, match="missing or unknown"):
        portable.check_params(config, 3, {"odd": np.zeros(3, np.float32)})
    with pytest.raises(ProtocolError, match="the model needs"):
        portable.check_params(config, 3, {"counts": np.zeros(4, np.float32)})
    with pytest.raises(ProtocolError, match="NaN"):
        portable.check_params(config, 3, {"counts": np.array([1, np.nan, 2], np.float32)})
