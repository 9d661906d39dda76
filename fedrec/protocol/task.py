"""What a round asks of its clients: each task yields contributions, named tensors that are summed over clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedrec.data.slices import Window
from fedrec.privacy.settings import LocalNoise
from fedrec.random import Key

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class _Settings(BaseModel):
    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid")


class LocalTraining(_Settings):
    """What a client does with its copy of the model: plain SGD on its own interactions."""

    steps: int = Field(default=1, ge=1)
    """How many SGD steps, each on a freshly drawn batch of the client's own interactions."""
    learning_rate: float = Field(default=1.0, gt=0)
    """Step size. With one step the upload is minus this times the gradient."""
    clip_norm: float = Field(default=10.0, gt=0)
    """L2 bound of one client's whole update; longer ones are scaled down to it."""
    item_clip: float | None = Field(default=None, gt=0)
    """L2 bound of what one client's update does to one row of an item table, before the whole is clipped; server and
    gateway check it of every sum that is not masked. None: there is none."""
    history_negatives: bool = True
    """Whether nothing that a client ever took is a negative; if not, only what it took in the window is spared. Models
    that train on pairs weigh all items alike, taken or not, so it changes nothing for them."""
    replay: float = Field(default=0.0, ge=0, lt=1)
    """Probability with which a client's step rehearses its own interactions from before the window."""
    replay_budget: int = Field(default=100, ge=1)
    """How many of the newest of those are kept for it."""
    replay_by_shift: bool = False
    """Rehearse the less, the more the person's taste has moved: `replay` is multiplied by the cosine of the vectors
    that the received model makes of what lies before the window and of all up to its end (F3CRec's idea)."""
    imitate: float = Field(default=0.0, ge=0)
    """Weight of a second loss: be like the release that the slice began with on the same candidates. The plan then
    carries that release as well, which doubles the download; nothing more is sent back."""


class Turn(_Settings):
    """Which of several groups takes part; a client's group is a hash of the key and of the client's own number."""

    groups: int = Field(ge=1)
    """How many groups there are."""
    group: int = Field(ge=0)
    """The one whose turn it is."""
    key: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the hash; the same in all rounds of a slice."""

    def taken(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of the clients take part: [c] numbers that name the clients -> [c].

        Whether one does depends on nobody else, so a person who joins or leaves changes no other's turn.
        """
        import numpy as np

        groups = np.uint64(self.groups)
        drawn: NDArray[np.bool_] = Key.from_hex(self.key).bits(ids, 1)[:, 0] % groups == np.uint64(self.group)
        return drawn


class Tier(_Settings):
    """Which class of devices takes part: the small ones, or all others. The class is public.

    In a simulation it is a hash of the key and of the client's own number.
    """

    small: bool
    """Whether the small devices are asked."""
    share: float = Field(gt=0, lt=1)
    """Which part of the people have small ones."""
    key: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the hash; the same for the whole life."""

    def taken(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of the clients belong to it: [c] numbers that name the clients -> [c]."""
        drawn: NDArray[np.bool_] = (Key.from_hex(self.key).uniforms(ids, 1)[:, 0] < self.share) == self.small
        return drawn


class FitTask(_Settings):
    """Train a copy of the model on the interactions in the window; contribute new minus old parameters."""

    kind: Literal["fit"] = "fit"
    window: Window
    local: LocalTraining = LocalTraining()
    turn: Turn | None = None
    """Only those of the planned clients take part whose turn it is; None: all of them."""
    tier: Tier | None = None
    """Only devices of this class take part; None: all."""
    private: LocalNoise | None = None
    """Noise that the client itself adds before anything leaves it; None: it sends its exact update."""


class FisherTask(_Settings):
    r"""Contribute how much each parameter matters to the client: the squares of its gradient, entry by entry.

    .. math:: F_u = \min\left(1, \frac{C}{|g_u^2|}\right) g_u^2, \qquad g_u = \nabla_w \ell_u(w)

    one batch of the client's interactions in the window, as in a step of training. The mean over clients estimates the
    diagonal of the Fisher information.

    Source: Kirkpatrick et al., PNAS 2017; the squares of a client's mean gradient stand for the mean of squares.
    """

    kind: Literal["fisher"] = "fisher"
    window: Window
    clip_norm: float = Field(default=1.0, gt=0)
    """L2 bound C of one client's squares."""


class CountTask(_Settings):
    """Contribute 1 for each item that the client took in the window."""

    kind: Literal["count"] = "count"
    window: Window
    clip_norm: float | None = Field(default=None, gt=0)
    """L2 bound of one client's counts; None: not bounded."""
    private: LocalNoise | None = None
    """Noise that the client itself adds before anything leaves it, at user level."""


class CooccurrenceSettings(_Settings):
    """What a contribution to the co-occurrence statistic is made of."""

    sketch: Literal["pairs", "features"] = "pairs"
    """"pairs": M itself, twice, once weighted for the features, sparse, to a trusted server that projects; "features":
    the dense triangle in feature space, which can be masked; one that is not betrays which items are likely."""
    item_share: float = Field(default=0.75, ge=0, le=1)
    """Share of the squared norm that goes to M; must be 0 in a sketch of features."""
    feature_share: float = Field(default=0.25, ge=0, le=1)
    """Share that goes to the feature space."""
    last: int = Field(default=200, ge=2)
    """How many of the newest interactions are looked at."""
    lag: int = Field(default=20, ge=1)
    """How many steps apart two interactions may be."""
    decay: float = Field(default=0.9, gt=0, le=1)
    """Weight of each further step between them."""

    @model_validator(mode="after")
    def _within_one(self) -> Self:
        if self.item_share + self.feature_share > 1 + 1e-9:
            raise ValueError("the shares of items and features add up to more than 1")
        if self.sketch == "features" and self.item_share:
            raise ValueError("a sketch of features holds no single items; set item_share to 0")
        return self


class CooccurrenceTask(CooccurrenceSettings):
    r"""Contribute which items the client took near each other, as one vector of norm 1.

    With :math:`x_a` the item at place a of the client's newest `last` interactions and only pairs whose later place is
    in the window,

    .. math:: M_{ij} = \sum_{a \ne b,\; |a - b| \le lag} decay^{|a - b|} \, [x_a = i] [x_b = j] .

    The contribution is two blocks, each scaled to the root of its share: the upper triangle of M, and the upper
    triangle of :math:`B^T M B` in the item features B. Whatever a person did, it has norm 1 at most, so it needs no
    clipping.
    """

    kind: Literal["cooccurrence"] = "cooccurrence"
    window: Window


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
    known: Window | None = None
    """Everything before its end is known when a question is asked, and nothing after it; None: everything before the
    question."""
    masked: Window | None = None
    """What the person took in it is no candidate; None: all that is known. Only to compare with papers that leave some
    of it among the candidates."""
    new_since: int | None = None
    """Who did nothing before this second is new; None: of whom nothing is known."""
    n_known_items: int = Field(ge=0)
    """Items with this number or a higher one joined after training; they are reported apart."""
    sampled_negatives: int | None = Field(default=None, ge=1)
    """Rank against this many random items instead of all: only to compare with old papers, never to claim quality."""
    private: bool = False
    """Contribute only `private_names(ks)` of everybody and a 1 each, in [0, 1] per person, so of bounded norm."""
    personalise: FitTask | None = None
    """Train locally first and never upload: the local-only row."""


Task = Annotated[FitTask | FisherTask | CountTask | CooccurrenceTask | EvaluateTask, Field(discriminator="kind")]
AnyTask = FitTask | FisherTask | CountTask | CooccurrenceTask | EvaluateTask
