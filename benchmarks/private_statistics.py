"""What the privacy benchmark knows of statistics: gathering, noise, the spectral model, full ranking, bytes."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedrec.client.pool import LogPool
from fedrec.data.cleaning import Dataset
from fedrec.data.features import FeatureSettings, item_features
from fedrec.data.slices import LastWindow
from fedrec.evaluation.intervals import summarise
from fedrec.evaluation.metrics import metric_names
from fedrec.models.configs import AnyModelConfig, PopularityConfig, SpectralConfig
from fedrec.params import Array, Params
from fedrec.privacy.accounting import calibrate
from fedrec.privacy.events import GaussianEvent
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.noise import SeededNoise
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import AnyTask, CooccurrenceTask, CountTask, EvaluateTask
from fedrec.random import Key
from fedrec.server.spectral import projected, spectral_params

DELTA = 1e-5
REPLICATES = 500
"""Of the bootstrap over people."""
COUNT_CLIP = 4.0
"""L2 bound of one person's popularity counts: the default of `privacy.count_clip`."""


@dataclass(frozen=True)
class Fold:
    """What statistics are made from, and what is asked.

    Attributes:
        train: what counts and statistics see.
        asked: the interactions to predict, each given everything before it.
        probes: how many of them a person is asked for; None: one.
    """

    train: LastWindow
    asked: LastWindow
    probes: int | None = None


TEST = Fold(LastWindow(skip=2), LastWindow(skip=0, take=1))
CHOICE = Fold(LastWindow(skip=5), LastWindow(skip=1, take=4), probes=4)
"""Where settings are chosen: the four interactions before the last, of which neither counts nor statistic know."""


@dataclass(frozen=True)
class Choice:
    """Settings of one spectral model: shares of the budget, and how the parts are weighed.

    Attributes:
        shares: of items, features and popularity counts; they add up to 1. A release of share s has noise
            ``multiplier / sqrt(s)``, so that both together cost what one of noise ``multiplier`` does.
        model: powers, weights and ranks.
        features: the public space.
    """

    shares: tuple[float, float, float]
    model: SpectralConfig
    features: FeatureSettings


@dataclass(frozen=True)
class Found:
    """NDCG@10 of full ranking.

    Attributes:
        value: mean over people.
        half: half of its 95 % interval over people.
    """

    value: float
    half: float


