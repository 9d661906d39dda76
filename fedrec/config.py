"""`Experiment`: everything that decides what a run computes, read from one TOML file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedrec.data.features import FeatureSettings
from fedrec.data.slices import LastWindow, TimeWindow
from fedrec.errors import ConfigError, nearest
from fedrec.learning import (
    AdamConfig,
    AnyAggregate,
    CurriculumConfig,
    EwcConfig,
    FixedCohort,
    Mean,
    PoissonCohort,
    SgdConfig,
    StageConfig,
    StoppingConfig,
    TurnCohort,
)
from fedrec.models.configs import TrainedConfig
from fedrec.models.transfer import DistilConfig, DriftConfig, RehearsalConfig, StudentConfig, TiersConfig
from fedrec.privacy.settings import NoPrivacy, Privacy
from fedrec.protocol.codec import Codec, Float, Plain
from fedrec.protocol.task import CooccurrenceSettings, CooccurrenceTask, LocalTraining
from fedrec.settings import parsed, read_toml


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Settings):
    """Which interactions."""

    source: str = "ml-100k"
    """A known data set (`fedrec data list`) or a folder that `fedrec data import` wrote."""


class StartConfig(_Settings):
    """Begin from a release that was trained elsewhere, on public data: the weights that all items share."""

    registry: str
    """Folder of its registry."""
    release: int | Literal["latest", "newest"] = "latest"
    """Which release."""
    ages: bool = False
    """Read the year at the end of a title as an age: the newest year of the first slice's items stands for the newest
    one of the release's, so that what was new there and what is new here are alike."""
    confidence: float = Field(default=1.0, gt=0, le=1)
    """Factor on the scores that begin so: how far what was learnt elsewhere is believed, beside `popularity_weight`."""


class StreamSplit(_Settings):
    """Cut by global time: a base, later slices, and a tail that is only tested on."""

    kind: Literal["stream"] = "stream"
    base: float = Field(default=0.6, gt=0, lt=1)
    """Share of the interactions in the base."""
    later: int = Field(default=3, ge=0)
    """How many equal slices follow."""
    holdout: float = Field(default=0.1, gt=0, lt=1)
    """Share of the interactions in the tail, on which the last release is tested."""


class LeaveOneOutSplit(_Settings):
    """One slice: each person's last interaction is tested, the one before it is left for validation."""

    kind: Literal["leave_one_out"] = "leave_one_out"
    test: Literal["test", "validation"] = "test"
    """Which of the two to predict; choose settings on "validation"."""


class BlockSplit(_Settings):
    """A data set that `fedrec.data.blocks` laid out: each block holds back a test that is asked again all life long."""

    kind: Literal["blocks"] = "blocks"
    later: int = Field(default=3, ge=1)
    """How many blocks follow the first."""
    refit: Literal["no", "warm", "fresh"] = "no"
    """Train the later slices on everything so far instead of on their own block, going on from the release before
    ("warm") or from a new model ("fresh"): the ceiling, at its price."""
    mask: Literal["known", "block"] = "known"
    """What is no candidate in a test: all that is known of the person, or only what they took in the release's own
    block, as F3CRec's published code does, where even a frozen model seems to forget. Only to compare with that."""


class ScheduleSplit(_Settings):
    """Cut by the clock, as a deployment lives: each slice is what came since the last one."""

    kind: Literal["schedule"] = "schedule"
    start: int
    """When the first slice is due, in seconds since 1970 UTC; it takes everything before."""
    interval_seconds: int = Field(default=7 * 86_400, ge=1)
    """From one slice to the next."""
    later: int = Field(default=52, ge=0)
    """How many slices follow the first: the life that a privacy budget is planned for."""
    test: float = Field(default=0.15, gt=0, lt=1)
    """Share of an interval, its end, that a release is tested on before the next slice trains on it."""


