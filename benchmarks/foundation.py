"""What text and pre-training are good for: adapters against full fine-tuning, and newcomers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.asking import Questions, estimate, gains, interval, leave_one_out, over_seeds, people, scores_of
from benchmarks.harness import Row, claim, unclaimed
from benchmarks.kept import Made, Shelf
from benchmarks.zoo import experiment_for
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.data.features import item_features
from fedrec.data.log import InteractionLog
from fedrec.data.sources import load_dataset
from fedrec.models.configs import NearestConfig, TextTransformerConfig
from fedrec.models.freeze import trainable
from fedrec.params import Params, n_values

UNIT = "NDCG@10"
ROUNDS = {"ml-100k": 1500, "ml-1m": 1000, "amazon-video": 1000, "amazon-beauty": 1000, "movietweetings-100k": 600}
SHARED: dict[str, Any] = {"residual": 4}
"""The shared model that adapters stand beside: that of the other rows, with half as many numbers for each item."""
LEARNT = 1000
"""Steps elsewhere."""
FITTED = {"ml-100k": 1500, "ml-1m": 1000}
"""Rounds of adapters and of full fine-tuning."""
WAYS = ("full fine-tuning", "adapters")
RANKS = {("ml-100k", False): 8, ("ml-100k", True): 4, ("ml-1m", False): 24, ("ml-1m", True): 24}
"""Of the adapters, by whether there is noise: more people bear more numbers."""
PRIVATE = {"ml-100k": (60, 256), "ml-1m": (60, 1024)}
"""Rounds and expected cohort of fits under noise."""
STEP = 1e-2
"""The server's step size under noise, by the validation item (docs/models.md)."""
STEPS = {"ml-100k": 2e-3, "ml-1m": 1.6e-2}
"""The same without privacy: on MovieLens-1M by the validation item, on MovieLens-100K not searched."""
SEEN = {"ml-100k": 1, "ml-1m": 3}
"""Runs of seeds up to this were looked at while settings were chosen, so measurements begin with the next."""
TRAINED = 3
"""Seeds without privacy at most: they take longest."""
KEEPS, MOST_SENT = 0.95, 0.05
"""What adapters must keep of full fine-tuning, and what share of the parameters they may send."""
EPSILON, DELTA = 8.0, 1e-5
NEW_PEOPLE = (1, 3, 5, 10)
NEW_SHARE, TIMES = 0.1, 3.0
"""Share of the catalogue, and of the people, that training does not see; what new items must reach, in multiples of
popularity by genre."""


@dataclass(frozen=True)
class Setting:
    """How much is measured.

    Attributes:
        shelf: makes and keeps runs.
        seeds: of trained models, where they are cheap.
        quick: only to see that it works.
    """

    shelf: Shelf
    seeds: tuple[int, ...] = (1,)
    quick: bool = False

    def rounds(self, source: str) -> int:
        """Return how many rounds a model is trained on a data set."""
        return 60 if self.quick else ROUNDS[source]

    @property
    def judge(self) -> Callable[[str, float, str, str, float], Row]:
        """`claim`, or `unclaimed` in a quick run."""
        return unclaimed if self.quick else claim


Measure = Callable[[Setting], list[Row]]


