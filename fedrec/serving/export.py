"""A release as an ONNX graph, for any runtime that reads it: one history in, the scores of all items out.

The graphs say what `portable` says, operation by operation. Input "items" [n] int64 is what `inputs_for` returns,
output "scores" is [n_items] float32. A model that looks at the moment of a request has a second input "moment" [m]
float32, what `ContextConfig.moment` returns; zeros: nothing is known of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedrec.data.batches import BatchSpec, histories_of
from fedrec.errors import FedrecError
from fedrec.models.configs import (
    AnyModelConfig,
    AnySequenceConfig,
    BlendConfig,
    FactorisationConfig,
    GruConfig,
    LanguageConfig,
    MachineConfig,
    NcfConfig,
    NearestConfig,
    PopularityConfig,
    SequenceConfig,
    SpectralConfig,
    TextTransformerConfig,
    TransformerConfig,
)
from fedrec.models.portable import merged, part_of
from fedrec.params import Params

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
"""The first with Gelu."""
FAR = -1e9
"""Logit of what lies later; the exponential of it is 0."""


def inputs_for(config: AnyModelConfig, history: Sequence[int]) -> NDArray[np.int64]:
    """Return the graph's input for a history of item numbers, oldest first: the newest ones, perhaps after a -1.

    A model that predicts the next item begins with -1, where nothing came before yet, as long as that is in sight.
    """
    if isinstance(config, PopularityConfig | SpectralConfig | NearestConfig):
        length = 1 if isinstance(config, PopularityConfig) else config.length
        return np.array(list(history)[-length:], np.int64)
    if isinstance(config, BlendConfig):
        return np.array(list(history)[-max(config.prior.length, config.fitted.length) :], np.int64)
    items, mask = histories_of([list(history)], BatchSpec("causal", config.length))
    found: NDArray[np.int64] = items[0][: max(int(mask[0].sum()), 1)]
    return found


def to_onnx(config: AnyModelConfig, params: Params) -> ModelProto:
    """Return the model as an ONNX graph.

    Raises:
        FedrecError: the package onnx is not installed, or the model solves equations for each person, for which ONNX
            has no operation.
    """
    try:
        from onnx import TensorProto, helper
    except ImportError as error:
        raise FedrecError("Exporting to ONNX needs the package onnx; pip install 'fedrec[onnx]'.") from error
    graph = _Graph()
    n_items = len(next(value for name, value in params.items() if name.split(".")[-1] in _ROWS))
    graph.node("Identity", _scores(graph, config, params, "items"), out="scores")
    inputs = [helper.make_tensor_value_info("items", TensorProto.INT64, ["n"])]
    context = config.context if isinstance(config, SequenceConfig) else None
    if context is not None:
        inputs.append(helper.make_tensor_value_info("moment", TensorProto.FLOAT, [context.width]))
    made = helper.make_graph(
        graph.nodes,
        "fedrec",
        inputs,
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [n_items])],
        graph.constants,
    )
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10, producer_name="fedrec"
    )


_ROWS = ("item", "items", "text", "counts")


class _Graph:
    """Nodes and constants of a graph, named as they come."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def node(self, kind: str, *inputs: Any, out: str = "", **attributes: Any) -> str:
        """Add an operation on names or constants, and return the name of its output."""
        from onnx import helper

        names = [one if isinstance(one, str) else self.constant(one) for one in inputs]
        out = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [out], **attributes))
        return out

    def constant(self, value: Any) -> str:
        """Add a constant; a float becomes float32."""
        from onnx import numpy_helper

        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array.astype(np.int64)
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name


