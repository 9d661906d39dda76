"""What a device gets: size, speed and quality of a release as it is, with 8 bits, pruned, and as ONNX."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Row, claim, run, unclaimed
from benchmarks.leave_one_out import METRIC
from benchmarks.zoo import experiment_for, quality_of, questions
from fedrec.data.cleaning import Dataset
from fedrec.data.sources import load_dataset
from fedrec.grid.simulate import simulate
from fedrec.models import portable
from fedrec.models.compress import DeviceModel, prune, read_device, slim, write_device
from fedrec.models.configs import AnyModelConfig
from fedrec.params import Params, n_bytes
from fedrec.server.registry import Registry
from fedrec.serving.export import inputs_for, to_onnx

PEOPLE = 1000
REPEATS = 300


def measure(quick: bool) -> list[Row]:
    """Train a transformer and a spectral model on MovieLens-1M, export them, and ask all of them the same questions."""
    source = "ml-100k" if quick else "ml-1m"
    dataset = load_dataset(source)
    rows: list[Row] = []
    for kind in ("transformer", "spectral"):
        with tempfile.TemporaryDirectory() as folder:
            wanted = experiment_for(source, kind, rounds=150 if quick else 600)
            simulate(wanted, runs=Path(folder), registry=Path(folder) / "r", dataset=dataset)
            release = Registry(Path(folder) / "r").load()
        rows += _variants(kind, wanted.model, release.params, dataset, quick)
    return rows


def _variants(kind: str, config: AnyModelConfig, params: Params, dataset: Dataset, quick: bool) -> list[Row]:
    import onnxruntime

    n_items = len(dataset.catalog)
    histories, targets = questions(dataset, PEOPLE)
    whole = lambda history: portable.score(config, params, history)  # noqa: E731
    base, base_lists = _judged(whole, histories, targets)
    size = n_bytes(params)
    rows = [
        Row(f"{kind}: bytes of the release", size, "B"),
        Row(f"{kind}: quality of the release", base, METRIC),
    ]
    reach = unclaimed if quick else claim
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    small, own = slim(config, params)
    graph = to_onnx(small, own).SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def on_runtime(history: list[int]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run(None, {"items": inputs_for(small, history)})[0]
        return found

    ndcg, lists = _judged(on_runtime, histories, targets)
    torch_lists = _torch_lists(config, params, histories)
    same = float(np.mean([a == b for a, b in zip(lists, torch_lists, strict=True)]))
    rows += [
        claim(f"{kind}: ONNX, people with the same top 10 as torch", same, "share", ">=", 0.999),
        Row(f"{kind}: ONNX, bytes against the release", len(graph) / size, "ratio"),
        claim(f"{kind}: ONNX on one core, p50 of one person", _p50(on_runtime, histories), "ms", "<=", 5.0),
        claim(f"{kind}: NumPy on one core, p50 of one person", _p50(whole, histories), "ms", "<=", 5.0),
    ]
    for keep, name in ((1.0, "8 bits"), (0.5, "8 bits, half pruned")):
        thin, less = prune(small, own, keep)
        made = DeviceModel(model=thin, n_items=n_items, catalog_digest="", release=1, release_digest="")
        document = write_device(made, less)
        _, read = read_device(document)
        scorer = lambda history, c=thin, p=read: portable.score(c, p, history)  # noqa: E731
        ndcg, lists = _judged(scorer, histories, targets)
        overlap = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(lists, base_lists, strict=True)]))
        judge: Callable[..., Row] = reach if keep == 1.0 else unclaimed
        rows += [
            (claim if keep == 1.0 else unclaimed)(
                f"{kind}: {name}, bytes against the release", len(document) / size, "ratio", "<=", 0.30
            ),
            judge(f"{kind}: {name}, quality against the release", ndcg / base, "ratio", ">=", 0.99),
            Row(f"{kind}: {name}, overlap of the top 10", overlap, "share"),
        ]
    return rows


def _judged(
    scorer: Callable[[list[int]], Any], histories: list[list[int]], targets: list[int]
) -> tuple[float, list[list[int]]]:
    lists = [_best(scorer(history), history) for history in histories]
    return quality_of(lists, targets), lists


def _best(scores: Any, history: list[int]) -> list[int]:
    ranked = np.array(scores, np.float32)
    ranked[history] = -np.inf
    return [int(i) for i in np.argsort(-ranked, kind="stable")[:10]]


def _torch_lists(config: AnyModelConfig, params: Params, histories: list[list[int]]) -> list[list[int]]:
    from fedrec.data.batches import histories_of
    from fedrec.models.build import restore
    from fedrec.models.recommender import score_all

    model = restore(config, len(next(v for k, v in params.items() if k in ("item", "items"))), params)
    scores = score_all(model, histories_of(histories, model.spec))
    return [_best(row, history) for row, history in zip(scores, histories, strict=True)]


def _p50(scorer: Callable[[list[int]], Any], histories: list[list[int]]) -> float:
    times = []
    for turn in range(REPEATS):
        began = time.perf_counter()
        scorer(histories[turn % len(histories)])
        times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1e3


if __name__ == "__main__":
    raise SystemExit(run("export", __doc__ or "", measure))