def adapters(source: str, elsewhere: str, setting: Setting) -> list[Row]:
    """Begin with weights of another domain; train everything, or adapters alone, without and with privacy."""
    dataset = load_dataset(source)
    plain, along = beginnings(source, elsewhere, setting)
    rounds = 60 if setting.quick else FITTED[source]
    seeds = [SEEN[source] + seed for seed in setting.seeds]
    found: dict[str, list[Made]] = {}
    under: dict[str, list[Made]] = {}
    for way in WAYS:
        begin: dict[str, Any] = {"model": fitted(source, way), "start": plain}
        noised = along if way == "adapters" else plain
        found[way] = [
            setting.shelf.run(
                experiment_for(source, "text_transformer", rounds, seed=seed, rate=STEPS[source], **begin), dataset
            )
            for seed in seeds[:TRAINED]
        ]
        under[way] = [  # the seed is that of the noise, and of who takes part
            setting.shelf.run(private(source, way, seed, noised, setting.quick), dataset) for seed in seeds
        ]
    rows: list[Row] = []
    for way in WAYS:
        head = f"{source}: {way} from {elsewhere}"
        rows += over_seeds(head, [one.value() for one in found[way]], UNIT)
        rows += over_seeds(f"{head}, epsilon {EPSILON:g}", [one.value() for one in under[way]], UNIT)
        rows += _sent(f"{head}, without privacy", found[way][0], setting if way == "adapters" else None)
        rows += _sent(f"{head}, epsilon {EPSILON:g}", under[way][0], setting if way == "adapters" else None)
        rows.append(Row(f"{head}, processor time", found[way][0].seconds, "s"))
    here = experiment_for(source, "text_transformer", 0, model=SHARED, start=plain)
    rows.append(Row(f"{source}: from {elsewhere}, no round here", setting.shelf.run(here, dataset).value(), UNIT))
    rows.append(Row(f"{source}: popularity", found["adapters"][0].value("popularity"), UNIT))
    return [*rows, *_kept(source, found, dataset, setting), *_ahead(source, under, dataset, setting)]


def _kept(source: str, found: dict[str, list[Made]], dataset: Dataset, setting: Setting) -> list[Row]:
    """Compare without privacy: which share of full fine-tuning's quality adapters keep."""
    whole, adapted = (_each(found[way], dataset) for way in WAYS)
    words = f"{source}: adapters without privacy"
    low, high = interval(adapted - KEEPS * whole)
    beyond = f"{words}, minus {KEEPS:g} of full fine-tuning, 95 % interval over seeds and people"
    return [
        setting.judge(
            f"{words}, share of full fine-tuning", float(adapted.mean() / whole.mean()), "ratio", ">=", KEEPS
        ),
        Row(f"{beyond}, low", low, UNIT),
        Row(f"{beyond}, high", high, UNIT),
    ]


def _ahead(source: str, under: dict[str, list[Made]], dataset: Dataset, setting: Setting) -> list[Row]:
    """Compare under noise: how far adapters are ahead of full fine-tuning."""
    whole, adapted = (_each(under[way], dataset) for way in WAYS)
    words = f"{source}: adapters minus full fine-tuning, epsilon {EPSILON:g}"
    low, high = interval(adapted - whole)
    return [
        setting.judge(words, float((adapted - whole).mean()), UNIT, ">=", 0.0),
        setting.judge(f"{words}, 95 % interval over seeds and people, low", low, UNIT, ">=", 0.0),
        Row(f"{words}, 95 % interval over seeds and people, high", high, UNIT),
    ]


def _each(made: list[Made], dataset: Dataset) -> NDArray[np.float64]:
    """Return [s, q] gains of each run at each person's last interaction."""
    asked, n = leave_one_out(dataset), len(dataset.catalog)
    return np.stack([gains(scores_of(one.model, one.release.params, n, asked), asked) for one in made])


def beginnings(source: str, elsewhere: str, setting: Setting) -> tuple[dict[str, str], dict[str, str]]:
    """Return tables [start]: of what was learnt elsewhere, and of the same with adapters that lie where it was."""
    public, rounds = load_dataset(elsewhere), 60 if setting.quick else LEARNT
    learnt = experiment_for(elsewhere, "text_transformer", rounds, model=SHARED)
    plain = {"registry": str(setting.shelf.public(learnt, public))}
    adapted = {**SHARED, "lora": RANKS[source, True]}
    beside = experiment_for(elsewhere, "text_transformer", 0, model=adapted, start=plain)
    return plain, {"registry": str(setting.shelf.public(beside, public))}


def fitted(source: str, way: str, noised: bool = False) -> dict[str, Any]:
    """Return the model's settings for a way of fine-tuning; under noise one half of each adapter alone."""
    if way == "adapters":
        return {**SHARED, "train": "ffa" if noised else "adapters", "lora": RANKS[source, noised]}
    return {**SHARED, "train": "all"}


