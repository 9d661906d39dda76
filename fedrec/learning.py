"""Settings of how a round picks its clients, adds up what they send, and steps."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PoissonCohort(_Settings):
    """Every eligible client takes part independently with the same probability."""

    kind: Literal["poisson"] = "poisson"
    expected: float = Field(default=128, gt=0)
    """Expected number of clients in a round."""


class FixedCohort(_Settings):
    """The same number of clients in every round, drawn without replacement."""

    kind: Literal["fixed"] = "fixed"
    size: int = Field(default=128, ge=1)
    """Number of clients in a round; everybody if fewer are eligible."""


class TurnCohort(_Settings):
    """Everybody belongs to one of several groups, by a hash of who they are, and the groups take turns."""

    kind: Literal["turns"] = "turns"
    groups: int = Field(default=16, ge=1)
    """How many groups: a person takes part in every so-many-th round of a slice, and never more often. The minimum
    separation of correlated noise."""


class SgdConfig(_Settings):
    """``torch.optim.SGD`` on the mean update; learning rate 1 without momentum is FedAvg."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: float = Field(default=1.0, gt=0)
    """Step size; 1 adds the mean update as it is."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """How much of the last step is repeated (FedAvgM)."""


class AdamConfig(_Settings):
    """``torch.optim.AdamW`` on the mean update (FedAdam)."""

    kind: Literal["adam"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    """Step size."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the mean of updates."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the mean of squared updates."""
    epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of the mean square."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, per step, in multiples of the step size."""


class StageConfig(_Settings):
    """How long and how fast to learn from one slice."""

    rounds: int = Field(ge=0)
    """How many rounds."""
    warmup: int = Field(default=0, ge=0)
    """Over how many first rounds the server's learning rate rises to its full value."""
    final: float = Field(default=1.0, ge=0, le=1)
    """What part of the learning rate is left in the last round; it falls along a cosine."""
    speed: float = Field(default=1.0, gt=0)
    """Factor on the server's learning rate in this stage."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout while training in this stage, of a model that has one; None: as the model says."""


class Mean(_Settings):
    """The mean over all clients: exact, and at the mercy of whoever lies within the clip norm."""

    kind: Literal["mean"] = "mean"


class Median(_Settings):
    """The median over nodes, number by number; it forgets tastes that less than half of the nodes share."""

    kind: Literal["median"] = "median"


class TrimmedMean(_Settings):
    """The mean over nodes, number by number, without the highest and the lowest."""

    kind: Literal["trimmed_mean"] = "trimmed_mean"
    share: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of the nodes that is left out on each side."""


class Krum(_Settings):
    """The mean of the updates that lie closest to their neighbours."""

    kind: Literal["krum"] = "krum"
    share: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of the nodes that may lie."""
    multi: bool = True
    """Keep all but that share; if not, one update alone."""


class Bounded(_Settings):
    """The mean over clients of updates that are shortened to what is usual, without the nodes that push together."""

    kind: Literal["bounded"] = "bounded"
    one_item: float = Field(default=2.0, ge=1)
    """Updates are left out of which one item's row makes up more than so many times what it usually does."""
    norm_factor: float = Field(default=1.0, gt=0)
    """Longest update, in medians of the nodes' norms."""
    left_out: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of the nodes that is left out where some push together: those that lie furthest along the line in which the
    shortened updates differ most."""
    outstanding: float = Field(default=1.5, ge=1)
    """Some push together where that line holds so many times the variance of the next one."""
    item_factor: float = Field(default=8.0, gt=0)
    """Longest row of an item, in medians over the nodes that moved the item."""


AnyAggregate = Mean | Median | TrimmedMean | Krum | Bounded


class EwcConfig(_Settings):
    """Elastic weight consolidation: parameters that mattered to people so far are held near the last release.

    At the start of each later slice one round asks everybody in the slice before for the squares of their gradients
    (`fedrec.protocol.task.FisherTask`); a private run pays for it by `privacy.fisher`. The pull itself is the server's.
    """

    strength: float = Field(default=0.01, gt=0)
    """Weight of the pull on a parameter of average importance, against the clients' loss."""
    clip_norm: float = Field(default=1.0, gt=0)
    """L2 bound of one person's squares."""
    decay: float = Field(default=0.5, ge=0, le=1)
    """What part of the importance of older slices is kept when a slice's is added."""


class CurriculumConfig(_Settings):
    """Frequent items first: at the start of a stage rarer ones are no targets yet."""

    rounds: float = Field(default=0.5, gt=0, le=1)
    """After what share of a stage's rounds all items count."""
    start: float = Field(default=0.5, gt=0, le=1)
    """What share of all interactions counted so far the most frequent items make up that count from the first round."""


class StoppingConfig(_Settings):
    """Early stopping: a slice's rounds end when its validation part is served no better for a while."""

    every: int = Field(default=10, ge=1)
    """After how many rounds validation is asked; in a private run each time is paid for by `privacy.metrics_noise`."""
    patience: int = Field(default=2, ge=1)
    """After how many questions without a better answer the rounds end; the best parameters are released."""
