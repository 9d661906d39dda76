"""Writes the pages that come from the code and from results: ``python docs/reference.py``.

docs/experiments.md comes from the settings' own docstrings, the tables of docs/results.md from benchmarks/results.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fedrec.config import Experiment

HEAD = """# Experiments

An experiment is one TOML file; `fedrec simulate FILE.toml` runs it. Every key has a default except `model.kind`. An
unknown key is an error that names the nearest one. Where a table has a `kind` or a `mode`, that decides which keys it
takes.

Experiments that come with fedrec (run them by name, for example `fedrec simulate ml100k_leave_one_out`):

{bundled}
This page is written by `python docs/reference.py`.
"""


def bundled() -> str:
    """Return a list of the experiments in `simulations/`, each with its first comment line."""
    folder = Path(__file__).parent.parent / "simulations"
    first = {path.stem: path.read_text(encoding="utf-8").splitlines()[0] for path in sorted(folder.glob("*.toml"))}
    return "".join(f"- `{name}`: {line.removeprefix('#').strip()}\n" for name, line in first.items())


def section(settings: type[BaseModel], path: str) -> str:
    """Return the tables of one group of settings and of the groups inside it."""
    rows, inside, told = [], [], docstrings(settings)
    for name, field in settings.model_fields.items():
        dotted = f"{path}.{name}" if path else name
        members = [m for m in (get_args(field.annotation) or (field.annotation,)) if is_settings(m)]
        inside += [(member, dotted) for member in members]
        if not members and name not in ("kind", "mode"):
            rows.append(f"| `{dotted}` | {shown(field.default)} | {told.get(name, '')} |")
    tag = next((name for name in ("kind", "mode") if name in settings.model_fields), None)
    which = f', {tag} = "{settings.model_fields[tag].default}"' if tag else ""
    title = f"## `{path}`{which}" if path else "## Top level"
    about = (settings.__doc__ or "").strip()
    table = "| key | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n" if rows else ""
    return f"{title}\n\n{about}\n\n{table}\n" + "".join(section(member, dotted) for member, dotted in inside)


def docstrings(settings: type[BaseModel]) -> dict[str, str]:
    """Return the docstring of each field, those of its bases included.

    Read from the source here: pydantic can (`use_attribute_docstrings`), but does so whenever fedrec is imported.
    """
    found: dict[str, str] = {}
    for kind in reversed(settings.__mro__[: settings.__mro__.index(BaseModel)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, said in pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(said, ast.Expr) and isinstance(said.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(said.value.value).split())
    return found


def shown(default: Any) -> str:
    """Return a default as TOML would say it."""
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "not set"
    return f"`{list(default) if isinstance(default, tuple) else default}`"


def is_settings(annotation: Any) -> bool:
    """Whether an annotation is a group of settings."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def page() -> str:
    """Return the whole page."""
    return HEAD.format(bundled=bundled()) + "\n" + section(Experiment, "").rstrip() + "\n"


RESULTS_HEAD = """# Results

The last runs of every benchmark, as their JSON in `benchmarks/results` says it. "FAILS" is a claim that did not hold in
that run; [performance](performance.md) says why. This page is written by `python docs/reference.py`.
"""


def results_page() -> str:
    """Return the tables of all results."""
    folder = Path(__file__).parent.parent / "benchmarks" / "results"
    return RESULTS_HEAD + "".join(table(json.loads(path.read_text("utf-8"))) for path in sorted(folder.glob("*.json")))


def table(document: dict[str, Any]) -> str:
    """Return the rows of one benchmark, its command and its machine."""
    machine = ", ".join(f"{name} {value}" for name, value in document["machine"].items())
    judged = {True: "holds", False: "FAILS", None: ""}
    rows = "".join(
        f"| {r['what']} | {r['value']:.4g} | {r['unit']} | {r['target']} | {judged[r['holds']]} |\n"
        for r in document["rows"]
    )
    head = "| what | value | unit | target | |\n| --- | ---: | --- | --- | --- |\n"
    return f"\n## {document['benchmark']}\n\n`{document['command']}` ({machine})\n\n{head}{rows}"


if __name__ == "__main__":
    (Path(__file__).parent / "experiments.md").write_text(page(), encoding="utf-8")
    (Path(__file__).parent / "results.md").write_text(results_page(), encoding="utf-8")
