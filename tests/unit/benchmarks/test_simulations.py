"""The experiments that come with fedrec are those of the benchmark's rows."""

from __future__ import annotations

import pytest

from benchmarks.life_rows import PRIVATE, VARIANTS, fitted, ours, retrained, spectral
from benchmarks.lives import experiment_of, laid_over
from fedrec.config import Experiment, simulations_folder

ROWS = {
    "lifelong_ours": ours("f3crec"),
    "lifelong_ours_movietweetings": ours("movietweetings"),
    "lifelong_ours_amazon_video": ours("amazon-video"),
    "lifelong_retrained": retrained(ours("f3crec")),
    "lifelong_ml100k": spectral("f3crec"),
    "lifelong_fine_tune": laid_over(fitted("f3crec"), {"training": VARIANTS["fine-tune"]}),
    "lifelong_f3crec": laid_over(fitted("f3crec"), {"training": VARIANTS["F3CRec's method"]}),
    "lifelong_ewc": laid_over(fitted("f3crec"), {"training": VARIANTS["EWC"]}),
    "lifelong_private": laid_over(spectral("movietweetings"), PRIVATE),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bundled_life_is_a_row_of_the_benchmark(name: str) -> None:
    bundled = Experiment.load(simulations_folder() / f"{name}.toml")
    row = experiment_of(ROWS[name], 1)
    for part in ("model", "training", "privacy", "split"):
        assert getattr(bundled, part) == getattr(row, part), part
