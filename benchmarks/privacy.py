"""Quality against epsilon: one round of private statistics, user level, central mode, leave-one-out, full ranking."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Row, claim, progress, run, unclaimed
from benchmarks.private_statistics import DELTA, Bench, Choice
from fedrec.data.features import FeatureSettings, make_encoder
from fedrec.data.sources import load_dataset
from fedrec.errors import DataError
from fedrec.models.configs import SpectralConfig

SEEDS = (1, 2, 3, 4, 5)
EPSILONS = (8.0, 4.0, 2.0, 1.0)
PLOT = Path(__file__).parent / "results" / "privacy.png"
TARGETS = {
    "ml-1m": {8.0: 0.116, 4.0: 0.102, 2.0: 0.086, 1.0: 0.060},
    "ml-100k": {8.0: 0.082, 4.0: 0.070, 2.0: 0.063, 1.0: 0.055},
}


def _model(
    items: int,
    features: int,
    powers: tuple[float, float],
    weights: tuple[float, float],
    decays: tuple[float, float],
    caution: float = 1.0,
) -> SpectralConfig:
    """Return settings; `weights` are those of items (features have 1) and popularity, the rest is items first."""
    return SpectralConfig(
        item_rank=items,
        feature_rank=features,
        item_power=powers[0],
        feature_power=powers[1],
        item_weight=weights[0],
        popularity_weight=weights[1],
        decay=decays[0],
        feature_decay=decays[1],
        caution=caution,
    )


# Chosen on the validation item (the second to last) with noise of other seeds, on ML-100K also on the item before it;
# never on the test item. The search (by hand at first, then grids of some hundreds of settings a budget, one noise
# seed on ML-1M and at epsilon 8 and 4 on ML-100K, eight at 2 and 1) is not accounted for: the data is public.
WIDE = FeatureSettings(encoder="wordllama", rank=1024)
MIDDLE = FeatureSettings(encoder="wordllama", rank=512)
PLAIN = FeatureSettings(encoder="wordllama", rank=256, fourier=0)
CHOICES: dict[str, dict[float | None, Choice]] = {
    "ml-1m": {
        None: Choice((0.78, 0.2, 0.02), _model(2400, 1024, (0.35, 0.35), (2.0, 0.0), (0.7, 0.7)), WIDE),
        8.0: Choice((0.78, 0.2, 0.02), _model(300, 1024, (0.25, 0.5), (1.6, 0.0), (0.7, 0.8), 0.6), WIDE),
        4.0: Choice((0.75, 0.22, 0.03), _model(300, 1024, (0.25, 0.5), (1.0, 0.0), (0.7, 0.8), 0.6), WIDE),
        2.0: Choice((0.68, 0.29, 0.03), _model(200, 1024, (0.35, 0.5), (1.0, 0.0), (0.7, 0.8), 0.6), WIDE),
        1.0: Choice((0.0, 0.97, 0.03), _model(0, 1024, (0.5, 0.5), (1.0, 0.6), (0.8, 0.8)), WIDE),
    },
    "ml-100k": {
        None: Choice((0.78, 0.17, 0.05), _model(160, 512, (0.5, 0.5), (1.5, 0.3), (0.8, 0.8)), MIDDLE),
        8.0: Choice((0.75, 0.2, 0.05), _model(150, 256, (0.5, 0.5), (1.0, 0.0), (0.8, 0.8)), PLAIN),
        4.0: Choice((0.6, 0.3, 0.1), _model(150, 256, (0.35, 0.75), (1.0, 0.4), (0.9, 0.8)), PLAIN),
        2.0: Choice((0.4, 0.4, 0.2), _model(150, 256, (0.35, 0.5), (1.0, 0.5), (0.9, 0.8)), PLAIN),
        1.0: Choice((0.0, 0.7, 0.3), _model(0, 256, (1.0, 1.0), (1.0, 1.0), (0.8, 0.8)), PLAIN),
    },
}


def measure(quick: bool) -> list[Row]:
    """Measure every budget on both data sets, and draw the curves."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    try:
        make_encoder("wordllama")
    except DataError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return rows
    for name in ("ml-100k",) if quick else ("ml-100k", "ml-1m"):
        try:
            dataset = load_dataset(name, say=lambda note: print(note, file=sys.stderr))
        except DataError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        bench = Bench(dataset)
        rows += _measured(name, bench, SEEDS[:1] if quick else SEEDS, quick, curves.setdefault(name, {}))
    if not quick:
        _draw(curves)
    return rows


def _measured(
    name: str, bench: Bench, seeds: tuple[int, ...], quick: bool, curves: dict[str, list[tuple[float, float]]]
) -> list[Row]:
    reach, unit = unclaimed if quick else claim, "NDCG@10"
    rows = [
        Row(f"{name}: popularity, no privacy", bench.popularity(None, 0), unit),
        Row(f"{name}: spectral, no privacy", bench.spectral(CHOICES[name][None], None, 0), unit),
    ]
    for place in progress(range(len(EPSILONS)), f"{name}, budgets"):
        epsilon = EPSILONS[place]
        choice = CHOICES[name][epsilon]
        popular = [bench.popularity(epsilon, seed) for seed in seeds]
        scores = [bench.spectral(choice, epsilon, seed) for seed in seeds]
        curves.setdefault("popularity", []).append((epsilon, float(np.mean(popular))))
        curves.setdefault("spectral", []).append((epsilon, float(np.mean(scores))))
        head = f"{name}, epsilon {epsilon:g} at delta {DELTA:g}"
        rows += [
            reach(
                f"{head}: spectral, mean of {len(seeds)}", float(np.mean(scores)), unit, ">=", TARGETS[name][epsilon]
            ),
            Row(f"{head}: spectral, standard deviation over noise", float(np.std(scores)), unit),
            Row(f"{head}: spectral on the validation item", bench.spectral(choice, epsilon, 100, test=False), unit),
            Row(f"{head}: popularity, mean of {len(seeds)}", float(np.mean(popular)), unit),
        ]
    return rows


def _draw(curves: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, max(1, len(curves)), figsize=(5 * max(1, len(curves)), 3.6), squeeze=False)
    for axis, (name, lines) in zip(axes[0], curves.items(), strict=True):
        for label, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        axis.set(
            title=name, xscale="log", xlabel=f"epsilon (user level, delta {DELTA:g})", ylabel="NDCG@10, full ranking"
        )
        axis.minorticks_off()
        axis.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run("privacy", __doc__ or "", measure))
