"""Settings of every model, without torch, so that an experiment can be read and checked anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedrec.data.context import ContextConfig
from fedrec.data.features import FeatureSettings
from fedrec.errors import ConfigError


class _Settings(BaseModel):
    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")


class FullSoftmax(_Settings):
    """Cross-entropy over the whole catalogue; every client touches every item row."""

    kind: Literal["full"] = "full"


class SampledSoftmax(_Settings):
    """Cross-entropy over the target and uniform negatives drawn per person and step, corrected for their number."""

    kind: Literal["sampled"] = "sampled"
    negatives: int = Field(default=256, ge=1)
    """How many negatives each person draws per step; all positions share them."""


Softmax = Annotated[FullSoftmax | SampledSoftmax, Field(discriminator="kind")]


class PopularityConfig(_Settings):
    """Everybody gets the most frequent items."""

    kind: Literal["popularity"] = "popularity"


class FactorisationConfig(_Settings):
    """Matrix factorisation with a user vector that is solved on the client and never leaves it."""

    kind: Literal["factorisation"] = "factorisation"
    dim: int = Field(default=32, ge=1)
    """Length of user and item vectors."""
    length: int = Field(default=200, ge=1)
    """How many of the newest interactions the user vector is solved from."""
    targets: int = Field(default=32, ge=1)
    """How many interactions a local step looks at."""
    negatives: int = Field(default=128, ge=1)
    """How many uniform items stand for the unobserved ones in a local step."""
    unobserved_weight: float = Field(default=0.05, gt=0)
    """Weight of an unobserved item against an observed one (alpha_0 of iALS)."""
    regularisation: float = Field(default=0.05, gt=0)
    """L2 penalty on the user vector, per observed interaction."""


class SpectralConfig(_Settings):
    """Made from the co-occurrence statistic alone: nothing is fitted, so noise in it is all that privacy costs."""

    kind: Literal["spectral"] = "spectral"
    item_rank: int = Field(default=240, ge=0)
    """How many eigenvectors of the items' own statistic are kept."""
    feature_rank: int = Field(default=512, ge=0)
    """How many eigenvectors of the statistic in feature space are kept."""
    item_power: float = Field(default=0.5, ge=0)
    """Power of the eigenvalues of the items' statistic in a score."""
    item_shrink: float = Field(default=0.0, ge=0)
    """How much the items' eigenvalues are lowered before the power, in standard deviations of the noise in one pair:
    small ones are mostly noise."""
    feature_power: float = Field(default=0.5, ge=0)
    """The same for the feature space; more where noise is strong."""
    item_weight: float = Field(default=1.0, ge=0)
    """Weight of the items' part; all parts are brought to the same spread over items for each person first."""
    feature_weight: float = Field(default=1.0, ge=0)
    """Weight of the features' part."""
    popularity_weight: float = Field(default=0.15, ge=0)
    """Weight of the popularity part."""
    length: int = Field(default=60, ge=1)
    """How many of the newest interactions a person's vector is made of."""
    decay: float = Field(default=0.8, gt=0, le=1)
    """Weight of each older interaction against the next."""
    feature_decay: float | None = Field(default=None, gt=0, le=1)
    """The same for the features' part; None: as `decay`."""
    second_rank: int = Field(default=0, ge=0)
    """Noised pairs are looked at twice: how many eigenvectors of the first estimate are the prior of the second; 0:
    once."""
    caution: float = Field(default=0.8, ge=0, le=1)
    """What part of the noise's standard deviation is assumed when each noised pair is replaced by its posterior mean,
    given popularity and the public features; less keeps more of the pairs and of the noise, 0 leaves pairs alone."""


class TasksConfig(_Settings):
    """What is predicted beside the next item, with the same trunk."""

    value_weight: float = Field(default=0.0, ge=0)
    """Weight of predicting an interaction's value, a rating for example; 0: no such head."""
    value_range: tuple[float, float] = (1.0, 5.0)
    """The lowest and the highest value."""
    event_weight: float = Field(default=0.0, ge=0)
    """Weight of predicting the kind of an interaction; 0: no such head."""
    events: tuple[str, ...] = ()
    """The kinds that are told apart, as the data names them; others do not count."""
    weights: Literal["fixed", "learned"] = "fixed"
    """Whether the weights stay, or are multiplied by factors that training finds."""

    @model_validator(mode="after")
    def _possible(self) -> TasksConfig:
        if self.event_weight and len(set(self.events)) < 2:
            raise ValueError("a head for kinds of interaction needs the names of at least two in `events`")
        if not self.value_range[0] < self.value_range[1]:
            raise ValueError("`value_range` must rise")
        if not self.value_weight and not self.event_weight:
            raise ValueError("no task has a weight; leave the table out")
        return self


