"""The main job and the command line: how long a person waits."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Row, claim, progress, run
from fedrec.config import Experiment
from fedrec.data.sources import load_dataset
from fedrec.grid.simulate import simulate
from fedrec.learning import StageConfig

IMPORT = [sys.executable, "-c", "import fedrec"]
NOTHING = [sys.executable, "-c", "pass"]
HELP = [sys.executable, "-c", "import sys; sys.argv = ['fedrec', '--help']; from fedrec.cli import main; main()"]


def measure(quick: bool) -> list[Row]:
    """Time starts of the process (median of several, interleaved) and one whole main job."""
    experiment = Experiment.find("quickstart")
    if quick:
        short = {"base": StageConfig(rounds=10), "later": StageConfig(rounds=5)}
        experiment = experiment.model_copy(update={"training": experiment.training.model_copy(update=short)})
    starts: dict[str, list[float]] = {"nothing": [], "import": [], "help": []}
    for _ in progress(range(3 if quick else 15), "process starts"):
        for name, command in (("nothing", NOTHING), ("import", IMPORT), ("help", HELP)):
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            starts[name].append(time.perf_counter() - began)
    dataset = load_dataset(experiment.data.source, say=lambda note: print(note, file=sys.stderr))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        document, _ = simulate(experiment, runs=Path(folder), registry=Path(folder) / "registry", dataset=dataset)
        whole = time.perf_counter() - began
    median = {name: sorted(times)[len(times) // 2] for name, times in starts.items()}
    last = document["releases"][-1]["rows"]
    return [
        claim("import fedrec, beyond an empty Python", median["import"] - median["nothing"], "s", "<=", 0.2),
        claim("fedrec --help, the whole process", median["help"], "s", "<=", 0.7),
        claim("main job, data at hand", whole, "s", "<=", 180),
        Row("last release", last["release"]["all"]["metrics"]["ndcg@10"]["value"], "NDCG@10"),
        Row("popularity then", last["popularity"]["all"]["metrics"]["ndcg@10"]["value"], "NDCG@10"),
        Row("local-only then", last["local_only"]["all"]["metrics"]["ndcg@10"]["value"], "NDCG@10"),
    ]


if __name__ == "__main__":
    raise SystemExit(run("main_job", __doc__ or "", measure))
