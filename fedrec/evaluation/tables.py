"""Tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedrec.evaluation.report import count, interval
from fedrec.evaluation.words import Record, cell, group_name, metric_name, pick_metric, row_name, rows_of, score

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = ("ndcg", "hr", "recall", "coverage")
LEARNT = {
    "before": "what is tested is newer than all that the release has learnt",
    "after": "the release has learnt from what came after this test: it tells what is retained, not what is foreseen",
}


def print_evaluation(document: Record, console: Console) -> None:
    """Print what `fedrec.grid.evaluate.evaluate` returned: a line per recommender and group of people."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names = [name for prefix in SHOWN if (name := pick_metric([document], prefix))]
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for heading in ("who", "whom", "people", *map(metric_name, names)):
        table.add_column(heading, justify="left" if heading.startswith("who") else "right", no_wrap=True)
    for row in rows_of([document]):
        for group, found in document["rows"][row].items():
            cells = [row_name(row) if group == "all" else "", group_name(group), count(found["n"])]
            for place, name in enumerate(names):
                estimate = cell(document, row, group, name)
                cells.append(interval(estimate) if place == 0 else score(estimate["value"] if estimate else None))
            table.add_row(*(Text(text) for text in cells), style="bold cyan" if row == "release" else "")
        table.add_section()
    title = f"Release {document['release']} on slice {document['slice']} of {document['data']['name']}"
    console.print(Text(f"{title}: {LEARNT[document['learnt']]}."))
    console.print(table if document["rows"] else Text("Nobody has anything in this test."))
    console.print(Text(document["privacy"], "yellow"))
