"""Which privacy an experiment asks for: who must be trusted, how much may be spent, and on what."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LEAST_CLIENTS = 3
"""In a sum of two, each knows the other's number."""


class _Settings(BaseModel):
    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", allow_inf_nan=False)


class NoPrivacy(_Settings):
    """Nothing is protected: exact sums travel, and reports say so."""

    mode: Literal["none"] = "none"


class SecureSum(_Settings):
    """How clients add up their contributions so that the server sees the sum alone."""

    minimum: int = Field(default=10, ge=LEAST_CLIENTS)
    """The server learns no sum of fewer clients."""
    survivors: float = Field(default=2 / 3, gt=0.5, le=1)
    """Share of the clients that advertised keys whose contributions must arrive, or the sum is never opened. Each adds
    so much noise that this share suffices."""
    remove_excess: bool = True
    """Take noise off that turned out not to be needed because more contributions arrived than the fewest. Otherwise the
    noise's variance is too large by up to the inverse of `survivors`, but nobody need believe how many arrived."""
    threshold: float = Field(default=0.5, ge=0.5, lt=1)
    """A secret is put together from more than this share of its holders; from half upwards, a server that tells some
    holders that a client is there and others that it is gone still cannot open it."""
    colluding: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the clients that may tell the server all they know; their noise is then not counted."""
    dropouts: float = Field(default=0.3, ge=0, lt=0.5)
    """Share of the clients that may fall silent on the way; decides with how many others each exchanges keys."""
    neighbours: int | None = Field(default=None, ge=2)
    """With how many others each client exchanges keys; None: as few as the shares above allow, at most all."""
    ring_bits: Literal[32, 64] = 32
    """Bits of a number in an upload."""
    simulated_dropouts: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of clients that pretend to fall silent, half before their contribution and half after it; only for
    simulations."""

    @model_validator(mode="after")
    def _possible(self) -> SecureSum:
        if self.dropouts > 1 - self.survivors + 1e-9:
            raise ValueError("more dropouts are expected than survivors allow; lower one of the two")
        if self.colluding + 0.05 > self.survivors:
            raise ValueError("colluding clients are as many as survivors, so nobody's noise would count")
        return self


class IndependentNoise(_Settings):
    """Fresh noise in every round; the guarantee rests on Poisson sampling."""

    kind: Literal["independent"] = "independent"


class BandedNoise(_Settings):
    """Noise that is correlated over rounds, so that it cancels in their sum, and that needs no sampling.

    Cohorts take turns. All rounds of a slice are one release, and `privacy.fit` is the noise multiplier of all of it.
    """

    kind: Literal["banded"] = "banded"
    band: int = Field(default=8, ge=1)
    """Over how many rounds noise is correlated, at most `training.cohort.groups`; the server keeps so many copies of
    the parameters, less one, in 64 bits. 1 is independent noise without sampling."""


class AdaptiveClipping(_Settings):
    """The clip norm of training follows a quantile of the lengths of people's updates, learnt from a noised count.

    `training.local.clip_norm` is the first one.
    """

    quantile: float = Field(default=0.5, gt=0, lt=1)
    """Share of people whose updates should be within the clip norm."""
    learning_rate: float = Field(default=0.2, gt=0)
    """How fast the clip norm moves: by at most this factor's exponential in a round."""
    count_noise: float | None = Field(default=None, gt=0)
    """Standard deviation of the noise of the count, in people; above half of `privacy.fit` times its scale. None: a
    twentieth of the expected cohort, or the noise multiplier if that is more."""


class UserLevelPrivacy(_Settings):
    """What both modes share in which the sum over people gets noise.

    Unit: the user. Adjacency: add or remove one person with the whole history.
    """

    mode: Literal["central", "distributed"]

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
    later_noise: float = Field(default=1.0, gt=0)
    """Factor on all multipliers in slices after the first: above 1 more of the budget goes to the base, on which every
    later release builds; 1 treats all slices alike."""
    fisher: float = Field(default=2.0, gt=0)
    """Noise multiplier of the squared gradients of a slice, if `training.ewc` asks for them."""
    metrics: Literal["private", "research"] = "private"
    """"private" adds noise to metrics and charges them; "research" reports exact ones, for a simulation on data that is
    public anyway: the guarantee then covers the releases, not the report."""
    metrics_noise: float = Field(default=10.0, gt=0)
    """Noise multiplier of one recommender's metrics."""


