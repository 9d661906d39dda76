"""What a round asks of its clients: each task yields contributions, named tensors that are summed over clients."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedrec.data.slices import Window


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LocalTraining(_Settings):
    """What a client does with its copy of the model: plain SGD on its own interactions."""

    steps: int = Field(default=1, ge=1)
    """How many SGD steps, each on a freshly drawn batch of the client's own interactions."""
    learning_rate: float = Field(default=1.0, gt=0)
    """Step size. With one step the upload is minus this times the gradient."""
    clip_norm: float = Field(default=10.0, gt=0)
    """L2 bound of one client's whole update; longer ones are scaled down to it."""


class FitTask(_Settings):
    """Train a copy of the model on the interactions in the window; contribute new minus old parameters."""

    kind: Literal["fit"] = "fit"
    window: Window
    local: LocalTraining = LocalTraining()


class CountTask(_Settings):
    """Contribute 1 for each item that the client took in the window."""

    kind: Literal["count"] = "count"
    window: Window
    clip_norm: float | None = Field(default=None, gt=0)
    """L2 bound of one client's counts; None: not bounded."""


class EvaluateTask(_Settings):
    """Rank the window's items among all that the client did not know before it; contribute sums of metrics."""

    kind: Literal["evaluate"] = "evaluate"
    window: Window
    probes: int | None = Field(default=None, ge=1)
    """Ask at up to so many places, evenly spread over the window, for the next item given everything before it; None:
    ask once, before the window, for all of its items."""
    ks: tuple[int, ...] = (10, 20)
    """Lengths of the recommended list."""
    replicates: int = Field(default=200, ge=0)
    """How many bootstrap replicates the intervals come from."""
    n_known_items: int = Field(ge=0)
    """Items with this number or a higher one joined after training; they are reported apart."""
    sampled_negatives: int | None = Field(default=None, ge=1)
    """Rank against this many random items instead of all: only to compare with old papers, never to claim quality."""
    personalise: FitTask | None = None
    """Train locally first and never upload: the local-only row."""


Task = Annotated[FitTask | CountTask | EvaluateTask, Field(discriminator="kind")]
AnyTask = FitTask | CountTask | EvaluateTask
