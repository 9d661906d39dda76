"""What the sums of each kind of task look like, and how long one client's part of them can be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedrec.errors import ProtocolError
from fedrec.evaluation.metrics import GROUPS, metric_names, private_names, private_norm
from fedrec.models.freeze import trains
from fedrec.protocol.codec import Shapes
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import CooccurrenceTask, CountTask, EvaluateTask, FisherTask, FitTask
from fedrec.protocol.triangle import packed_size

_F32 = np.dtype(np.float32)


def shapes_of(plan: RoundPlan) -> Shapes:
    """Return (shape, dtype) of every tensor that a plan asks for, by name.

    Raises:
        ProtocolError: the plan asks for a statistic of features and carries none.
    """
    task, n_items = plan.task, plan.n_items
    if isinstance(task, FitTask | FisherTask):
        return {n: (value.shape, value.dtype) for n, value in plan.params.items() if trains(plan.model, n)}
    if isinstance(task, CountTask):
        return {"counts": ((n_items,), _F32)}
    if isinstance(task, EvaluateTask):
        return metric_shapes(task, n_items)
    features = plan.inputs.get("features")
    if task.feature_share and (features is None or features.ndim != 2):
        raise ProtocolError("The plan asks for a statistic of features, but carries no features of its items.")
    return cooccurrence_shapes(task, n_items, 0 if features is None else features.shape[1])


def cooccurrence_shapes(task: CooccurrenceTask, n_items: int, rank: int) -> Shapes:
    """Return what the sums of a co-occurrence statistic look like in a feature space of `rank` dimensions."""
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[np.float32]]] = {}
    if task.sketch == "pairs":
        shapes["pairs"] = ((packed_size(n_items), 2 if task.feature_share else 1), _F32)
    elif task.feature_share:
        shapes["features"] = ((packed_size(rank),), _F32)
    return shapes


def metric_shapes(task: EvaluateTask, n_items: int) -> Shapes:
    """Return what the sums of an evaluation look like."""
    wide = np.dtype(np.float64)
    if task.private:
        return {"metrics": ((len(private_names(task.ks)) + 1,), wide)}
    groups = [*GROUPS, *(["sampled"] if task.sampled_negatives else [])]
    rows, columns = task.replicates + 1, len(metric_names(task.ks))
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {f"sum.{g}": ((rows, columns), wide) for g in groups}
    shapes |= {f"weight.{g}": ((rows,), wide) for g in groups}
    return {**shapes, "recommended": ((n_items,), np.dtype(np.int64))}


def row_bounds(plan: RoundPlan) -> dict[str, float]:
    """Return the L2 bound of what one client may do to a row of each item table; nothing where there is none.

    An item table is what has a row for each item; clients go by the same rule.
    """
    task = plan.task
    if not isinstance(task, FitTask) or task.local.item_clip is None or task.private is not None:
        return {}
    tables = [name for name, (shape, _) in shapes_of(plan).items() if shape and shape[0] == plan.n_items]
    return dict.fromkeys(tables, task.local.item_clip)


def bound_of(plan: RoundPlan) -> float | None:
    """Return the L2 bound of one client's contribution; None: there is none, or its own noise is in it."""
    task = plan.task
    if isinstance(task, EvaluateTask):
        return private_norm(task.ks) if task.private else None
    if isinstance(task, CooccurrenceTask):
        return 1.0 if task.sketch == "features" else None
    if isinstance(task, FisherTask):
        return task.clip_norm
    if task.private is not None:
        return None
    return task.local.clip_norm if isinstance(task, FitTask) else task.clip_norm or math.sqrt(plan.n_items)
