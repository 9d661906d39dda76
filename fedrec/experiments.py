"""The verbs of whoever runs experiments: simulate, pretrain, audit, evaluate."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedrec.errors import need

if TYPE_CHECKING:
    from fedrec.config import Experiment

RegistryOption = Annotated[
    Path, typer.Option("--registry", envvar="FEDREC_REGISTRY", help="Folder of the registry of releases.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def simulate(
    experiment: Annotated[
        str, typer.Argument(help="TOML file, or the name of an experiment that comes with fedrec.")
    ] = "quickstart",
    out: Annotated[Path, typer.Option("--out", help="Root of run folders.")] = Path("runs"),
    registry: RegistryOption = Path("runs/registry"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest unfinished run.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Use this seed instead of the experiment's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run an experiment: a lifelong federated run with progress, report (HTML and JSON) and a registry of releases."""
    from rich.console import Console

    from fedrec.config import Experiment

    settings = Experiment.find(experiment)
    if seed is not None:
        settings = settings.model_copy(update={"seed": seed})
    need("torch", "flwr")
    from fedrec.evaluation.report import print_table
    from fedrec.grid.simulate import simulate as run
    from fedrec.progress import RunProgress

    notes = Console(stderr=True)
    with RunProgress(notes, settings.n_slices, _expected(settings)) as bars:
        document, folder = run(
            settings,
            runs=out,
            registry=registry,
            resume=resume,
            command=shlex.join(["fedrec", *sys.argv[1:]]),
            observe=bars.observe,
            say=lambda note: notes.print(note, highlight=False, markup=False),
        )
    if as_json:
        print(json.dumps(document))
        return
    console = Console()
    print_table(document, console)
    print(f"Report:   {folder / 'report.html'}\nRegistry: {registry}")


def pretrain(
    experiment: Annotated[str, typer.Argument(help="TOML file, or the name of an experiment that comes with fedrec.")],
    registry: RegistryOption = Path("runs/registry"),
    as_json: JsonOption = False,
) -> None:
    """Train a model of sequences centrally on public data: a release that `[start]` elsewhere begins from."""
    from rich.console import Console
    from rich.progress import Progress

    from fedrec.config import Experiment

    settings = Experiment.find(experiment)
    need("torch")
    from fedrec.data.sources import load_dataset
    from fedrec.server.pretrain import pretrain as train
    from fedrec.server.registry import Registry

    notes = Console(stderr=True)
    dataset = load_dataset(settings.data.source, say=lambda note: notes.print(note, highlight=False, markup=False))
    with Progress(console=notes) as bars:
        task = bars.add_task("steps", total=settings.training.base.rounds)
        release = train(settings, dataset, Registry(registry), lambda step, loss: bars.update(task, completed=step + 1))
    if as_json:
        print(json.dumps({"release": release.version, "registry": str(registry), "n_items": release.manifest.n_items}))
        return
    print(f'Release {release.version} in {registry}; begin from it with:\n[start]\nregistry = "{registry}"')


def audit(
    experiment: Annotated[str, typer.Argument(help="TOML file, or the name of an experiment that comes with fedrec.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder for audit.json and audit.html.")] = None,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", help="Audit the experiment at this budget instead of its own.")
    ] = None,
    canaries: Annotated[int, typer.Option("--canaries", min=10, help="How many canary clients.")] = 1000,
    confidence: Annotated[
        float, typer.Option("--confidence", min=0.5, max=0.9999, help="Of all bounds together.")
    ] = 0.95,
    shadows: Annotated[
        int, typer.Option("--shadows", min=0, help="Further runs that calibrate the attack on membership.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Decides who the canaries and the members are.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Attack an experiment in simulation; print the claim beside what was found, exit with 1 if it is broken."""
    from rich.console import Console

    from fedrec.config import Experiment

    settings = Experiment.find(experiment)
    need("torch", "flwr")
    from fedrec.audit.audit import AuditSettings
    from fedrec.audit.audit import audit as attack
    from fedrec.data.sources import load_dataset
    from fedrec.evaluation.audit_page import print_audit, write_audit
    from fedrec.progress import RunProgress
    from fedrec.server.privacy_commands import wanted

    if epsilon is not None:
        settings = wanted(settings, epsilon, None, False)
    how = AuditSettings(canaries=canaries, confidence=confidence, shadows=shadows, seed=seed)
    notes = Console(stderr=True)
    dataset = load_dataset(settings.data.source, say=lambda note: notes.print(note, highlight=False, markup=False))
    with RunProgress(notes, settings.n_slices * how.lives, _expected(settings)) as bars:
        command = shlex.join(["fedrec", *sys.argv[1:]])
        document = attack(settings, dataset, how, command=command, observe=bars.observe)
    page = None if out is None else write_audit(document, out)
    if as_json:
        print(json.dumps(document))
    else:
        print_audit(document, Console())
        if page is not None:
            print(f"Page: {page}")
    if document["holds"] is False:
        raise typer.Exit(1)


def evaluate(
    release: Annotated[str, typer.Argument(help="A version, 'latest' (the promoted one) or 'newest'.")] = "latest",
    data: Annotated[
        str | None, typer.Option("--data", help="A data set or a folder of `fedrec data import`, instead of the run's.")
    ] = None,
    index: Annotated[
        int | None, typer.Option("--slice", help="The slice whose test is asked, instead of the release's own.")
    ] = None,
    student: Annotated[bool, typer.Option("--student", help="Judge the release's small student as well.")] = False,
    registry: RegistryOption = Path("runs/registry"),
    as_json: JsonOption = False,
) -> None:
    """Judge a release on data of this machine: full ranking, everything known left out, popularity beside it."""
    need("torch", "flwr")
    from rich.console import Console

    from fedrec.evaluation.tables import print_evaluation
    from fedrec.grid.evaluate import evaluate as judge
    from fedrec.server.registry import Registry

    notes = Console(stderr=True)
    loaded = Registry(registry).load(int(release) if release.isdecimal() else release)
    with notes.status("evaluating"):
        document = judge(
            loaded, source=data, index=index, student=student,
            say=lambda note: notes.print(note, highlight=False, markup=False),
        )  # fmt: skip
    if as_json:
        print(json.dumps(document))
    else:
        print_evaluation(document, Console())


def _expected(experiment: Experiment) -> float:
    """Return how many clients a round asks for, as far as the experiment says."""
    from fedrec.learning import FixedCohort, PoissonCohort

    cohort = experiment.training.cohort
    if isinstance(cohort, PoissonCohort):
        return cohort.expected
    return cohort.size if isinstance(cohort, FixedCohort) else float("inf")  # of turns: everybody is asked
