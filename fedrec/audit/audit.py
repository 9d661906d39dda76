"""`fedrec audit`: every attack on one experiment, as one document that sets what was claimed beside what was found."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fedrec import __version__
from fedrec.audit.life import auditable
from fedrec.audit.membership import attack
from fedrec.audit.one_run import Recording, canary_bound, measured_epsilon, record, repeated_noise, scores
from fedrec.audit.uploads import touched
from fedrec.client.pool import LogPool
from fedrec.config import Experiment
from fedrec.data.cleaning import Dataset
from fedrec.privacy.events import MatrixEvent
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.settings import UserLevelPrivacy
from fedrec.random import Key
from fedrec.server.run import check, cut
from fedrec.server.work import Observer

DELTA = 1e-5
"""At which delta something is measured of a run that claims nothing."""
BOUNDS = 3
"""How many bounds an audit sets beside the claim; each is held to its part of the confidence."""
BINS = 40
LONGEST = 1.001
"""A real contribution may be this many clip norms long, for float32."""


class AuditSettings(BaseModel):
    """How hard to attack."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    canaries: int = Field(default=1000, ge=10)
    """How many people who do not exist are drawn in or out of the run by a coin."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Probability with which an audit of a run that keeps its claim says that it does."""
    shadows: int = Field(default=0, ge=0)
    """How many further runs calibrate the attack on membership."""
    people: int = Field(default=50, ge=2)
    """Of how many people the single uploads are looked at."""
    seed: int = 0
    """Decides who the canaries and the members are."""

    @property
    def lives(self) -> int:
        """How often the experiment is played."""
        return 2 + self.shadows


def audit(
    experiment: Experiment,
    dataset: Dataset,
    settings: AuditSettings | None = None,
    *,
    command: str = "",
    observe: Observer = lambda event: None,
) -> dict[str, Any]:
    """Attack an experiment and return all findings as one JSON-able document.

    Args:
        experiment: what to audit; its planned life is played `AuditSettings.lives` times.
        dataset: the real people.
        settings: how hard to attack.
        command: what the user typed, for the page.
        observe: is told what happens.

    Returns:
        ``holds``: whether no bound passed the claim, None where nothing is claimed; ``bounds``: one row each with
        ``claimed``, ``audited`` (None and ``unbounded`` where no noise was found at all) and ``exceeded``;
        ``membership``, ``uploads``; ``scores``: histograms of the canaries; ``claim``; ``verdict`` in words.

    Raises:
        FedrecError: the experiment has a mode that cannot be attacked, or cannot be run.
    """
    import torch

    settings = settings or AuditSettings()
    auditable(experiment)
    check(experiment, dataset)
    torch.set_num_threads(experiment.runtime.threads)
    slices = cut(experiment, dataset)
    key = Key.from_seed(settings.seed).child("audit")
    claim = experiment.privacy if isinstance(experiment.privacy, UserLevelPrivacy) else None
    delta = claim.delta if claim else DELTA
    each = 1.0 - (1.0 - settings.confidence) / BOUNDS
    found = record(experiment, dataset, slices, settings.canaries, key.child("canaries"), observe)
    ledger = found.life.ledger
    claimed = None if ledger is None else ledger.spent()
    blind = attack(experiment, dataset, slices, delta, each, key.child("membership"), observe, settings.shadows)
    guessed = canary_bound(found.heard, found.included, delta, each)
    measured = measured_epsilon(found.heard, found.included, delta, each)
    bounds = [
        _row("canaries", guessed.epsilon, claimed, each, asdict(guessed)),
        _row("noise", measured, claimed, each, {"releases": len(found.heard)}),
        _row("people", blind.bound.epsilon, claimed, each, asdict(blind.bound)),
    ]
    twice = repeated_noise(found.heard)
    uploads = _uploads(experiment, dataset, found, settings, key.child("uploads"))
    longest = max((row["longest"] or 0.0 for row in uploads), default=0.0)
    broken = bool(twice) or longest > LONGEST or any(row["exceeded"] for row in bounds)
    holds = None if claimed is None else not broken
    document: dict[str, Any] = {
        "fedrec": __version__,
        "name": experiment.name,
        "command": command,
        "experiment_digest": experiment.digest(),
        "data": {"name": dataset.name, "digest": dataset.log.digest(), "n_users": dataset.log.n_users},
        "settings": settings.model_dump(mode="json"),
        "claim": {
            "mode": experiment.privacy.mode,
            "unit": "user",
            "adjacency": "add or remove one person",
            "epsilon": claimed,
            "delta": delta,
        },
        "holds": holds,
        "bounds": bounds,
        "repeated_noise": twice,
        "unheard": list(found.unheard),
        "membership": {"person": asdict(blind.person), "interaction": asdict(blind.interaction)},
        "uploads": uploads,
        "longest": longest,
        "scores": _histogram(scores(found.heard, settings.canaries), found.included),
    }
    return document | {"verdict": verdict(document)}


