"""How a stage trains: its dropout, whom clients imitate, and which items are targets yet."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedrec.config import TrainingConfig
from fedrec.learning import CurriculumConfig, StageConfig
from fedrec.models.configs import AnyModelConfig, TextTransformerConfig, TransformerConfig
from fedrec.params import Array
from fedrec.protocol.plan import TEACHER
from fedrec.server.state import ServerState


def in_stage(model: AnyModelConfig, stage: StageConfig) -> AnyModelConfig:
    """Return the settings of the model as a stage trains it: with the stage's dropout, if it has a say."""
    if stage.dropout is None or not isinstance(model, TransformerConfig | TextTransformerConfig):
        return model
    return model.model_copy(update={"dropout": stage.dropout})


def lesson_inputs(state: ServerState, training: TrainingConfig, stage: StageConfig) -> dict[str, Array]:
    """Return what a round's plan gives along: the release to imitate, and which items are frequent enough by now."""
    inputs = {f"{TEACHER}{name}": value for name, value in state.teacher.items()}
    share = pace(training.curriculum, stage, state.round)
    if share < 1.0:
        inputs["frequent"] = frequent(state.counts["counts"], share)
    return inputs


def pace(curriculum: CurriculumConfig | None, stage: StageConfig, round_number: int) -> float:
    """Return what share of interactions the items make up that count as targets in this round.

    >>> [pace(CurriculumConfig(rounds=0.5, start=0.5), StageConfig(rounds=8), n) for n in (0, 2, 4)]
    [0.5, 0.75, 1.0]
    """
    if curriculum is None:
        return 1.0
    done = round_number / max(1.0, curriculum.rounds * stage.rounds)
    return min(1.0, curriculum.start + (1.0 - curriculum.start) * done)


def frequent(counts: Array, share: float) -> Array:
    """Return [n_items] 1 for the most frequent items that make up `share` of all counts, ties included; else 0.

    >>> frequent(np.array([5.0, 1.0, 3.0, 1.0], np.float32), 0.7).tolist()
    [1, 0, 1, 0]
    """
    taken = np.maximum(counts.astype(np.float64), 0.0)
    falling = np.sort(taken)[::-1]
    least = falling[min(len(falling) - 1, int(np.searchsorted(np.cumsum(falling), share * taken.sum())))]
    marks: NDArray[np.uint8] = (taken >= least).astype(np.uint8)
    return marks