def _scores(g: _Graph, config: AnyModelConfig, params: Params, items: str) -> str:
    if isinstance(config, PopularityConfig):
        # The history does not matter, but every graph has the same input.
        nothing = g.node("ReduceSum", g.node("Mul", g.node("Cast", items, to=1), 0.0), [0], keepdims=1)
        return g.node("Add", params["counts"], nothing)
    if isinstance(config, SpectralConfig):
        return _spectral(g, config, params, g.node("Slice", items, [-config.length], [2**31 - 1]))
    if isinstance(config, NearestConfig):
        unit = params["text"] / np.maximum(np.linalg.norm(params["text"], axis=1, keepdims=True), 1e-12)
        user = _decayed(g, unit, items, config.decay)
        return g.node("MatMul", g.node("Div", user, _at_least(g, g.node("ReduceL2", user, keepdims=1), 1e-12)), unit.T)
    if isinstance(config, BlendConfig):
        return _blend(g, config, params, items)
    if isinstance(config, FactorisationConfig):
        raise FedrecError(
            "A factorisation solves equations for each person, for which ONNX has no operation; export it for devices "
            "instead (--format device)."
        )
    if isinstance(config, TextTransformerConfig):
        config, params = merged(config, params)
    user = _user(g, config, params, items)
    if config.context is not None:
        user = g.node("Add", user, g.node("Unsqueeze", g.node("MatMul", params["moment"], "moment"), [0]))
    if isinstance(config, NcfConfig):
        side = g.node("Gemm", user, params["person.weight"], params["person.bias"], transB=1)  # [1 h]
        inner = g.node("Relu", g.node("Add", params["item"] @ params["thing"].T, side))
        network = g.node("Reshape", g.node("MatMul", inner, params["out"].T), [-1])
        scores = g.node("Add", _flat(g, user, (params["item"] * params["gate"]).T), network)
    else:
        scores = _flat(g, user, params["item"].T)
    if isinstance(config, MachineConfig):
        scores = g.node("Add", scores, params["bias"][:, 0])
    if config.popularity_weight:
        scores = g.node("Add", scores, config.popularity_weight * params["popularity"][:, 0])
    return scores


def _flat(g: _Graph, user: str, table: Any) -> str:
    return g.node("Reshape", g.node("MatMul", user, table), [-1])


def _at_least(g: _Graph, value: str, least: float) -> str:
    return g.node("Max", value, least)


def _decayed(g: _Graph, table: Any, items: str, decay: float) -> str:
    """Return the sum of the items' rows, weight ``decay^age``: [d]."""
    n = g.node("Shape", items)
    age = g.node("Sub", g.node("Sub", g.node("Squeeze", n), 1), _range(g, n))
    weight = g.node("Pow", decay, g.node("Cast", age, to=1))
    rows = g.node("Gather", table, items)
    return g.node("ReduceSum", g.node("Mul", rows, g.node("Unsqueeze", weight, [1])), [0], keepdims=0)


def _range(g: _Graph, n: str) -> str:
    return g.node("Range", 0, g.node("Squeeze", n), 1)


def _spectral(g: _Graph, config: SpectralConfig, params: Params, items: str) -> str:
    later = config.decay if config.feature_decay is None else config.feature_decay
    scores = g.constant(config.popularity_weight * params["popularity"])
    for table, spread, factor, decay in (
        ("items", "item_spread", config.item_weight, config.decay),
        ("features", "feature_spread", config.feature_weight, later),
    ):
        if not params[table].shape[1]:
            continue
        user = _decayed(g, params[table], items, decay)
        scores = g.node("Add", scores, g.node("MatMul", _standard(g, user, params[spread], factor), params[table].T))
    return scores


def _standard(g: _Graph, user: str, spread: Any, factor: float) -> str:
    """Return a user vector [d] scaled so that its scores have this spread; zeros stay zeros."""
    variance = g.node("ReduceSum", g.node("Mul", g.node("MatMul", user, spread), user), [0], keepdims=1)
    scale = g.node("Div", factor, g.node("Sqrt", _at_least(g, variance, 1e-30)))
    return g.node("Mul", user, g.node("Where", g.node("Greater", variance, 0.0), scale, 0.0))


def _blend(g: _Graph, config: BlendConfig, params: Params, items: str) -> str:
    if isinstance(config.fitted, FactorisationConfig):
        raise FedrecError("A blend with a factorisation cannot be written as ONNX; export it for devices instead.")
    prior = _spectral(
        g, config.prior, part_of(params, "prior."), g.node("Slice", items, [-config.prior.length], [2**31 - 1])
    )
    own, length = part_of(params, "fitted."), config.fitted.length
    whole = g.node("Concat", [-1], items, axis=0)
    user = _user(g, config.fitted, own, g.node("Slice", whole, [-length], [2**31 - 1]))
    scaled = _standard(g, g.node("Reshape", user, [-1]), params["spread"], float(params["weight"][0]))
    return g.node("Add", prior, g.node("MatMul", scaled, own["item"].T))


