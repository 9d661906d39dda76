"""Settings of distillation on the server, without torch, so that an experiment can be read anywhere."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedrec.models.configs import FactorisationConfig, SpectralConfig, TransformerConfig


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TransferConfig(_Settings):
    """The synthetic histories: how many are drawn from what, in proportion to these weights."""

    histories: int = Field(default=512, ge=1)
    """How many, drawn anew in each slice."""
    length: int | None = Field(default=None, ge=2)
    """How many items each has; None: as many as the student sees."""
    statistic: float = Field(default=1.0, ge=0)
    """Weight of the spectral model of the statistic as a source."""
    fitted: float = Field(default=1.0, ge=0)
    """Weight of the model that the rounds fitted."""
    previous: float = Field(default=0.0, ge=0)
    """Weight of the previous release."""
    popularity: float = Field(default=0.0, ge=0)
    """Weight of histories without any taste, item by item by popularity."""


class DistilConfig(_Settings):
    """After the rounds of a slice, teach the fitted model on synthetic histories; no client takes part."""

    steps: int = Field(default=200, ge=1)
    """How many steps the student takes in each slice."""
    batch: int = Field(default=32, ge=1)
    """How many histories a step looks at."""
    places: int = Field(default=16, ge=1)
    """At how many random places of each the student is asked for what comes next."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of Adam; it falls to a tenth along a cosine."""
    statistic: float = Field(default=1.0, ge=0)
    """Weight of the spectral model of the statistic as a teacher; it needs `training.statistics`."""
    fitted: float = Field(default=1.0, ge=0)
    """Weight of the model as the rounds left it."""
    previous: float = Field(default=0.5, ge=0)
    """Weight of the previous release; it knows nothing of items that are new in the slice."""
    confidence: float = Field(default=1.0, ge=0)
    """How much more a teacher counts where its own distribution has little entropy; 0: all alike."""
    sharpness: float = Field(default=1.0, gt=0)
    """The teachers' common logits are multiplied by this."""
    prior: SpectralConfig = SpectralConfig()
    """How the statistic becomes a spectral model; a blend takes its own prior instead."""
    transfer: TransferConfig = TransferConfig()


class StudentConfig(_Settings):
    """A small recommender for devices, taught by each release and published beside it."""

    model: Annotated[SpectralConfig | FactorisationConfig | TransformerConfig, Field(discriminator="kind")]
    """Its form. A spectral one needs no layers: the best item vectors of so many numbers."""
    share: float = Field(default=0.1, gt=0, lt=1)
    """It may have at most this share of the release's parameters."""
    steps: int = Field(default=150, ge=1)
    """How many steps it takes."""
    batch: int = Field(default=32, ge=1)
    """How many histories a step looks at."""
    places: int = Field(default=16, ge=1)
    """At how many random places of each."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Of Adam; it falls to a tenth along a cosine. A spectral student begins with the statistic and is good already:
    longer steps do harm; a transformer needs ten times as much."""
    histories: int = Field(default=2048, ge=1)
    """How many synthetic histories are drawn from the release."""
    length: int = Field(default=30, ge=2)
    """How many items each has."""
    entropy: float = Field(default=0.8, gt=0, lt=1)
    """The release is listened to at the temperature at which its distribution has this share of the largest entropy."""

    def lessons(self) -> DistilConfig:
        """Return how it is taught, as settings of distillation."""
        return DistilConfig(
            steps=self.steps, batch=self.batch, places=self.places, learning_rate=self.learning_rate, confidence=0.0
        )


class TiersConfig(_Settings):
    """Small devices train the device student's model, large ones the release's; each teaches the other every slice."""

    share: float = Field(default=0.5, gt=0, lt=1)
    """Which part of the people have small devices; who does is a public device class, in a simulation a hash."""
    weight: float = Field(default=0.5, ge=0)
    """Weight of the small model among the teachers of the large one."""
    own: float = Field(default=0.5, ge=0)
    """Weight of the small model itself, beside the release with weight 1, when it is taught."""


class RehearsalConfig(_Settings):
    """In later slices, a share of each round's update is learnt from synthetic histories of the release before."""

    share: float = Field(default=0.3, gt=0, lt=1)
    """Weight of that part; the clients' part has the rest."""
    histories: int = Field(default=512, ge=1)
    """How many are drawn in each slice."""
    length: int | None = Field(default=None, ge=2)
    """How many items each has; None: as many as the model sees."""
    batch: int = Field(default=64, ge=1)
    """How many a round looks at."""


class DriftConfig(_Settings):
    """Watch by a Page-Hinkley test whether releases lose their lead over popularity, and then learn faster."""

    tolerance: float = Field(default=0.02, ge=0)
    """Relative loss per slice that does not count."""
    threshold: float = Field(default=0.15, gt=0)
    """Sum of relative losses beyond it at which the alarm sounds."""
    speed: float = Field(default=2.0, gt=0)
    """Factor on the server's learning rate in the slice after an alarm."""