def private(source: str, way: str, seed: int, start: dict[str, Any], quick: bool = False) -> Experiment:
    """Return a short fit under noise; popularity counts get a hundredth of the budget."""
    rounds, cohort = (10, 64) if quick else PRIVATE[source]
    rate = cohort / load_dataset(source).log.n_users
    budget = {
        "mode": "central", "epsilon": EPSILON, "delta": DELTA, "noise": "seed", "metrics": "research",
        "fit": rate * math.sqrt(rounds / 0.99), "count": 10.0,
    }  # fmt: skip
    training = {
        "cohort": {"kind": "poisson", "expected": float(cohort)},
        "local": {"steps": 1, "learning_rate": 1.0, "clip_norm": 1.0},
        "server": {"kind": "adam", "learning_rate": STEP},
        "base": {"rounds": rounds, "warmup": 5, "final": 0.1},
        "later": {"rounds": 0},
    }
    return experiment_for(
        source,
        "text_transformer",
        rounds,
        seed=seed,
        model=fitted(source, way, noised=True),
        start=start,
        training=training,
        privacy=budget,
    )


def _sent(head: str, made: Made, judged: Setting | None) -> list[Row]:
    params = made.release.params
    sent = n_values({name: params[name] for name in trainable(made.model, params)})
    rest = n_values({name: value for name, value in params.items() if name != "text"})
    words = f"{head}, share of all parameters that is trained and sent"
    share = sent / n_values(params)
    return [
        Row(words, share, "share") if judged is None else judged.judge(words, share, "share", "<=", MOST_SENT),
        Row(f"{head}, the same without the public text vectors", sent / rest, "share"),
        Row(f"{head}, uploaded by all", made.last["bytes_up"] / 1e6, "MB"),
    ]


def newcomers(source: str, setting: Setting) -> list[Row]:
    """Train without the newest tenth of the items and a tenth of the people; then ask for either."""
    whole = newest_last(load_dataset(source))
    n_old = len(whole.catalog) - round(NEW_SHARE * len(whole.catalog))
    away, stay = people(whole, NEW_SHARE, 7)
    seen = _without(whole, stay, n_old)
    wanted = experiment_for(source, "text_transformer", setting.rounds(source))
    made = setting.shelf.run(wanted, seen)
    assert isinstance(wanted.model, TextTransformerConfig)
    vectors = item_features(whole.catalog, wanted.model.features, n_old)
    grown = dict(made.release.params)
    grown["text"] = vectors
    grown["residual"] = np.pad(grown["residual"], ((0, len(vectors) - n_old), (0, 0)))
    nearest = NearestConfig(features=wanted.model.features)
    models: dict[str, tuple[Any, Params]] = {
        "text_transformer": (wanted.model, grown),
        "nearest": (nearest, {"text": vectors}),
    }
    counts = np.bincount(seen.log.item, minlength=len(vectors))
    return [
        *_new_items(source, whole, n_old, models, counts, setting),
        *_new_people(source, whole, away, n_old, models["text_transformer"], counts, setting),
    ]


def _new_items(
    source: str,
    whole: Dataset,
    n_old: int,
    models: dict[str, tuple[Any, Params]],
    counts: NDArray[np.int64],
    setting: Setting,
) -> list[Row]:
    """Ask everybody for the last new item that they took, given all that they took before it."""
    n, fresh = len(whole.catalog), np.arange(n_old, len(whole.catalog))
    histories = [whole.log.history(user).tolist() for user in range(whole.log.n_users)]
    places = [max((p for p, item in enumerate(own) if item >= n_old), default=0) for own in histories]
    pairs = [(own[:place], own[place]) for own, place in zip(histories, places, strict=True) if place]
    asked = Questions([own for own, _ in pairs], [target for _, target in pairs])
    rows = [
        Row(f"{source}: new items", n - n_old, "items"),
        Row(f"{source}: people who took a new item", len(asked.targets), "people"),
    ]
    genres = np.tile(by_genre(whole, counts, n_old), (len(asked.targets), 1))
    for words, among in (("among all items", None), ("among the new items", fresh)):
        base = gains(genres, asked, among)
        rows += estimate(f"{source}: popularity by genre, new items {words}", base)
        for kind, (config, params) in models.items():
            value = gains(scores_of(config, params, n, asked), asked, among)
            head = f"{source}: {kind}, new items {words}"
            rows += estimate(head, value)
            if kind == "text_transformer":
                bound = round(TIMES * float(base.mean()), 5)
                rows.append(
                    setting.judge(f"{head}, against {TIMES:g} times by genre", float(value.mean()), UNIT, ">=", bound)
                )
    return rows


