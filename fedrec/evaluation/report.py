"""The report of a run: one page of HTML that needs nothing beside it, the same numbers as JSON, and a table.

The page says first, in words, what the numbers allow one to say. Everything in it comes from one document, so the same
document gives the same bytes.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from fedrec.errors import RunError
from fedrec.evaluation import plots
from fedrec.evaluation.words import Record, cell, group_name, made, metric_name, pick_metric, row_name, score, size

if TYPE_CHECKING:
    from rich.console import Console

Outcome = Literal["better", "unclear", "worse"]

DASH = "\N{EN DASH}"
SHOWN_REFUSALS = 50
RELEASE_FIELDS = (
    *("version", "slice", "digest", "promoted", "n_items", "train_rows", "train_start", "train_end", "test_end"),
    *("rounds", "seconds", "bytes_down", "bytes_up", "epsilon"),
)
PAGE_FIELDS = ("name", "run", "command", "fedrec", "protocol", "experiment_digest")
PHRASES = {
    "popularity": "Recommending what is popular",
    "previous": "The release before it, on the same test,",
    "local_only": "Learning from each person's own data alone",
}


@dataclass(frozen=True)
class Comparison:
    """A release beside another recommender on the same test, by one metric.

    Attributes:
        outcome: better or worse only where the 95 % interval of the difference leaves out zero.
        other: ``{"value", "low", "high"}`` of the other recommender.
        difference: the same of release minus other; None if only the two intervals are known.
    """

    outcome: Outcome
    other: Record
    difference: Record | None


@dataclass(frozen=True)
class Verdict:
    """What the numbers allow one to say, in words.

    Attributes:
        outcome: the last release against the baseline; None if there is nothing to compare.
        headline: a few words.
        text: one paragraph.
    """

    outcome: Outcome | None
    headline: str
    text: str


def compare(release: Record, row: str, metric: str) -> Comparison | None:
    """Return how a release compares with another recommender over all people, or None where that was not measured.

    The paired difference decides where the document has one; otherwise two intervals that overlap are `unclear`.
    """
    own, other = cell(release, "release", "all", metric), cell(release, row, "all", metric)
    if own is None or other is None or row == "release":
        return None
    difference = release.get("differences", {}).get(row, {}).get(metric)
    if difference is not None and difference.get("value") is not None:
        return Comparison(_side(difference.get("low"), difference.get("high")), other, difference)
    ends = own.get("low"), other.get("high"), own.get("high"), other.get("low")
    low, high = (None if a is None or b is None else a - b for a, b in (ends[:2], ends[2:]))
    return Comparison(_side(low, high), other, None)


def _side(low: float | None, high: float | None) -> Outcome:
    if low is not None and low > 0:
        return "better"
    return "worse" if high is not None and high < 0 else "unclear"


def verdict(document: Record) -> Verdict:
    """Return what the last release of a run is worth, as far as its intervals allow one to say it."""
    releases = document.get("releases") or []
    metric = pick_metric(releases, "ndcg")
    own = cell(releases[-1], "release", "all", metric) if releases and metric else None
    unfinished = [] if document.get("complete", True) else ["The run is not complete: what follows may still change."]
    if own is None or metric is None:
        return Verdict(None, "Nothing to judge yet", " ".join([*unfinished, "No release of this run has been tested."]))
    last = releases[-1]
    n = last["rows"]["release"]["all"].get("n")
    people = "" if n is None else f" over {n:,} people"
    where = f" on the test of slice {last.get('slice')}" if len(releases) > 1 else ""
    said = [*unfinished, f"Release {last.get('version')} reaches {metric_name(metric)} {interval(own)}{where}{people}."]
    others = sorted((row for row in last["rows"] if row != "release"), key=lambda row: row != "popularity")
    found = {row: comparison for row in others if (comparison := compare(last, row, metric))}
    said += [_in_words(row, comparison) for row, comparison in found.items()]
    if not found:
        return Verdict(None, "Nothing to compare with", " ".join([*said, "Nothing else was tested beside it."]))
    base = next(iter(found))
    if len(releases) > 1:
        outcomes = [c.outcome for release in releases if (c := compare(release, base, metric))]
        tally = ", ".join(f"{word} on {outcomes.count(word)}" for word in ("better", "unclear", "worse"))
        said.append(f"Against {row_name(base)} over {len(outcomes)} tested slices, the releases are {tally}.")
    if last.get("promoted") is False:
        said.append(f"Release {last.get('version')} was not promoted, so an earlier one stays in use.")
    said.append("Brackets hold 95% intervals.")
    outcome = found[base].outcome
    headline = {"better": "Better than", "unclear": "No clear difference from", "worse": "Worse than"}[outcome]
    return Verdict(outcome, f"{headline} {row_name(base)}", " ".join(said))


def _in_words(row: str, comparison: Comparison) -> str:
    start = f"{PHRASES.get(row, row_name(row).capitalize())} reaches {interval(comparison.other)}"
    difference = comparison.difference
    if difference is None:
        meaning = {
            "better": "its interval lies wholly below, so the release is better",
            "unclear": "the intervals are missing or overlap, so these data do not show which is better",
            "worse": "its interval lies wholly above, so the release is worse",
        }
        return f"{start}; {meaning[comparison.outcome]}."
    if difference.get("low") is None or difference.get("high") is None:
        return f"{start}; the difference is {score(difference['value'])}, and how sure that is was not measured."
    meaning = {
        "better": "the release is better",
        "unclear": "zero is within it, so these data do not show which is better",
        "worse": "the release is worse",
    }
    return f"{start}; the difference is {interval(difference)}: {meaning[comparison.outcome]}."


def interval(c: Record | None) -> str:
    """Return a value with its interval: ``.081 [.070, .093]``.

    >>> interval({"value": 0.081, "low": 0.07, "high": 0.093}), interval({"value": 0.5, "low": None, "high": None})
    ('.081 [.070, .093]', '.500')
    """
    if c is None or c.get("value") is None:
        return DASH
    if c.get("low") is None or c.get("high") is None:
        return score(c["value"])
    return f"{score(c['value'])} [{score(c['low'])}, {score(c['high'])}]"


def duration(seconds: float | None) -> str:
    """Return a time span as people read it.

    >>> duration(0.31), duration(100), duration(7260)
    ('0.31 s', '1 min 40 s', '2 h 1 min')
    """
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(value: float | None) -> str:
    """Return a whole number with thousands separated, or a dash."""
    return DASH if value is None else f"{value:,.0f}"


def day(seconds: float | None) -> str:
    """Return a UTC time as a date; a number too small to be one (only the order is known) stays a number."""
    if seconds is None:
        return DASH
    if not 10**8 < seconds < 10**11:
        return count(seconds)
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def render_html(document: Record) -> str:
    """Return the report as one HTML page without scripts, links to elsewhere or anything to load.

    Args:
        document: the run as JSON-able values; parts that are missing or None are left out of the page.

    Raises:
        RunError: jinja2 or matplotlib is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup

        document = _finite(document)
        drawn = plots.draw_all(document)
    except ModuleNotFoundError as error:
        raise RunError(f"The HTML report needs {error.name}; install it with `pip install 'fedrec[sim]'`.") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"score": score, "size": size, "duration": duration, "count": count, "day": day}
    environment.filters |= {"row": row_name, "group": group_name, "metric": metric_name, "interval": interval}
    source = resources.files("fedrec.evaluation").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    refusals = _refusals(document.get("rounds") or [])
    return environment.from_string(source).render(
        {name: document.get(name) for name in PAGE_FIELDS},
        complete=document.get("complete", True),
        verdict=verdict(document),
        plots=[(plot, Markup(plot.svg)) for plot in drawn],
        releases=[_release(release) for release in document.get("releases") or []],
        phases=_phases(document.get("rounds") or []),
        refusals=refusals[:SHOWN_REFUSALS],
        more_refusals=max(0, len(refusals) - SHOWN_REFUSALS),
        experiment=toml(document.get("experiment") or {}),
        privacy={"statement": None, "epsilon": None, "delta": None, "unit": None} | (document.get("privacy") or {}),
        totals={"rounds": None, "seconds": None} | (document.get("totals") or {}),
        **{name: document.get(name) or {} for name in ("data", "machine")},
    )


