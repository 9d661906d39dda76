"""Draws quality against epsilon from the results of the privacy benchmark: ``python -m benchmarks.privacy_plot``."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.privacy import DATASETS, EPSILONS, HALF, TARGETS
from benchmarks.private_statistics import DELTA

PRIVATE = ("spectral", "combination", "DP-FedAvg transformer", "popularity")
EXACT = ("spectral", "federated transformer", "EASE, centralised", "popularity", "local-only, 200 people")
COLOURS = {name: f"C{number}" for number, name in enumerate(dict.fromkeys((*PRIVATE, *EXACT)))}


def values_of(results: Path, name: str) -> dict[str, float]:
    """Return every figure of a data set by its words, from all parts that are there."""
    documents = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob(f"privacy-{name}-*.json"))]
    return {row["what"]: row["value"] for document in documents for row in document["rows"]}


def paint(ax: Axes, name: str, values: dict[str, float]) -> None:
    """Draw one data set: curves with their intervals over seeds, and what is reached without noise as lines."""
    for what in PRIVATE:
        heads = {epsilon: f"{name}, epsilon {epsilon:g}: {what}" for epsilon in reversed(EPSILONS)}
        known = {epsilon: head for epsilon, head in heads.items() if head in values}
        widths = [
            next((width for words, width in values.items() if words.startswith(f"{head}, {HALF}")), 0.0)
            for head in known.values()
        ]
        means = [values[head] for head in known.values()]
        ax.errorbar(list(known), means, yerr=widths, marker="o", capsize=3, color=COLOURS[what], label=what)
    for what in EXACT:
        exact = values.get(f"{name}, no privacy: {what}")
        if exact is not None:
            told = f"{what}, no privacy: {exact:.3f}"
            ax.axhline(exact, color=COLOURS[what], linestyle=":", linewidth=1.2, label=told)
    ax.plot(*zip(*sorted(TARGETS[name].items()), strict=True), "k_", markersize=14, label="target")
    ax.set(title=name, xscale="log", xlabel=f"epsilon (user level, delta {DELTA:g})", ylabel="NDCG@10, full ranking")
    ax.minorticks_off()
    ax.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=2, frameon=False)


def draw(results: Path, out: Path) -> None:
    """Draw a panel for each data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5))
    for ax, name in zip(figure.subplots(1, len(DATASETS)), DATASETS, strict=True):
        paint(ax, name, values_of(results, name))
    figure.tight_layout()
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    here = Path(__file__).parent
    draw(here / "results", here.parent / "docs" / "privacy.png")
