"""What a ledger accounts for: releases, described by all that their privacy depends on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Event(BaseModel):
    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", allow_inf_nan=False)


class GaussianEvent(_Event):
    """Gaussian releases of sums over a Poisson-sampled cohort, adjacency add or remove one person."""

    kind: Literal["gaussian"] = "gaussian"
    noise_multiplier: float = Field(gt=0)
    """Standard deviation of the noise over the L2 bound of one person's contribution."""
    sampling: float = Field(default=1.0, gt=0, le=1)
    """Probability with which each person is in the sum, independently of everybody else."""
    count: int = Field(default=1, ge=1)
    """How many such releases, each with a cohort and noise of its own."""


class MatrixEvent(_Event):
    """A whole stage of correlated noise: one Gaussian release of all its rounds, without sampling."""

    kind: Literal["matrix"] = "matrix"
    noise_multiplier: float = Field(gt=0)
    """Standard deviation of the uncorrelated noise over the sensitivity of the encoded stream."""
    rounds: int = Field(ge=1)
    """Rounds of the stage."""
    band: int = Field(ge=1)
    """Over how many rounds noise is correlated."""
    min_separation: int = Field(ge=1)
    """How many rounds lie at least between two participations of one person."""
    max_participations: int = Field(ge=1)
    """How often one person takes part at most."""
    sensitivity: float = Field(gt=0)
    """What one person can change of the encoded stream, in clip norms."""


Event = Annotated[GaussianEvent | MatrixEvent, Field(discriminator="kind")]
AnyEvent = GaussianEvent | MatrixEvent