def _user(g: _Graph, config: AnySequenceConfig, params: Params, items: str) -> str:
    """Return the state [1 d] after the newest interaction."""
    if isinstance(config, LanguageConfig):
        raise FedrecError(
            "A language model has no ONNX form here; give devices a student ([training.student]) instead."
        )
    read = params["taken" if isinstance(config, MachineConfig) else "item"]
    known = g.node("Gather", read, g.node("Max", items, 0))
    x = g.node("Where", g.node("Less", g.node("Unsqueeze", items, [1]), 0), params["start"], known)  # [n d]
    root = config.dim**0.5
    if isinstance(config, GruConfig):
        return _recurrent(g, config, params, g.node("Mul", x, root))
    if isinstance(config, TransformerConfig | TextTransformerConfig):
        return _transformed(g, config, params, x)
    count = g.node("Cast", g.node("Shape", items), to=1)
    total = g.node("ReduceSum", x, [0], keepdims=1)
    if isinstance(config, NcfConfig):
        return g.node("Mul", g.node("Div", total, count), root)
    passed = g.node("Div", total, g.node("Sqrt", count))
    if isinstance(config, MachineConfig):
        return passed
    odd = ((config.layers + 1) // 2) / (config.layers + 1)
    return g.node("Add", g.node("Mul", passed, odd * root), (1.0 - odd) * root * params["start"])


def _recurrent(g: _Graph, config: GruConfig, params: Params, x: str) -> str:
    own = np.concatenate([params["reads.bias"], params["keeps.bias"]])[None]
    weights = params["reads.weight"][None], params["keeps.weight"][None]
    every = g.node("Unsqueeze", x, [1])  # [n 1 d]
    found = g.node("GRU", every, *weights, own, hidden_size=config.dim, linear_before_reset=1)  # [n 1 1 d]
    return _norm(g, params, "norm", g.node("Reshape", g.node("Gather", found, -1), [1, config.dim]))


def _transformed(g: _Graph, config: TransformerConfig | TextTransformerConfig, params: Params, x: str) -> str:
    n = g.node("Shape", x, start=0, end=1)
    x = g.node("Add", g.node("Mul", x, config.dim**0.5), g.node("Slice", params["position"], [0], n))
    places = _range(g, n)
    apart = g.node("Sub", g.node("Unsqueeze", places, [1]), g.node("Unsqueeze", places, [0]))
    before, apart = g.node("Less", apart, 0), g.node("Max", apart, 0)
    for index in range(config.blocks):
        own = part_of(params, f"blocks.{index}.")
        recency = g.node("Where", before, FAR, g.node("Gather", own["recency"], apart, axis=1))  # [h n n]
        x = _block(g, config, own, x, recency)
    return _norm(g, params, "norm", g.node("Gather", x, [-1]))


def _block(g: _Graph, config: TransformerConfig | TextTransformerConfig, own: Params, x: str, recency: str) -> str:
    d, heads = config.dim, config.heads
    qkv = _linear(g, own, "query_key_value", _norm(g, own, "norm1", x))
    parts = g.node("Transpose", g.node("Reshape", qkv, [-1, 3, heads, d // heads]), perm=[1, 2, 0, 3])  # [3 h n d/h]
    q, k, v = (g.node("Gather", parts, i, axis=0) for i in range(3))
    logits = g.node("MatMul", g.node("Mul", q, (d // heads) ** -0.5), g.node("Transpose", k, perm=[0, 2, 1]))
    weights = g.node("Softmax", g.node("Add", logits, recency), axis=-1)
    attended = g.node("Transpose", g.node("MatMul", weights, v), perm=[1, 0, 2])
    x = g.node("Add", x, _linear(g, own, "project", g.node("Reshape", attended, [-1, d])))
    inner = g.node("Gelu", _linear(g, own, "widen", _norm(g, own, "norm2", x)))
    return g.node("Add", x, _linear(g, own, "narrow", inner))


def _linear(g: _Graph, own: Params, name: str, x: str) -> str:
    return g.node("Gemm", x, own[f"{name}.weight"], own[f"{name}.bias"], transB=1)


def _norm(g: _Graph, own: Params, name: str, x: str) -> str:
    return g.node("LayerNormalization", x, own[f"{name}.weight"], own[f"{name}.bias"], epsilon=1e-5)
