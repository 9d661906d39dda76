"""The end of a slice: the release is written, and the state moves on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedrec import params as named
from fedrec.config import EvaluationConfig, Experiment
from fedrec.privacy.settings import LocalPrivacy
from fedrec.protocol.codec import Plain
from fedrec.server.adopt import release_of
from fedrec.server.guard import Guard, statement
from fedrec.server.local import local_statement
from fedrec.server.round import Recipe
from fedrec.server.work import Event, Work

PRIVACY = {
    "statement": "Not private: no noise is added. Clients send the exact sums of their updates, counts and metrics.",
    "unit": "user",
    "epsilon": None,
    "delta": None,
}
"""What a run without a lossy or telling codec says."""


def privacy(experiment: Experiment, guard: Guard | None = None) -> dict[str, Any]:
    """Return the privacy statement of an experiment: what is protected, what was spent, what the codec gives away."""
    if guard is not None:
        return statement(guard)
    if isinstance(experiment.privacy, LocalPrivacy):
        return local_statement(experiment.privacy)
    codec = experiment.training.codec
    if isinstance(codec, Plain):
        return dict(PRIVACY)
    words = (
        "Not private: no noise is added. Clients send the sums of their updates as the codec "
        f"'{codec.kind}' writes them, which hides nothing, and the exact sums of their counts and metrics."
    )
    return {**PRIVACY, "statement": f"{words} {codec.reveals}".rstrip()}


def publish(work: Work) -> Work:
    """Write the release, move the state on to the next slice, and store it."""
    state, time_slice, recipe, verdict = work.state, work.time_slice, work.recipe, work.verdict
    experiment = recipe.experiment
    promoted = worth_promoting(verdict["rows"], experiment.evaluation)
    params = release_of(state, experiment.model)
    release = work.desk.registry.publish(
        params,
        work.desk.catalog.prefix(time_slice.n_items),
        run=state.run,
        slice=time_slice.index,
        parent=state.parent,
        model=experiment.model.model_dump(mode="json"),
        experiment=experiment.model_dump(mode="json", exclude={"runtime"}),
        experiment_digest=experiment.digest(),
        metrics=verdict["rows"],
        privacy=privacy(experiment, recipe.guard),
        lesson=dict(state.lesson) or None,
        student=work.student,
        promote=promoted,
    )
    own = [record for record in state.rounds if record["slice"] == time_slice.index]
    record = {
        "version": release.version,
        "slice": time_slice.index,
        "digest": release.manifest.sha256,
        "parent": state.parent,
        "promoted": promoted,
        "n_items": time_slice.n_items,
        "train_rows": round(float(state.counts["counts"].sum())) - sum(r["train_rows"] for r in state.releases),
        "train_start": getattr(time_slice.train, "start", None),
        "train_end": getattr(time_slice.train, "end", None),
        "test_end": getattr(time_slice.test, "end", None),
        "rounds": len(own),
        "seconds": round(sum(r["seconds"] for r in own), 3),
        "bytes_down": sum(r["bytes_down"] for r in own),
        "bytes_up": sum(r["bytes_up"] for r in own),
        "client_bytes": named.n_bytes(params),
        "adoption": dict(state.adoption) or None,
        "lesson": dict(state.lesson) or None,
        "student": None if work.student is None else work.student.facts,
        **work.facts,
        "overhead": {name: spent + verdict[name] for name, spent in state.overhead.items()},
        "refused": verdict["refused"],
        "epsilon": _spent(recipe),
        "rows": verdict["rows"],
        "differences": verdict["differences"],
        "life": verdict.get("life", []),
    }
    moved = state.advanced(slice=time_slice.index + 1, round=0, releases=(*state.releases, record))
    if promoted or state.parent is None:
        moved = moved.advanced(parent=release.version)
    else:  # What did harm is not built upon; counts and statistics are sums over all slices, and stay.
        moved = moved.advanced(params=state.anchor, average={}, memory={})
    work.desk.checkpoint(moved)
    work.desk.observe(Event("release", record))
    return replace(work, state=moved, release=release)


def _spent(recipe: Recipe) -> float | None:
    """Return the epsilon spent so far; in mode "local" the most that any client can have spent."""
    if recipe.guard is not None:
        return recipe.guard.ledger.spent()
    return None if recipe.local is None else recipe.local.settings.epsilon


def worth_promoting(rows: Mapping[str, Any], settings: EvaluationConfig) -> bool:
    """Return whether a release is no worse than its parent, beyond the margin, on the same test.

    Args:
        rows: those of the verdict; without "previous" there is nothing to be worse than.
        settings: holds the margin.
    """
    name, margin = f"ndcg@{settings.ks[0]}", settings.promotion_margin
    found = [rows.get(row, {}).get("all", {}).get("metrics", {}).get(name) for row in ("release", "previous")]
    if margin is None or None in found:
        return True
    own, parent = (float(one["value"]) for one in found)
    return own >= (1.0 - margin) * parent