def _row(
    name: str, audited: float | None, claimed: float | None, confidence: float, detail: dict[str, Any]
) -> dict[str, Any]:
    unbounded = audited is not None and math.isinf(audited)
    return {
        "attack": name,
        "claimed": claimed,
        "audited": None if unbounded else audited,
        "unbounded": unbounded,
        "confidence": confidence,
        "exceeded": claimed is not None and audited is not None and audited > claimed,
        "detail": detail,
    }


def _uploads(
    experiment: Experiment, dataset: Dataset, found: Recording, settings: AuditSettings, key: Key
) -> list[dict[str, Any]]:
    """Attack single uploads to the first plan of each kind of task."""
    pool = LogPool(dataset.log, dataset.catalog, engine=experiment.runtime.engine)
    rows: list[dict[str, Any]] = []
    for task, plan in found.plans.items():
        heard = next((one for one in found.heard if one.task == task), None)
        if heard is None or task == "evaluate":  # metrics tell of no items
            continue
        event = heard.event
        noise = 0.0 if event is None else event.noise_multiplier
        if isinstance(event, MatrixEvent):  # a round alone
            noise *= event.sensitivity
        mechanism = GaussianMechanism(heard.clip_norm, noise) if noise else None
        masked = experiment.privacy.mode == "distributed"
        rows += [asdict(leak) for leak in touched(pool, plan, mechanism, settings.people, key.child(task), masked)]
    return rows


def _histogram(scored: NDArray[np.float64], included: NDArray[np.bool_]) -> dict[str, Any]:
    """Return how many canaries of either side have which score; the outermost hundredths share the outer bins."""
    low, high = np.quantile(scored, [0.01, 0.99])
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    inside = np.clip(scored, edges[0], edges[-1])
    sides = {name: np.histogram(inside[who], edges)[0].tolist() for name, who in (("in", included), ("out", ~included))}
    return {"edges": edges.tolist(), **sides}


def verdict(document: dict[str, Any]) -> str:
    """Return in words what an audit found."""
    claim, bounds = document["claim"], document["bounds"]
    if claim["epsilon"] is None:
        return (
            "LEAKING: this run claims no privacy, and has none. Whoever receives the exact sums and knows everybody "
            f"else tells {bounds[0]['detail']['correct']:,} of {bounds[0]['detail']['guesses']:,} canaries rightly, "
            f"which proves epsilon {bounds[0]['audited']:.2f} at least; so many canaries can show "
            f"{bounds[0]['detail']['ceiling']:.2f} at most, however bare a run is."
        )
    told = f"the claim of epsilon {claim['epsilon']:.3f} at delta {claim['delta']:g}"
    if document["repeated_noise"]:
        first, second = document["repeated_noise"]
        return f"BROKEN: '{first}' and '{second}' have the same noise, so {told} does not hold."
    if document["longest"] > LONGEST:
        return f"BROKEN: a person's contribution has {document['longest']:.4g} times the norm that {told} rests on."
    worst = [row for row in bounds if row["exceeded"]]
    if worst:
        shown = ", ".join(f"{row['attack']} {_epsilon(row)}" for row in worst)
        return f"BROKEN: {told} does not hold; audited with confidence {document['settings']['confidence']:g}: {shown}."
    left = f" Not attacked: {len(document['unheard'])} of the releases that were paid." if document["unheard"] else ""
    return (
        f"No attack passed {told}. An audit can refute a claim, it cannot prove one: with so many canaries no attack "
        f"without assumptions could have shown more than {bounds[0]['detail']['ceiling']:.2f}.{left}"
    )


def _epsilon(row: dict[str, Any]) -> str:
    return "without bound" if row["unbounded"] else f"at least {row['audited']:.3f}"
