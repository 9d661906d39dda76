"""The best that is federated on MovieLens-1M: a transformer, and its blend with statistics of one round."""

from __future__ import annotations

from itertools import product

import numpy as np

from benchmarks.asking import Questions, Scores, estimate, gains, leave_one_out, scores_of, standardised
from benchmarks.foundation import UNIT, Setting
from benchmarks.harness import Row, claim, unclaimed
from benchmarks.kept import Made
from benchmarks.zoo import experiment_for
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.sources import load_dataset
from fedrec.learning import StageConfig

SOURCE = "ml-1m"
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Of the spectral scores against the transformer's; validation chooses."""
LATEST = (0.0, 0.1, 0.2, 0.3)
"""Of the text's."""
REACHED, CENTRAL = 0.160, 0.173
"""What must hold, and gSASRec, trained centrally (Petrov and Macdonald, RecSys 2023)."""


def best(setting: Setting) -> list[Row]:
    """Train a transformer and make a spectral model; choose their weights on the item before the last."""
    dataset = load_dataset(SOURCE)
    made = {
        "transformer": setting.shelf.run(longest(setting.quick), dataset),
        "spectral": setting.shelf.run(experiment_for(SOURCE, "spectral", 0), dataset),
        "text transformer": setting.shelf.run(
            experiment_for(SOURCE, "text_transformer", setting.rounds(SOURCE)), dataset
        ),
    }
    choice, test = leave_one_out(dataset, skip=1), leave_one_out(dataset)
    tried = _standardised(made, dataset, choice)
    found = {weights: float(gains(_added(tried, weights), choice).mean()) for weights in product(WEIGHTS, LATEST)}
    weights = max(found, key=found.__getitem__)
    asked = _standardised(made, dataset, test)
    judge = unclaimed if setting.quick else claim
    alone = gains(asked["transformer"], test)
    blend = gains(_added(asked, weights), test)
    rows = [
        judge(f"{SOURCE}: federated transformer, against the claim", float(alone.mean()), UNIT, ">=", REACHED),
        *estimate(f"{SOURCE}: federated transformer (1 seed)", alone),
        Row(
            f"{SOURCE}: federated transformer, where settings are chosen",
            float(gains(tried["transformer"], choice).mean()),
            UNIT,
        ),
        Row(f"{SOURCE}: federated transformer, HR@10", float((alone > 0).mean()), "HR@10"),
        Row(f"{SOURCE}: federated transformer, processor time", made["transformer"].seconds, "s"),
        Row(f"{SOURCE}: federated transformer, uploaded by all", made["transformer"].last["bytes_up"] / 1e6, "MB"),
        *estimate(f"{SOURCE}: spectral", gains(asked["spectral"], test)),
        *estimate(f"{SOURCE}: text transformer", gains(asked["text transformer"], test)),
        Row(f"{SOURCE}: blend, weight of spectral", weights[0], "weight"),
        Row(f"{SOURCE}: blend, weight of text transformer", weights[1], "weight"),
        Row(f"{SOURCE}: blend, where weights are chosen", found[weights], UNIT),
        judge(f"{SOURCE}: blend, against gSASRec, central", float(blend.mean()), UNIT, ">=", CENTRAL),
        *estimate(f"{SOURCE}: blend", blend),
        Row(f"{SOURCE}: blend, HR@10", float((blend > 0).mean()), "HR@10"),
        *estimate(f"{SOURCE}: blend minus transformer", blend - alone),
    ]
    return rows


def longest(quick: bool) -> Experiment:
    """Return the experiment of the transformer that is trained longest."""
    wanted = Experiment.find("ml1m_transformer")
    if not quick:
        return wanted
    short = wanted.training.model_copy(update={"base": StageConfig(rounds=60, warmup=10, final=0.01)})
    return wanted.model_copy(update={"training": short})


def _standardised(made: dict[str, Made], dataset: Dataset, asked: Questions) -> dict[str, Scores]:
    return {
        name: standardised(scores_of(one.model, one.release.params, len(dataset.catalog), asked))
        for name, one in made.items()
    }


def _added(scores: dict[str, Scores], weights: tuple[float, float]) -> Scores:
    spectral, text = (np.float32(weight) for weight in weights)
    total: Scores = scores["transformer"] + spectral * scores["spectral"] + text * scores["text transformer"]
    return total