def _release(release: Record) -> dict[str, Any]:
    """Return a release with its rows turned into one table: group, then recommender, then metric."""
    rows = release.get("rows") or {}
    groups = list({group: None for found in rows.values() for group in found})
    metrics = list({m: None for found in rows.values() for g in found.values() for m in g.get("metrics", {})})
    table = [
        (g, [(row, found[g].get("n"), found[g].get("metrics", {})) for row, found in rows.items() if g in found])
        for g in groups
    ]
    known = {name: release.get(name) for name in RELEASE_FIELDS}
    others = {"differences": release.get("differences") or {}, "notes": made(release)}
    return known | {"metrics": metrics, "table": table} | others


def _phases(rounds: Sequence[Record]) -> list[dict[str, Any]]:
    """Return one line per (slice, task), in the order in which they ran."""
    phases: dict[tuple[Any, Any], list[Record]] = {}
    for r in rounds:
        phases.setdefault((r.get("slice"), r.get("task")), []).append(r)
    return [
        {
            "slice": slice_,
            "task": task,
            "rounds": len(part),
            "losses": [part[i].get("loss") for i in (0, -1)],
            "asked": _mean(part, "cohort"),
            "answered": _mean(part, "clients"),
            "refused": sum(len(r.get("refused") or []) for r in part),
            **{key: sum(r.get(key) or 0 for r in part) for key in ("bytes_down", "bytes_up", "seconds")},
        }
        for (slice_, task), part in phases.items()
    ]