def by_genre(whole: Dataset, counts: NDArray[np.int64], n_old: int) -> NDArray[np.float32]:
    """Return [n] how often an old item of each item's genres was taken on average, mean over its genres."""
    tags = whole.catalog.attribute_matrix
    taken = tags[:n_old].T @ counts[:n_old] / np.maximum(tags[:n_old].sum(0), 1.0)
    return np.asarray((tags @ taken) / np.maximum(tags.sum(1), 1.0), np.float32)


def _new_people(
    source: str,
    whole: Dataset,
    away: NDArray[np.int64],
    n_old: int,
    model: tuple[Any, Params],
    counts: NDArray[np.int64],
    setting: Setting,
) -> list[Row]:
    """Ask people who never took part for their next old item, when they took 1, 3, 5 and 10 of them."""
    histories = [[item for item in whole.log.history(int(user)).tolist() if item < n_old] for user in away]
    histories = [own for own in histories if len(own) > max(NEW_PEOPLE)]
    old, rows = np.arange(n_old), [Row(f"{source}: new people", len(histories), "people")]
    for n in NEW_PEOPLE:
        asked = Questions([own[:n] for own in histories], [own[n] for own in histories])
        popular = gains(np.tile(counts.astype(np.float32), (len(histories), 1)), asked, old)
        value = gains(scores_of(*model, len(whole.catalog), asked), asked, old)
        words = f"{source}: text_transformer, new people after {n}"
        rows += estimate(f"{source}: popularity, new people after {n}", popular)
        rows += estimate(words, value)
        bound = round(float(popular.mean()), 5)
        rows.append(setting.judge(f"{words}, against popularity", float(value.mean()), UNIT, ">=", bound))
    return rows


def newest_last(dataset: Dataset) -> Dataset:
    """Return the items that anybody took, in the order of the year in their title: of ML-1M no times are known here."""
    taken = np.flatnonzero(np.bincount(dataset.log.item, minlength=len(dataset.catalog)))
    year = np.array([_year(dataset.catalog.titles[item]) for item in taken])
    order = taken[np.argsort(year, kind="stable")]
    number = np.zeros(len(dataset.catalog), np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    catalog = replace(
        dataset.catalog,
        ids=tuple(dataset.catalog.ids[i] for i in order),
        titles=tuple(dataset.catalog.titles[i] for i in order),
        attributes=tuple(dataset.catalog.attributes[i] for i in order),
        first_seen=np.zeros(len(order), np.int64),
    )
    return replace(dataset, log=replace(dataset.log, item=number[dataset.log.item]), catalog=catalog)


def _year(title: str) -> int:
    text = title.rstrip()[-5:-1]
    return int(text) if text.isdigit() else 0


def _without(whole: Dataset, stay: NDArray[np.int64], n_old: int) -> Dataset:
    """Return what these people did with the first `n_old` items."""
    log = whole.log.take_users(stay)
    kept = log.item < n_old
    users = np.repeat(np.arange(log.n_users), log.counts)[kept]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(users, minlength=log.n_users))]).astype(np.int64)
    left = InteractionLog(
        offsets, log.item[kept], log.time[kept], log.event[kept], log.value[kept], log.user_ids, log.event_kinds
    )
    return replace(whole, log=left.take_users(np.flatnonzero(left.counts >= 3)), catalog=whole.catalog.prefix(n_old))
