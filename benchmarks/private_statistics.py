"""What the privacy benchmarks share: gathering the statistic, noise, the spectral model, full ranking."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedrec.client.pool import LogPool
from fedrec.data.cleaning import Dataset
from fedrec.data.features import FeatureSettings, item_features
from fedrec.data.slices import leave_one_out
from fedrec.evaluation.metrics import metric_names
from fedrec.models.configs import AnyModelConfig, PopularityConfig, SpectralConfig
from fedrec.params import Params
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
_THIRD = 1.0 / 3.0


@dataclass(frozen=True)
class Choice:
    """Settings of one spectral model: shares of the contribution, and how the parts are weighed.

    Attributes:
        shares: of items, features and counts; they add up to 1.
        model: powers, weights and ranks.
        features: the public space.
    """

    shares: tuple[float, float, float]
    model: SpectralConfig
    features: FeatureSettings


class Bench:
    """One data set: its pool, its statistic without noise, and full ranking of a model.

    The statistic is gathered once with a third of the norm for each block; other shares scale the blocks, which is what
    gathering with them would give.
    """

    def __init__(self, dataset: Dataset) -> None:
        """Gather nothing yet."""
        self.dataset = dataset
        self._features: dict[FeatureSettings, np.ndarray] = {}
        self._thirds: dict[FeatureSettings, Params] = {}
        self.pool = LogPool(dataset.log, dataset.catalog)
        self.n_items = len(dataset.catalog)

    def features(self, settings: FeatureSettings) -> np.ndarray:
        """Return [n_items, rank] public vectors."""
        if settings not in self._features:
            self._features[settings] = item_features(self.dataset.catalog, settings)
        return self._features[settings]

    def thirds(self, settings: FeatureSettings) -> Params:
        """Return the statistic of everybody, a third of the squared norm in each block."""
        if settings not in self._thirds:
            self._thirds[settings] = self._gathered(self.features(settings))
        return self._thirds[settings]

    def _gathered(self, features: np.ndarray) -> Params:
        window = leave_one_out(self.dataset.catalog)[0].train
        task = CooccurrenceTask(window=window, item_share=_THIRD, feature_share=_THIRD, count_share=_THIRD)
        tally = self.pool.run(self._plan(task, PopularityConfig(), {}, {"features": features}))
        return projected(features, tally.sums, tally.n_clients)

    def statistic(self, choice: Choice, epsilon: float | None, seed: int) -> Params:
        """Return the statistic of a choice with the noise that spends `epsilon` on it alone."""
        roots = (math.sqrt(3.0 * share) for share in choice.shares)
        factors = dict(zip(("items", "features", "counts"), roots, strict=True))
        thirds = self.thirds(choice.features)
        total = {n: (value * factors[n]).astype(np.float32) for n, value in thirds.items() if factors[n]}
        if epsilon is None:
            return total
        variance = np.full(1, multiplier(epsilon) ** 2, np.float32)
        return {**noised(total, 1.0, epsilon, seed), "variance": variance}

    def spectral(self, choice: Choice, epsilon: float | None, seed: int, test: bool = True) -> float:
        """Return NDCG@10 of the spectral model at this budget."""
        statistic = self.statistic(choice, epsilon, seed)
        statistic = {"counts": np.zeros(self.n_items, np.float32), **statistic}
        params = spectral_params(statistic, choice.model, self.features(choice.features), self.n_items)
        return self.quality(choice.model, params, test)

    def popularity(self, epsilon: float | None, seed: int, test: bool = True, clip_norm: float = 4.0) -> float:
        """Return NDCG@10 of noised popularity counts; `clip_norm` bounds one person's."""
        window = leave_one_out(self.dataset.catalog)[0].train
        bound = None if epsilon is None else clip_norm
        tally = self.pool.run(self._plan(CountTask(window=window, clip_norm=bound), PopularityConfig(), {}, {}))
        return self.quality(PopularityConfig(), noised(tally.sums, clip_norm, epsilon, seed), test)

    def quality(self, config: AnyModelConfig, params: Params, test: bool = True) -> float:
        """Return NDCG@10 of full ranking, everything known masked, on the test or the validation item."""
        window = leave_one_out(self.dataset.catalog, "test" if test else "validation")[0].test
        task = EvaluateTask(window=window, ks=(10,), replicates=0, n_known_items=self.n_items)
        seen = np.ones(self.n_items, np.float32)
        tally = self.pool.run(self._plan(task, config, params, {"popularity": seen}))
        column = metric_names((10,)).index("ndcg@10")
        return float(tally.sums["sum.all"][0, column] / tally.sums["weight.all"][0])

    def _plan(self, task: AnyTask, config: AnyModelConfig, params: Params, inputs: Params) -> RoundPlan:
        digest = self.dataset.catalog.digest()
        slots = np.arange(self.pool.census(task.window, digest), dtype=np.int64)
        return RoundPlan(0, 0, task, config, self.n_items, params, Key.from_seed(0), digest, slots, inputs)


def noised(total: Params, clip_norm: float, epsilon: float | None, seed: int) -> Params:
    """Return the sum with the noise of one release at this budget, charged to a ledger of its own; None: as it is."""
    if epsilon is None:
        return total
    mechanism = GaussianMechanism(clip_norm, multiplier(epsilon))
    charge = PrivacyLedger(None, epsilon=epsilon, delta=DELTA).charge("the statistic", mechanism.event(), clip_norm)
    return mechanism.noised(total, 1.0, charge, SeededNoise(Key.from_seed(seed).child("noise")))


@lru_cache
def multiplier(epsilon: float) -> float:
    """Return the noise of one release that spends `epsilon`."""
    return calibrate(lambda scale: [GaussianEvent(noise_multiplier=scale)], epsilon, DELTA)
