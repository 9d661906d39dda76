"""Which privacy an experiment asks for: who must be trusted, how much may be spent, and on what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class NoPrivacy(_Settings):
    """Nothing is protected: exact sums travel, and reports say so."""

    mode: Literal["none"] = "none"


class CentralPrivacy(_Settings):
    """The server is trusted: nodes clip and add up, the server adds the noise to the sum.

    Unit: the user. Adjacency: add or remove one person with the whole history.
    """

    mode: Literal["central"] = "central"

    epsilon: float = Field(gt=0)
    """Budget over the whole life of the run; whatever would pass it is refused before anything is sent."""
    delta: float = Field(default=1e-5, gt=0, lt=1)
    """Probability that the guarantee may fail with; should be below one over the number of people."""
    population: int | None = Field(default=None, ge=1)
    """How many people are eligible in the first slice, as a public number: the sampling rate is the expected cohort
    over it. None: the census of the first slice, which is then treated as public."""
    later_population: int | None = Field(default=None, ge=1)
    """The same for later slices; None: as in the first."""
    noise: Literal["system", "seed"] = "system"
    """"system" draws noise and cohorts from the operating system's generator; "seed" from the experiment's seed, which
    makes a simulation repeatable and protects nobody."""
    calibrate: bool = True
    """Scale all multipliers below by one factor, so that the planned life spends exactly `epsilon`."""
    fit: float = Field(default=1.0, gt=0)
    """Noise multiplier of a round of training: the noise's standard deviation over the clip norm."""
    count: float = Field(default=10.0, gt=0)
    """Noise multiplier of the popularity counts of a slice."""
    count_clip: float = Field(default=4.0, gt=0)
    """L2 bound of one person's counts."""
    statistics: float = Field(default=1.0, gt=0)
    """Noise multiplier of the co-occurrence statistic of a slice, if `training.statistics` asks for one."""
    metrics: Literal["private", "research"] = "private"
    """"private" adds noise to metrics and charges them; "research" reports exact ones, for a simulation on data that is
    public anyway: the guarantee then covers the releases, not the report."""
    metrics_noise: float = Field(default=10.0, gt=0)
    """Noise multiplier of one recommender's metrics."""


Privacy = Annotated[NoPrivacy | CentralPrivacy, Field(discriminator="mode")]
