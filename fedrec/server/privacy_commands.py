"""`fedrec privacy`: plan what a life will cost, and show what a run has spent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedrec.config import Experiment

app = typer.Typer(no_args_is_help=True, help="Plan a privacy budget, show a ledger.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@app.command()
def plan(
    experiment: Annotated[str, typer.Argument(help="TOML file, or the name of an experiment that comes with fedrec.")],
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", help="Find the noise for this budget instead of the experiment's.")
    ] = None,
    delta: Annotated[float | None, typer.Option("--delta", help="Instead of the experiment's.")] = None,
    population: Annotated[
        int | None, typer.Option("--population", min=1, help="Public number of people; None: counted in the data.")
    ] = None,
    as_given: Annotated[
        bool, typer.Option("--as-given", help="Tell the epsilon of the noise as the experiment gives it, unscaled.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Beside it: a fresh budget for every slice, and equal parts of one.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what the planned life of an experiment spends, release by release, and with how much noise."""
    from fedrec.config import Experiment

    settings = wanted(Experiment.find(experiment), epsilon, delta, as_given)
    document = plan_document(settings, population)
    if compare:
        document["ways"] = ways(settings, population)
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    rows = [
        (row["purpose"], f"{row['noise_multiplier']:.3f}", f"{row['sampling']:.4f}", str(row["count"]))
        for row in document["events"]
    ]
    _table("Planned releases", ("what", "noise multiplier", "sampling", "times"), rows)
    typer.echo(
        f"In all: epsilon {document['epsilon']:.4f} (privacy loss distributions; RDP {document['epsilon_rdp']:.4f}) at "
        f"delta {document['delta']:g}, budget {document['budget']:g}; unit: {document['unit']}, "
        f"{document['adjacency']}; {_people(document)}"
    )
    if compare:
        _table(
            f"Ways to spend over {settings.n_slices} slices",
            ("way", "factor on the noise", "epsilon it names", "epsilon of the whole life"),
            [
                (way["way"], f"{way['scale']:.3f}", f"{way['named']:.4f}", f"{way['epsilon']:.4f}")
                for way in document["ways"]
            ],
        )
        typer.echo(
            "A budget that is renewed for every slice names a small epsilon and spends the large one: somebody who is "
            "there all life long is in every slice."
        )
    if document["warning"]:
        typer.echo(document["warning"], err=True)


def _people(document: dict[str, Any]) -> str:
    if document["population"] is None:
        return "what one client spends if it takes part as often as planned, by a ledger of its own."
    first, later = document["population"]
    return f"{first:,} people in the first slice, {later:,} in later ones."


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its ledger.")],
    as_json: AsJson = False,
) -> None:
    """Print the ledger of a run: every release that was paid for, and what is left."""
    from fedrec.privacy.ledger import PrivacyLedger
    from fedrec.server.run import LEDGER

    path = run / LEDGER if run.is_dir() else run
    ledger = PrivacyLedger.read(path)
    document = {
        "ledger": str(path),
        "unit": ledger.unit,
        "adjacency": ledger.adjacency,
        "delta": ledger.delta,
        "budget": ledger.budget,
        "spent": ledger.spent(),
        "entries": [entry.model_dump(mode="json") for entry in ledger.entries()],
    }
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    rows = [
        (str(e.number), e.name, str(e.attempt), json.dumps(e.event.model_dump(mode="json", exclude={"kind"})))
        for e in ledger.entries()
    ]
    _table(f"Ledger {path}", ("", "what", "attempt", "event"), rows)
    budget = "no budget" if ledger.budget is None else f"budget {ledger.budget:g}"
    typer.echo(f"Spent: epsilon {document['spent']:.4f} at delta {ledger.delta:g} ({budget}); unit: {ledger.unit}.")