class StatisticsConfig(CooccurrenceSettings):
    """One round of co-occurrence statistics a slice; the spectral model is made from it."""

    features: FeatureSettings = FeatureSettings()
    recency: float = Field(default=1.0, ge=0, le=1)
    """What part of older slices' counts stays in the popularity of the spectral model when a slice's are added; 1: all
    slices count alike. Popularity that is shown beside it, as a row, always counts all."""

    def task(self, window: TimeWindow | LastWindow) -> CooccurrenceTask:
        """Return the task of one slice."""
        return CooccurrenceTask(window=window, **self.model_dump(exclude={"features", "recency"}))


class TrainingConfig(_Settings):
    """How the shared model learns."""

    cohort: Annotated[PoissonCohort | FixedCohort | TurnCohort, Field(discriminator="kind")] = PoissonCohort()
    local: LocalTraining = LocalTraining()
    server: Annotated[SgdConfig | AdamConfig, Field(discriminator="kind")] = AdamConfig()
    average: float = Field(default=0.0, ge=0, lt=1)
    """Release an exponential moving average of the parameters over the rounds, with this decay; 0: the last ones."""
    anchor: float = Field(default=0.0, ge=0)
    """In later slices, weight of an L2 pull towards the release that the slice began with, beside the clients' part."""
    item_mean: float = Field(default=0.0, ge=0, lt=1)
    """In later slices, the largest weight that an item's row of that release keeps after each round."""
    ewc: EwcConfig | None = None
    """In later slices, hold what mattered so far near that release."""
    curriculum: CurriculumConfig | None = None
    """Begin each stage with the frequent items."""
    statistics: StatisticsConfig | None = None
    """Gather co-occurrence statistics before training; the spectral model needs them."""
    distil: DistilConfig | None = None
    """Teach the model on synthetic histories after the rounds of each slice, at no cost of privacy."""
    student: StudentConfig | None = None
    """Publish a small recommender for devices beside each release, taught by it."""
    tiers: TiersConfig | None = None
    """Let small devices train a small model; it needs `distil` and `student`."""
    rehearsal: RehearsalConfig | None = None
    """Rehearse synthetic histories on the server, against forgetting, at no cost of privacy."""
    drift: DriftConfig | None = None
    """Learn faster after an alarm of drift."""
    base: StageConfig = StageConfig(rounds=200, warmup=10, final=0.1)
    """The first slice."""
    later: StageConfig = StageConfig(rounds=50, final=0.1)
    """Every later slice."""
    stopping: StoppingConfig | None = None
    """End a slice's rounds early, as validation says; None: all rounds are done."""
    codec: Codec = Plain()
    """How nodes write the sums of their clients' updates."""
    download: Float = "float32"
    """How the shared parameters travel to nodes in a round of training; "float16" or "bfloat16" halve it."""
    timeout_seconds: float | None = Field(default=None, gt=0)
    """How long a round waits for its nodes; None: until they answer."""
    aggregate: Annotated[AnyAggregate, Field(discriminator="kind")] = Mean()
    """How nodes' updates become one. All but the mean look at single updates: the auditable mode, never with masks or
    noise of the server."""
    over_selection: float = Field(default=0.0, ge=0, le=4)
    """By what share more clients are asked than the cohort says; the round is closed when a cohort of them is in."""
    minimum_share: float = Field(default=0.0, ge=0, le=1)
    """A round with fewer of its cohort than this share is abandoned: nothing of it is learnt."""
    quarantine_after: int | None = Field(default=3, ge=1)
    """A node that so often sent what no honest node sends is asked no more; None: it is, and refused each time."""


class LocalOnlyConfig(_Settings):
    """The local-only row: each client trains alone from the initial model. It must be weak, or the protocol leaks."""

    people: int = Field(default=200, ge=0)
    """How many people are asked; 0 leaves the row out."""
    training: LocalTraining = LocalTraining(steps=20, learning_rate=0.5)
    """How each of them trains."""