class SequenceConfig(_Settings):
    """What all models that predict the next item share."""

    dim: int = Field(default=64, ge=2)
    """Width of item vectors and hidden states."""
    length: int = Field(default=50, ge=2)
    """How many of the newest interactions the model sees."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Share of activations dropped while training."""
    windows: Literal["last", "random"] = "random"
    """Which stretch of a long history a local step trains on."""
    horizon: int = Field(default=3, ge=1)
    """How many of the next interactions a position predicts."""
    horizon_decay: float = Field(default=0.5, gt=0, le=1)
    """Weight of each further one of them against the one before."""
    softmax: Softmax = SampledSoftmax()
    """The training loss."""
    tasks: TasksConfig | None = None
    """What else is predicted; None: the next item alone."""
    context: ContextConfig | None = None
    """What of the moment of a request counts; None: the history alone."""
    popularity_weight: float = Field(default=0.0, ge=0)
    """Weight of the logarithm of the released popularity counts in every score, while training too, so that what is
    learnt is what popularity does not tell. 0: none."""


class _Attention(SequenceConfig):
    """What transformers share."""

    blocks: int = Field(default=1, ge=1)
    """How many attention blocks are stacked."""
    heads: int = Field(default=2, ge=1)
    """How many attention heads a block has; must divide `dim`."""
    expand: int = Field(default=4, ge=1)
    """Width of the feed-forward layer, in multiples of `dim`."""


class TransformerConfig(_Attention):
    """A causal transformer over the item sequence (SASRec family)."""

    kind: Literal["transformer"] = "transformer"


class TextTransformerConfig(_Attention):
    """The same over items that are known by public text vectors, so that an item that joins today has one at once."""

    kind: Literal["text_transformer"] = "text_transformer"
    features: FeatureSettings = FeatureSettings(rank=128, fourier=0)
    """How the server makes the vectors of items; they are released with the model and never trained."""
    residual: int = Field(default=16, ge=1)
    """How many numbers of its own an item has beside its text: the rank of what is added to the projected vectors."""
    lora: int = Field(default=0, ge=0)
    """Rank of the adapters beside every linear layer of the blocks and the projection; 0: none."""
    train: Literal["all", "top", "adapters", "ffa", "head"] = "all"
    """What rounds train and updates carry: everything but the text; the `top` highest blocks and the head; the adapters
    with all that is small (biases, norms, recencies, the items' own numbers); for training under noise, the same with
    only that half of each adapter that is 0 at first (FFA-LoRA) and without the projection's bias; or the head alone:
    the items' own numbers, their mixing and the last norm."""
    top: int = Field(default=1, ge=1)
    """How many blocks are trained with train = "top"."""

    @property
    def reach(self) -> float:
        """Length of what is drawn of adapters, see `fedrec.models.layers.Adapted`.

        Adam moves all numbers by about the same; where one half alone is trained, a long other half makes a step of
        those few move a layer about as far as a step of all its weights would.
        """
        return 6.0 if self.train == "ffa" else 1.0

    @model_validator(mode="after")
    def _adapters_are_there(self) -> TextTransformerConfig:
        if self.train in ("adapters", "ffa") and not self.lora:
            raise ValueError(f'train = "{self.train}" needs adapters; set lora to their rank, for example 4')
        return self


class LanguageConfig(SequenceConfig):
    """A frozen language model reads item vectors; adapters beside its layers are trained. Needs fedrec[language]."""

    kind: Literal["language"] = "language"
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of a folder with config.json and *.safetensors, inside the one that $FEDREC_MODELS names on each machine."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """What `fedrec.models.language.weights_digest` says of it; a node with other weights refuses."""
    features: FeatureSettings = FeatureSettings(rank=128, fourier=0)
    """How the server makes the vectors of items."""
    residual: int = Field(default=16, ge=1)
    """How many numbers of its own an item has beside its text."""
    lora: int = Field(default=8, ge=1)
    """Rank of the adapters."""
    adapted: tuple[str, ...] = ()
    """Names of the layers that get adapters, for example "q_proj"; none: all linear ones."""


class GruConfig(SequenceConfig):
    """A gated recurrent unit over the item sequence (GRU4Rec family)."""

    kind: Literal["gru"] = "gru"


class NcfConfig(SequenceConfig):
    """A product and a small network between the mean of what was taken and an item (NeuMF)."""

    kind: Literal["ncf"] = "ncf"
    hidden: int = Field(default=16, ge=1)
    """Width of the network's hidden layer."""