class Bench:
    """One data set: its pool, its statistics with noise, and full ranking of a model."""

    def __init__(self, dataset: Dataset) -> None:
        """Gather nothing yet."""
        self.dataset = dataset
        self.pool = LogPool(dataset.log, dataset.catalog)
        self.n_items = len(dataset.catalog)
        self._halves: tuple[str, Params] | None = None

    def spectral(self, choice: Choice, epsilon: float | None, seed: int, fold: Fold = TEST) -> Found:
        """Return NDCG@10 of the spectral model at this budget, counts and statistic together."""
        counts, features, statistic = self.released(choice, epsilon, seed, fold)
        params = spectral_params(statistic, counts, choice.model, features, self.n_items)
        return self.quality(choice.model, params, fold)

    def popularity(self, epsilon: float | None, seed: int, fold: Fold = TEST) -> Found:
        """Return NDCG@10 of popularity counts that the whole budget is spent on."""
        noise = None if epsilon is None else multipliers(epsilon, 1.0)[0]
        ledger = PrivacyLedger(None, epsilon=epsilon, delta=DELTA)
        counts = noised(ledger, "counts", self.counts(fold), COUNT_CLIP, noise, seed)
        return self.quality(PopularityConfig(), counts, fold)

    def released(
        self, choice: Choice, epsilon: float | None, seed: int, fold: Fold
    ) -> tuple[Array, NDArray[np.float32], Params]:
        """Return the counts, the features that they shape, and the statistic, noised and charged to one ledger."""
        items, feature, count = choice.shares
        counting, telling = (None, None) if epsilon is None else multipliers(epsilon, count)
        ledger = PrivacyLedger(None, epsilon=epsilon, delta=DELTA)
        counts = noised(ledger, "counts", self.counts(fold), COUNT_CLIP, counting, seed)["counts"]
        features = item_features(self.dataset.catalog, choice.features, popular=counts)
        roots = {"items": math.sqrt(2 * items / (1 - count)), "features": math.sqrt(2 * feature / (1 - count))}
        halves = self.halves(features, fold)
        total = {name: (value * roots[name]).astype(np.float32) for name, value in halves.items() if roots[name]}
        statistic: Params = noised(ledger, "statistic", total, 1.0, telling, seed)
        if telling is not None:
            statistic = {**statistic, "variance": np.full(1, telling**2, np.float32)}
        return counts, features, statistic

    def counts(self, fold: Fold) -> Params:
        """Return everybody's counts, each person's clipped."""
        task = CountTask(window=fold.train, clip_norm=COUNT_CLIP)
        return self.pool.run(self.plan(task, PopularityConfig(), {}, {})).sums

    def halves(self, features: NDArray[np.float32], fold: Fold) -> Params:
        """Return everybody's statistic, half of the squared norm in each block; other shares scale the blocks."""
        digest = hashlib.sha256(features.tobytes()).hexdigest() + str(fold)
        if self._halves is None or self._halves[0] != digest:
            task = CooccurrenceTask(window=fold.train, item_share=0.5, feature_share=0.5)
            tally = self.pool.run(self.plan(task, PopularityConfig(), {}, {"features": features}))
            self._halves = digest, projected(features, tally.sums, tally.n_clients)
        return self._halves[1]

    def quality(self, config: AnyModelConfig, params: Params, fold: Fold = TEST) -> Found:
        """Return NDCG@10 of full ranking, everything known masked."""
        task = EvaluateTask(
            window=fold.asked, ks=(10,), replicates=REPLICATES, n_known_items=self.n_items, probes=fold.probes
        )
        seen = np.ones(self.n_items, np.float32)
        tally = self.pool.run(self.plan(task, config, params, {"popularity": seen}))
        found = summarise(tally.sums, metric_names((10,)))["all"]["ndcg@10"]
        return Found(found.value, ((found.high or 0.0) - (found.low or 0.0)) / 2)

    def upload_bytes(self, choice: Choice, people: int) -> tuple[float, int]:
        """Return mean and maximum of what a client sends for the statistic that is alone on its node.

        Written for `people` drawn at random and the eight longest histories, who have the most pairs.
        """
        features = item_features(self.dataset.catalog, choice.features)
        task = CooccurrenceTask(window=TEST.train, item_share=choice.shares[0], feature_share=1 - choice.shares[0])
        plan = self.plan(task, PopularityConfig(), {}, {"features": features})
        drawn = Key.from_seed(0).child("people").numpy().choice(plan.slots, min(people, len(plan.slots)), replace=False)
        sizes = [self.alone(plan, slot) for slot in drawn]
        return float(np.mean(sizes)), max(*sizes, *(self.alone(plan, slot) for slot in self.pool.by_length(plan)[-8:]))

    def counts_bytes(self) -> int:
        """Return what a client sends for the popularity counts that is alone on its node: the longest history."""
        plan = self.plan(CountTask(window=TEST.train, clip_norm=COUNT_CLIP), PopularityConfig(), {}, {})
        return self.alone(plan, self.pool.by_length(plan)[-1])

    def alone(self, plan: RoundPlan, slot: int | np.integer[Any]) -> int:
        """Return what a client sends that is alone on its node."""
        one = replace(plan, slots=np.array([slot]))
        return len(self.pool.run(one).to_bytes(one.coding, "alone"))

    def plan(self, task: AnyTask, config: AnyModelConfig, params: Params, inputs: Params) -> RoundPlan:
        """Return the plan of a task for everybody."""
        digest = self.dataset.catalog.digest()
        slots = np.arange(self.pool.census(task.window, digest), dtype=np.int64)
        return RoundPlan(0, 0, task, config, self.n_items, params, Key.from_seed(0), digest, slots, inputs)


def noised(
    ledger: PrivacyLedger, name: str, total: Params, clip_norm: float, noise: float | None, seed: int
) -> dict[str, Array]:
    """Return a sum with the noise of one release, which the ledger is charged for; None: as it is."""
    if noise is None:
        return dict(total)
    mechanism = GaussianMechanism(clip_norm, noise)
    charge = ledger.charge(name, mechanism.event(), clip_norm)
    return mechanism.noised(total, 1.0, charge, SeededNoise(Key.from_seed(seed).child("noise", len(name))))


@lru_cache
def multipliers(epsilon: float, share: float) -> tuple[float, float]:
    """Return the noise of the counts, which get this share of the budget, and of the statistic, which gets the rest."""
    factors = [1 / math.sqrt(part) for part in (share, 1 - share) if part]
    scale = calibrate(lambda s: [GaussianEvent(noise_multiplier=f * s) for f in factors], epsilon, DELTA)
    return scale * factors[0], scale * factors[-1]
