"""What a plan gives clients along for local training, beside the shared parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedrec.data.batches import Batch
from fedrec.errors import ProtocolError
from fedrec.models.build import restore
from fedrec.models.recommender import Recommender, Taught
from fedrec.protocol.plan import TEACHER, RoundPlan
from fedrec.protocol.task import FisherTask, LocalTraining


@dataclass(frozen=True)
class Lesson:
    """What local training heeds beside a client's own interactions.

    Attributes:
        teacher: the release that the slice began with, to be imitated; None: nobody is.
        frequent: [n_items] which items count as targets; None: all do.
        apart: whether each client's differences are needed as tensors, whatever is the fastest form.
    """

    teacher: Recommender | None = None
    frequent: NDArray[np.bool_] | None = None
    apart: bool = False


ALONE = Lesson()
FREQUENT = "frequent"
"""The input of a plan that marks frequent items; the teacher's begin with `TEACHER`."""


def lesson_of(plan: RoundPlan) -> Lesson:
    """Return what a plan gives along.

    Raises:
        FedrecError: the teacher's tensors are not those of the plan's model.
        ProtocolError: the plan marks the wrong number of items as frequent.
    """
    tensors = {name.removeprefix(TEACHER): v for name, v in plan.inputs.items() if name.startswith(TEACHER)}
    teacher = restore(plan.model, plan.n_items, tensors) if tensors else None
    frequent = plan.inputs.get(FREQUENT)
    if frequent is not None and frequent.shape != (plan.n_items,):
        raise ProtocolError("The plan says of another number of items than it has whether they are frequent.")
    return Lesson(teacher, None if frequent is None else frequent > 0, isinstance(plan.task, FisherTask))


@torch.no_grad()
def taught_by(lesson: Lesson, batch: Batch, local: LocalTraining) -> Taught | None:
    """Return what the teacher says of a batch (torch, items numbered as in the catalogue); None without one."""
    if lesson.teacher is None or not local.imitate:
        return None
    return Taught(lesson.teacher.candidate_scores(batch), local.imitate)