def _mean(part: Sequence[Record], key: str) -> float | None:
    values = [r[key] for r in part if r.get(key) is not None]
    return fmean(values) if values else None


def _refusals(rounds: Sequence[Record]) -> list[tuple[str, str, int, str]]:
    """Return (node, reason, times, rounds) of the replies that were not counted, the most frequent first."""
    found: dict[tuple[str, str], list[int]] = {}
    for number, r in enumerate(rounds, start=1):
        for refused in r.get("refused") or []:
            found.setdefault((str(refused.get("node")), str(refused.get("reason"))), []).append(number)
    ordered = sorted(found.items(), key=lambda pair: -len(pair[1]))
    spans = {key: f"{at[0]}" if len(at) == 1 else f"{at[0]} to {at[-1]}" for key, at in ordered}
    return [(node, reason, len(at), spans[node, reason]) for (node, reason), at in ordered]


def toml(config: Record, path: str = "") -> str:
    """Return a nested config as TOML; keys without a value are left out, because TOML has no null.

    >>> print(toml({"name": "a", "model": {"dim": 32, "bias": None}}))
    name = "a"
    <BLANKLINE>
    [model]
    dim = 32
    """
    tables = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    plain = [f"{_key(k)} = {_value(v)}" for k, v in config.items() if k not in tables and v is not None]
    own = [f"[{path}]", *plain] if path and (plain or not tables) else plain
    blocks = ["\n".join(own), *(toml(value, f"{path}.{_key(key)}".lstrip(".")) for key, value in tables.items())]
    return "\n\n".join(block for block in blocks if block)


def _key(key: str) -> str:
    return key if key.isascii() and key.replace("-", "_").isidentifier() else json.dumps(key, ensure_ascii=False)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v) for v in value if v is not None) + "]"
    return json.dumps(value, ensure_ascii=False)


def _finite(value: Any) -> Any:
    """Return the value with NaN and infinities as None: JSON has no word for them, and no plot a place."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(document: Record, folder: Path) -> Path:
    """Write ``report.json`` and ``report.html`` into a folder, each whole or not at all, and return the page's path.

    The JSON goes first: if the page cannot be drawn, the numbers are safe.

    Raises:
        RunError: the folder cannot be written, or jinja2 or matplotlib is not installed.
    """
    write_whole(
        folder / "report.json", json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )
    page = folder / "report.html"
    write_whole(page, render_html(document))
    return page


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        RunError: the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise RunError(
            f"Cannot write '{path}': {error.strerror or error}; choose a folder that can be written."
        ) from error


def print_table(document: Record, console: Console) -> None:
    """Print one line per release and recommender, then the totals and the privacy statement."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    document = _finite(document)
    releases = document.get("releases") or []
    ndcg, hr, recall, coverage = (pick_metric(releases, prefix) for prefix in ("ndcg", "hr", "recall", "coverage"))
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    metrics = [
        metric_name(ndcg) if ndcg else "NDCG",
        *(name.partition("@")[0] if name else DASH for name in (hr, recall, coverage)),
    ]
    for heading in ("rel", "slice", "who", "people", *metrics, "seconds", "MB"):
        table.add_column(heading, justify="left" if heading == "who" else "right", no_wrap=heading != "who")
    for release in releases:
        traffic = [release.get(key) for key in ("bytes_down", "bytes_up")]
        cost = [count(release.get("seconds")), DASH if None in traffic else f"{sum(traffic) / 1e6:.1f}"]
        for row, groups in (release.get("rows") or {}).items():
            own = row == "release"
            metrics = [interval(cell(release, row, "all", ndcg)) if ndcg else DASH]
            metrics += [_plain(release, row, name) for name in (hr, recall, coverage)]
            where = [str(release.get("version")), str(release.get("slice"))]
            who = [row_name(row).removesuffix(" release"), count(groups.get("all", {}).get("n"))]
            cells = [*where, *who, *metrics, *(cost if own else ("", ""))]
            table.add_row(*(Text(text) for text in cells), style="bold cyan" if own else "")
        table.add_section()
    console.print(table if releases else Text("No release has been tested yet."))
    totals, privacy = document.get("totals") or {}, document.get("privacy") or {}
    spent = f"{count(totals.get('rounds'))} rounds, {duration(totals.get('seconds'))}, "
    spent += f"{size(totals.get('bytes_down'))} down, {size(totals.get('bytes_up'))} up. "
    early = "" if document.get("complete", True) else "Not complete. "
    statement = privacy.get("statement") or "Not private: no privacy statement was recorded."
    warned = "yellow" if privacy.get("epsilon") is None else "green"
    console.print(Text.assemble((early, "bold red"), spent, (statement, warned)))


def _plain(release: Record, row: str, metric: str | None) -> str:
    found = cell(release, row, "all", metric) if metric else None
    return score(found["value"] if found else None)
