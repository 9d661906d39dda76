"""What an audit found, as a table, as JSON and as one page of HTML in the style of the run report."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrec.errors import RunError
from fedrec.evaluation.plots import FAINT, HALF, INK, STYLE, TROUBLE, UP, Plot, to_svg
from fedrec.evaluation.report import count, write_whole
from fedrec.evaluation.words import Record, score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

BOUNDS = {
    "canaries": ("Canaries in the run", "nothing: it guesses which of the canaries were in"),
    "noise": ("Measured noise", "noise that is Gaussian and independent; sampling and sensitivity are measured too"),
    "people": ("Membership of people", "nothing: it guesses which people were in, from the last release alone"),
}
QUESTIONS = {"person": "Was this person in the run?", "interaction": "Was this interaction in the run?"}
PARTS = {
    ("count", "counts"): "counts",
    ("cooccurrence", "pairs"): "statistic's pairs",
    ("cooccurrence", "features"): "statistic's features",
    ("fit", "rows"): "model update",
}
VIEWS = {"upload": "alone", "noised": "noised"}


def shown(document: Record) -> dict[str, Any]:
    """Return an audit's document with the words for people in its rows."""
    bounds = []
    for row in document["bounds"]:
        title, assumes = BOUNDS[row["attack"]]
        audited = "none found" if row["audited"] is None else f"\N{GREATER-THAN OR EQUAL TO} {row['audited']:.3f}"
        claimed = row["claimed"]
        bounds.append(
            {
                **row,
                "title": title,
                "assumes": assumes,
                "claimed_text": "nothing" if claimed is None else f"{claimed:.3f}",
                "audited_text": "no noise at all" if row["unbounded"] else audited,
                "word": "LEAKING" if claimed is None else "BROKEN" if row["exceeded"] else "not refuted",
            }
        )
    uploads = [
        {**row, "title": f"{PARTS[row['task'], row['part']]}, {VIEWS[row['view']]}", "word": _word(row)}
        for row in document["uploads"]
    ]
    members = [{**row, "title": QUESTIONS[name]} for name, row in document["membership"].items()]
    return {**document, "bounds": bounds, "uploads": uploads, "membership": members}


def _word(row: Record) -> str:
    """Say whether items are found better than by chance, over people and with 95 % confidence.

    Noise for a budget leaves a little to be found, which the budget covers; what an upload tells, nothing covers.
    """
    if row["auc_low"] <= 0.5:
        return "chance"
    return "LEAKING" if row["view"] == "upload" else "within epsilon"


def print_audit(document: Record, console: Console) -> None:
    """Print what was claimed beside what was audited, then the other attacks and the verdict."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
        for number, column in enumerate(columns):
            made.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            bad = row[-1] in ("LEAKING", "BROKEN")
            made.add_row(*(Text(cell, style="red" if bad and cell is row[-1] else "") for cell in row))
        console.print(made)

    words = shown(document)
    table(
        f"Epsilon at delta {document['claim']['delta']:g}, per {document['claim']['unit']}",
        ("attack", "claimed", "audited", "confidence", ""),
        [
            (row["title"], row["claimed_text"], row["audited_text"], f"{100 * row['confidence']:.4g} %", row["word"])
            for row in words["bounds"]
        ],
    )
    table(
        "Membership of the released model (chance: AUC .500, 1 % found)",
        ("question", "AUC", "found at 1 % false alarms"),
        [(row["title"], _between(row, "auc"), _between(row, "detected")) for row in words["membership"]],
    )
    table(
        "Touched items from one upload",
        ("upload", "precision", "recall", "guess", "AUC", ""),
        [
            (r["title"], score(r["precision"]), score(r["recall"]), score(r["chance"]), _between(r, "auc"), r["word"])
            for r in words["uploads"]
        ],
    )
    console.print(Text(document["verdict"], style="green" if document["holds"] else "red"))


def _between(row: Record, name: str) -> str:
    return f"{score(row[name])} [{score(row[f'{name}_low'])}, {score(row[f'{name}_high'])}]"


def render_audit(document: Record) -> str:
    """Return an audit as one HTML page without scripts, links to elsewhere or anything to load.

    Raises:
        RunError: jinja2 or matplotlib is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup

        drawn = draw(document)
    except ModuleNotFoundError as error:
        raise RunError(f"The HTML page needs {error.name}; install it with `pip install 'fedrec[sim]'`.") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"score": score, "count": count}
    folder = resources.files("fedrec.evaluation").joinpath("templates")
    source = folder.joinpath("audit.html.j2").read_text(encoding="utf-8")
    style = (
        folder.joinpath("report.html.j2").read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    )
    pictures = [(plot, Markup(plot.svg)) for plot in drawn]
    return environment.from_string(source).render(shown(document), style=Markup(style), plots=pictures)