class CentralPrivacy(UserLevelPrivacy):
    """The server is trusted: nodes clip and add up, the server adds the noise to the sum."""

    mode: Literal["central"] = "central"

    fit_noise: Annotated[IndependentNoise | BandedNoise, Field(discriminator="kind")] = IndependentNoise()
    """How the noise of rounds of training is drawn."""
    adaptive: AdaptiveClipping | None = None
    """Learn the clip norm of training; None: it stays what `training.local.clip_norm` says."""


class DistributedPrivacy(UserLevelPrivacy):
    """The server sees masked sums alone, in which every client's share of the noise already is."""

    mode: Literal["distributed"] = "distributed"

    secure_sum: SecureSum = SecureSum()
    """How clients add up so that the server sees the sum alone."""
    against: Literal["server", "readers"] = "server"
    """Whose view the budget bounds: "server" claims nothing from sampling, for the server draws the cohort and knows
    who is in it; "readers" of releases do not know, so sampling amplifies; against the server it is then weaker."""


class WindowUnit(_Settings):
    """DP-SGD on the device: each window of successive interactions is an example with a clip of its own.

    Unit: one window of one person. Adjacency: add or remove one window. A whole history holds many windows and is
    protected far less.
    """

    kind: Literal["window"] = "window"

    length: int = Field(default=10, ge=1)
    """How many successive interactions a window holds; windows do not overlap and see nothing of each other."""
    clip_norm: float = Field(default=1.0, gt=0)
    """L2 bound of one window's gradient."""
    sampling: float = Field(default=0.5, gt=0, le=1)
    """Probability with which each window takes part in a local step."""


class UserUnit(_Settings):
    """Noise on the device: the whole update, clipped to `training.local.clip_norm`, gets noise before it is sent.

    Unit: the user. Adjacency: replace one person's whole history by any other, so noise covers twice the clip norm.
    """

    kind: Literal["user"] = "user"


LocalUnit = Annotated[WindowUnit | UserUnit, Field(discriminator="kind")]


class LocalPrivacy(_Settings):
    """Nobody is trusted: whatever a client trains or counts is private before it leaves the client.

    Each client keeps a ledger of its own and takes no further part once its budget is spent.
    """

    mode: Literal["local"] = "local"

    epsilon: float = Field(gt=0)
    """Budget of each client over its whole life, kept by the client's own ledger."""
    delta: float = Field(default=1e-5, gt=0, lt=1)
    """Probability that the guarantee may fail with."""
    unit: LocalUnit = UserUnit()
    """What is protected."""
    participations: int = Field(default=10, ge=1)
    """In how many rounds of training a client can take part until its budget is spent, if noise is calibrated."""
    noise: Literal["system", "seed"] = "system"
    """"system" draws noise and windows from the operating system's generator; "seed" from the experiment's seed, which
    makes a simulation repeatable and protects nobody."""
    calibrate: bool = True
    """Scale both multipliers below by one factor, so that the planned life of a client spends exactly `epsilon`."""
    fit: float = Field(default=1.0, gt=0)
    """Noise multiplier of a local step (unit "window") or an update (unit "user"): the noise's standard deviation over
    what one unit can change."""
    count: float = Field(default=10.0, gt=0)
    """Noise multiplier of a client's popularity counts of a slice; always at user level."""
    count_clip: float = Field(default=4.0, gt=0)
    """L2 bound of one client's counts."""
    metrics: Literal["research"]
    """Must be written down: metrics are exact and outside the guarantee, for a simulation on data that is public."""


class LocalNoise(_Settings):
    """What a plan asks a client to do before anything leaves it; the client's own ledger decides whether it does."""

    unit: LocalUnit
    """What is protected."""
    noise_multiplier: float = Field(ge=1e-6)
    """Standard deviation of the noise over what one unit can change; below a millionth there is nothing to account."""
    noise: Literal["system", "seed"] = "system"
    """Where the client takes its noise from; "seed" only in simulations, for it protects nobody."""


Privacy = Annotated[NoPrivacy | CentralPrivacy | DistributedPrivacy | LocalPrivacy, Field(discriminator="mode")]
AnyPrivacy = NoPrivacy | CentralPrivacy | DistributedPrivacy | LocalPrivacy
