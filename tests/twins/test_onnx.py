"""An ONNX graph on onnxruntime scores as the torch model does, and recommends the same."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.data.batches import histories_of
from fedrec.data.context import ContextConfig
from fedrec.errors import FedrecError
from fedrec.models.build import build
from fedrec.models.configs import AnyModelConfig
from fedrec.models.recommender import get_params, score_all, set_params
from fedrec.serving.export import inputs_for, to_onnx
from tests.contracts.recommender import KEY, RECOMMENDERS

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
N_ITEMS = 43
UNSOLVED = {"factorisation"}
MOVED = ("transformer", "text transformer, adapters", "gru", "ncf", "factorisation machine", "lightgcn")


@pytest.mark.parametrize("kind", sorted(RECOMMENDERS.keys() - UNSOLVED))
def test_onnx_scores_and_recommends_as_torch_does(kind: str) -> None:
    config: AnyModelConfig = RECOMMENDERS[kind].config
    model = build(config, N_ITEMS, KEY)
    draws = KEY.child("params").numpy()
    params = {name: draws.normal(0, 0.3, v.shape).astype(np.float32) for name, v in get_params(model).items()}
    params |= {name: value @ value.T for name, value in params.items() if name.endswith("spread")}
    set_params(model, params)
    model.eval()
    graph = to_onnx(config, params)
    onnx.checker.check_model(graph, full_check=True)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    for length in (0, 1, 2, 15, 16, 17, 90):
        history = [int(i) for i in draws.integers(0, N_ITEMS, length)]
        expected = score_all(model, histories_of([history], model.spec))[0]
        (scores,) = session.run(None, {"items": inputs_for(config, history)})
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=2e-4)
        assert set(np.argsort(-scores)[:10]) == set(np.argsort(-expected)[:10])


@pytest.mark.parametrize("kind", MOVED)
def test_a_graph_looks_at_the_moment_as_torch_does(kind: str) -> None:
    context = ContextConfig(hours=6, device=("tv",))
    config: AnyModelConfig = RECOMMENDERS[kind].config.model_copy(update={"context": context})
    model = build(config, N_ITEMS, KEY)
    draws = KEY.child("moments").numpy()
    params = {name: draws.normal(0, 0.3, v.shape).astype(np.float32) for name, v in get_params(model).items()}
    set_params(model, params)
    model.eval()
    session = onnxruntime.InferenceSession(
        to_onnx(config, params).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    history, found = [3, 1, 4], []
    for what in ({}, {"hour": 21}, {"hour": 21, "device": "tv"}):
        moment = context.moment(what)
        expected = score_all(model, histories_of([history], model.spec), moments=moment[None])[0]
        (scores,) = session.run(None, {"items": inputs_for(config, history), "moment": moment})
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=2e-4)
        found.append(scores)
    assert not np.allclose(found[0], found[1])
    assert not np.allclose(found[1], found[2])


def test_what_onnx_cannot_say_is_refused_with_the_way_out() -> None:
    config = RECOMMENDERS["factorisation"].config
    with pytest.raises(FedrecError, match="device"):
        to_onnx(config, get_params(build(config, N_ITEMS, KEY)))