def wanted(experiment: Experiment, epsilon: float | None, delta: float | None, as_given: bool) -> Experiment:
    """Return the experiment with the privacy that was asked for on the command line.

    Raises:
        PrivacyError: it has none, and no epsilon was given.
    """
    from fedrec.config import Experiment
    from fedrec.errors import PrivacyError

    document = experiment.model_dump(mode="json", exclude_unset=True)
    privacy: dict[str, Any] = dict(document.get("privacy") or {})
    if experiment.privacy.mode == "none":
        if epsilon is None:
            raise PrivacyError("The experiment is not private; give --epsilon to plan a private one.")
        privacy = {"mode": "central"}
    if epsilon is not None:
        privacy["epsilon"] = epsilon
    if delta is not None:
        privacy["delta"] = delta
    if as_given:
        privacy["calibrate"] = False
    return Experiment.parse({**document, "privacy": privacy}, "the plan")


def plan_document(experiment: Experiment, population: int | None) -> dict[str, Any]:
    """Return the planned life as one document."""
    from fedrec.privacy.accounting import check_delta, epsilon
    from fedrec.server.guard import calibrated, planned, populations, user_level
    from fedrec.server.local import local_plan

    if experiment.privacy.mode == "local":
        return local_plan(experiment, population)
    settings = user_level(experiment)
    people = populations(settings, population or settings.population or _counted(experiment))
    scale = calibrated(experiment, people)
    life = planned(experiment, people, scale)
    events = [event for _, event in life]
    return {
        "experiment": experiment.name,
        "unit": "user",
        "adjacency": "add or remove one person",
        "budget": settings.epsilon,
        "delta": settings.delta,
        "population": list(people),
        "scale": scale,
        "epsilon": epsilon(events, settings.delta),
        "epsilon_rdp": epsilon(events, settings.delta, "rdp"),
        "warning": check_delta(settings.delta, people[0]),
        "events": [
            {"purpose": name, "sampling": 1.0, "count": 1, **event.model_dump(mode="json")} for name, event in life
        ],
    }


def ways(experiment: Experiment, population: int | None) -> list[dict[str, Any]]:
    """Return what a life costs by three ways of planning it; all are accounted over the whole life.

    Returns:
        "way"; "scale": factor on the noise multipliers; "named": the epsilon that the way goes by; "epsilon": what
        somebody who takes part in every slice really spends.

    Raises:
        PrivacyError: the experiment is not private at user level.
    """
    from fedrec.privacy.accounting import calibrate, epsilon
    from fedrec.server.guard import calibrated, planned, populations, user_level

    settings = user_level(experiment)
    people = populations(settings, population or settings.population or _counted(experiment))
    n, budget, delta = experiment.n_slices, settings.epsilon, settings.delta

    def life(scale: float) -> list[Any]:
        return [event for _, event in planned(experiment, people, scale)]

    def one_slice(scale: float) -> list[Any]:
        # The dearest slice: a budget per slice has to hold in each.
        found = planned(experiment, people, scale)
        parts = [[e for name, e in found if name.startswith(f"slice {i}:")] for i in range(n)]
        return max(parts, key=lambda part: epsilon(part, delta, "rdp"))

    scales = {
        "one budget over the whole life": (calibrated(experiment, people), budget),
        "the budget anew for every slice": (calibrate(one_slice, budget, delta), budget),
        "equal parts of the budget, added up": (calibrate(one_slice, budget / n, delta / n), budget),
    }
    return [
        {"way": way, "scale": scale, "named": named, "epsilon": epsilon(life(scale), delta)}
        for way, (scale, named) in scales.items()
    ]


def _counted(experiment: Experiment) -> int:
    """Return how many people of the data have interactions in the first slice."""
    from fedrec.data.slices import resolve
    from fedrec.data.sources import load_dataset
    from fedrec.server.run import cut

    dataset = load_dataset(experiment.data.source)
    low, high = resolve(dataset.log, cut(experiment, dataset)[0].train)
    return max(1, int((high > low).sum()))


def _table(title: str, columns: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    Console().print(table)