def write_audit(document: Record, folder: Path) -> Path:
    """Write ``audit.json`` and ``audit.html`` into a folder, each whole or not at all, and return the page's path.

    Raises:
        RunError: the folder cannot be written, or jinja2 or matplotlib is not installed.
    """
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(folder / "audit.json", text)
    page = folder / "audit.html"
    write_whole(page, render_audit(document))
    return page


def draw(document: Record) -> list[Plot]:
    """Return the two plots of an audit: epsilon by attack, and the canaries' scores."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", STYLE]):
        figures = []
        for inches, paint in ((HALF, _epsilons), (HALF, _scores)):
            figure = Figure(figsize=inches)
            paint(figure.subplots(), document)
            figures.append(figure)
        told = "; ".join(f"{row['title']}: {row['audited_text']}" for row in shown(document)["bounds"])
        caption = (
            "Bars are lower bounds found by attacks; the line is what the ledger claims. A bar past it refutes it."
        )
        apart = "Bars that overlap mean that canaries who were in look like canaries who were not."
        return [
            Plot("epsilons", "Claimed and audited epsilon", caption, to_svg(figures[0], "epsilons", told), wide=False),
            Plot("scores", "Scores of canaries", apart, to_svg(figures[1], "scores", f"Scores. {apart}"), wide=False),
        ]


def _epsilons(ax: Axes, document: Record) -> None:
    rows = shown(document)["bounds"]
    claimed = document["claim"]["epsilon"]
    known = [row["audited"] for row in rows if row["audited"] is not None] + ([claimed] if claimed else [])
    most = 1.15 * max([1.0, *known])
    for place, row in enumerate(reversed(rows)):
        value = most if row["unbounded"] else row["audited"] or 0.0
        ax.barh(place, value, height=0.4, color=TROUBLE if row["exceeded"] or claimed is None else UP)
        label = "unbounded" if row["unbounded"] else row["audited_text"]
        ax.annotate(label, (0.0, place), (4, 16), "data", "offset points", size=8.5, color=INK, va="center")
    if claimed is not None:
        ax.axvline(claimed, color=INK, lw=1.4, ls=(0, (4, 2)))
        above = ax.get_xaxis_transform()  # named above the frame, where no bar and no other label is
        ax.annotate(f"claimed: {claimed:.3g}", (claimed, 1.02), xycoords=above, size=8.5, color=INK, ha="center")
    ax.set_yticks(range(len(rows)), [row["title"] for row in reversed(rows)])
    ax.set_ylim(-0.5, len(rows) - 0.2)
    ax.set_xlim(0, most)
    ax.set_xlabel("epsilon")


def _scores(ax: Axes, document: Record) -> None:
    found = document["scores"]
    edges = found["edges"]
    ax.stairs(found["out"], edges, fill=True, color=FAINT, alpha=0.6, label="was not in")
    ax.stairs(found["in"], edges, color=UP, lw=1.6, label="was in")
    ax.set_xlabel("log-likelihood ratio")
    ax.set_ylabel("canaries")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8.5)
