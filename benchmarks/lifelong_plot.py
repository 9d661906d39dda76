"""Draws docs/lifelong.png from the results of the lifelong benchmark: ``python -m benchmarks.lifelong_plot``."""

from __future__ import annotations

import json
import math
from pathlib import Path

NAMES = {
    "f3crec": "F3CRec blocks of ML-100K",
    "movietweetings": "MovieTweetings",
    "amazon-video": "Amazon-Video",
}
ROWS = (
    "popularity", "frozen base", "fine-tune", "dropout fine-tune", "+ history-aware negatives", "L2 anchor", "EWC",
    "distillation on the client", "replay", "synthetic replay", "F3CRec's method", "full retraining",
    "cumulative statistic", "ours", "full retraining of ours",
)  # fmt: skip


def draw(results: Path, out: Path) -> None:
    """Draw learning and retained average of every row, a panel for each data set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4))
    panels = figure.subplots(1, len(NAMES), sharey=True)
    places = list(range(len(ROWS)))[::-1]
    for ax, (name, title) in zip(panels, NAMES.items(), strict=True):
        files = sorted(results.glob(f"lifelong-{name}*.json"))
        values = {row["what"]: row["value"] for file in files for row in json.loads(file.read_text("utf-8"))["rows"]}
        for part, marker in (("learning", "o"), ("retained", "s")):
            found = [values.get(f"{name}: {row}, {part} average", math.nan) for row in ROWS]
            ax.scatter(found, places, marker=marker, label=part)
        ax.set_yticks(places, ROWS)
        ax.set_title(title, fontsize=10)
        ax.grid(axis="x", alpha=0.3)
        ax.set_xlim(left=0)
        ax.set_xlabel("NDCG@20")
    panels[0].legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    here = Path(__file__).parent
    draw(here / "results", here.parent / "docs" / "lifelong.png")