class EvaluationConfig(_Settings):
    """What is measured after each slice."""

    probes: int | None = Field(default=None, ge=1)
    """Ask for the next item at up to so many places of the test window; None: once for the whole window."""
    ks: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(10, 20), min_length=1)
    """Lengths of the recommended list."""
    replicates: int = Field(default=200, ge=0)
    """How many bootstrap replicates the intervals come from."""
    local_only: LocalOnlyConfig = LocalOnlyConfig()
    adapt: LocalTraining | None = None
    """Also test the release as it is on a device that has trained its own copy so, on all that is known of the person;
    the copy is never sent. None: leave the row "adapted" out."""
    sampled_negatives: int | None = Field(default=None, ge=1)
    """Also rank against this many random items, for comparison with old papers only."""
    promotion_margin: float | None = Field(default=None, ge=0, lt=1)
    """Keep a release but do not promote it, and go on from its parent, if its NDCG at the first cut-off is lower than
    that of its parent on the same test by more than this share; None: promote every release."""


class RuntimeConfig(_Settings):
    """How a run is carried out; none of it changes what is computed beyond rounding."""

    nodes: int = Field(default=1, ge=1)
    """How many nodes host the clients in a simulation."""
    engine: Literal["batched", "each"] = "batched"
    """Train clients in blocks, or one after the other."""
    workers: int = Field(default=1, ge=1)
    """How many processes compute each node's clients."""
    threads: int = Field(default=1, ge=1)
    """torch threads of each process."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Rounds between checkpoints."""


class Experiment(_Settings):
    """One run, complete."""

    name: str = Field(default="experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the folder of its runs."""
    seed: int = 1
    """Root of all randomness."""
    data: DataConfig = DataConfig()
    split: Annotated[StreamSplit | ScheduleSplit | LeaveOneOutSplit | BlockSplit, Field(discriminator="kind")] = (
        StreamSplit()
    )
    model: TrainedConfig
    start: StartConfig | None = None
    """What a text transformer begins from; None: from fresh weights."""
    training: TrainingConfig = TrainingConfig()
    privacy: Privacy = NoPrivacy()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _legal(self) -> Self:
        """Refuse mixtures whose promise nobody could keep."""
        training, mode = self.training, self.privacy.mode
        if mode not in ("central", "distributed"):
            return self
        if not isinstance(training.aggregate, Mean):
            raise ValueError(
                f'training.aggregate.kind = "{training.aggregate.kind}" looks at single updates, which privacy.mode = '
                f'"{mode}" hides or sums up with noise sized for a mean; use "mean", or privacy.mode "none" or "local"'
            )
        if training.over_selection or training.minimum_share:
            raise ValueError(
                f'In privacy.mode = "{mode}" the ledger accounts for the cohort that is asked, and a sum is divided by '
                "a public number whoever answers; leave training.over_selection and training.minimum_share at 0"
            )
        return self

    @property
    def n_slices(self) -> int:
        """How many releases the run will publish."""
        return 1 if isinstance(self.split, LeaveOneOutSplit) else self.split.later + 1

    def digest(self) -> str:
        """Return the SHA-256 of everything that decides the result; `runtime` does not count."""
        text = json.dumps(self.model_dump(mode="json", exclude={"runtime"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> Experiment:
        """Read an experiment from a TOML file.

        Raises:
            ConfigError: there is no such file, it is not TOML, or it says something impossible.
        """
        return cls.parse(read_toml(path), str(path))

    @classmethod
    def find(cls, name: str) -> Experiment:
        """Read an experiment by path, or one that comes with fedrec by its name, for example "quickstart".

        Raises:
            ConfigError: there is neither.
        """
        path = Path(name)
        if path.exists():
            return cls.load(path)
        bundled = {file.stem: file for file in sorted(simulations_folder().glob("*.toml"))}
        known = name.removesuffix(".toml")
        if known in bundled:
            return cls.load(bundled[known])
        raise ConfigError(
            f"No experiment '{name}': there is no such file, and fedrec comes with {', '.join(bundled)}"
            f"{nearest(known, bundled) or '.'}"
        )

    @classmethod
    def parse(cls, document: dict[str, Any], where: str = "the experiment") -> Experiment:
        """Check a document that came from TOML or JSON; `where` names it in errors.

        Raises:
            ConfigError: with the first problem, in one sentence.
        """
        return parsed(cls, document, where)


def simulations_folder() -> Path:
    """Return the folder of the experiments that come with fedrec, installed or in a checkout."""
    installed = Path(__file__).parent / "simulations"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "simulations"
