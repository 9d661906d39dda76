"""The heat map of a life: every release on the test of every slice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedrec.evaluation.continual import matrix, measure
from fedrec.evaluation.plots import Plot, new_figure, to_svg
from fedrec.evaluation.words import Record, metric_name, pick_metric, score

PARTS = {
    "returning": "People who were there before a slice",
    "new": "People who came with it",
    "new_items": "Items that came with it",
}


def life_plot(releases: Sequence[Record]) -> Plot | None:
    """Return the heat map of releases by tests and what it comes to; None where nothing was held back for it."""
    metric = pick_metric(releases, "ndcg")
    a = matrix(releases, metric or "")
    if metric is None or len(a) < 2 or a.shape[0] != a.shape[1] or np.isnan(a).all():
        return None
    figure = new_figure((6.0, 4.4))
    ax = figure.subplots()
    ax.imshow(a, cmap="Blues", vmin=0.0)
    middle = float(np.nanmax(a)) / 2
    for (i, j), value in np.ndenumerate(a):
        text = "" if np.isnan(value) else score(float(value))
        ax.annotate(text, (j, i), ha="center", va="center", color="white" if value > middle else "black")
    slices = [str(release.get("slice")) for release in releases]
    ax.set_xticks(range(len(slices)), slices)
    ax.set_yticks(range(len(slices)), slices)
    ax.set_xlabel("Tested on slice")
    ax.set_ylabel("Trained up to slice")
    life = measure(a)
    words = (
        f"Learning average {score(life.learning)}, retained average {score(life.retained)}, harmonic mean "
        f"{score(life.harmonic)}; forgetting {score(life.forgetting)}, backward transfer {life.backward:+.3f}, before "
        f"it is learnt a slice is served at {score(life.forward)}."
    )
    caption = f"{metric_name(metric)} of each release on what every slice held back. {words}{_parts(releases, metric)}"
    return Plot("life", "What is learnt and what is retained", caption, to_svg(figure, "life", caption))


def _parts(releases: Sequence[Record], metric: str) -> str:
    """Return what the life is worth to people and items that were new in a slice, and to those that were not."""
    found = ""
    for group, what in PARTS.items():
        a = matrix(releases, metric, group)
        if a.shape[0] == a.shape[1] and not np.isnan(np.diag(a)).all():
            life = measure(a)
            found += f" {what}: learning {score(life.learning)}, retained {score(life.retained)}."
    return found