class MachineConfig(SequenceConfig):
    """A factorisation machine over the bag of what was taken and the item that is scored."""

    kind: Literal["factorisation_machine"] = "factorisation_machine"


class LightGcnConfig(SequenceConfig):
    """LightGCN on the graph that a device knows: the person and what they took."""

    kind: Literal["lightgcn"] = "lightgcn"
    layers: int = Field(default=3, ge=1)
    """How many rounds of messages; on a star only whether a round is odd or even matters."""


class NearestConfig(_Settings):
    """Items whose public vectors are like those of the newest interactions; nothing is trained."""

    kind: Literal["nearest"] = "nearest"
    features: FeatureSettings = FeatureSettings(rank=128, fourier=0)
    """How the server makes the vectors of items."""
    length: int = Field(default=60, ge=1)
    """How many of the newest interactions are looked at."""
    decay: float = Field(default=0.8, gt=0, le=1)
    """Weight of each older interaction against the next."""


Positive = Annotated[float, Field(gt=0)]


class BlendConfig(_Settings):
    """A spectral model as prior, and a fitted one that is added to it only as far as validation says that it helps."""

    kind: Literal["blend"] = "blend"
    prior: SpectralConfig = SpectralConfig()
    """What is made from the statistic."""
    fitted: Annotated[FactorisationConfig | TransformerConfig, Field(discriminator="kind")] = TransformerConfig()
    """What is trained in rounds."""
    start: Literal["prior", "fresh"] = "prior"
    """Where its item vectors start: from the prior's geometry, or at random."""
    follow: Literal["new", "all"] = "new"
    """Which item vectors are laid where the prior has them when a later slice begins: those of items that join, or all,
    turned to lie as the old ones did. It needs start = "prior"."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.1, 0.3, 1.0), min_length=1)
    """Weights of the fitted scores that validation tries beside 0, the prior alone; both have spread 1."""
    mixes: tuple[tuple[Positive, Positive, Annotated[float, Field(ge=0)]], ...] = ()
    """Factors on the prior's weights of items, features (text) and popularity that validation tries beside (1, 1, 1)
    once the fitted part has its weight: a blend of four recommenders."""

    @model_validator(mode="after")
    def _what_a_blend_can(self) -> BlendConfig:
        if isinstance(self.fitted, TransformerConfig) and self.fitted.context is not None:
            raise ValueError("a blend does not know the moment of a request; leave fitted.context out")
        if isinstance(self.fitted, TransformerConfig) and self.fitted.popularity_weight:
            raise ValueError("a blend has popularity in its prior; leave fitted.popularity_weight out")
        return self


AnySequenceConfig = (
    TransformerConfig | TextTransformerConfig | GruConfig | NcfConfig | MachineConfig | LightGcnConfig | LanguageConfig
)
AnyModelConfig = (
    PopularityConfig | SpectralConfig | FactorisationConfig | NearestConfig | BlendConfig | AnySequenceConfig
)
ModelConfig = Annotated[AnyModelConfig, Field(discriminator="kind")]
TrainedConfig = Annotated[
    SpectralConfig | FactorisationConfig | NearestConfig | BlendConfig | AnySequenceConfig, Field(discriminator="kind")
]
"""Models that an experiment may release; popularity comes from counts and is always a row beside them."""


def moment_of(config: AnyModelConfig, what: Mapping[str, Any] | None) -> NDArray[np.float32] | None:
    """Return the numbers of a request's moment, as the model's context reads it; None where nothing is said of it.

    Raises:
        ConfigError: the model does not look at moments, or knows no such thing.
    """
    if not what:
        return None
    context = config.context if isinstance(config, SequenceConfig) else None
    if context is None:
        raise ConfigError("This model does not look at the moment of a request; train it with a table [model.context].")
    return context.moment(what)
