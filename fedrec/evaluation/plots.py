"""The plots of a run report, each an SVG string that is the same, byte for byte, for the same document.

A recommender (a row of the document) has one colour and one marker in all plots, from the palette of Okabe and Ito
(2008, "Color Universal Design"), which people with the common colour blindnesses can tell apart.
"""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

from fedrec.evaluation.words import (
    ROWS,
    SPARE,
    Record,
    byte_unit,
    cell,
    group_name,
    metric_name,
    pick_metric,
    row_name,
    rows_of,
    score,
    size,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = ("ndcg", "hr")

INK, FAINT, GRID = "#333333", "#9A9A9A", "#E4E4E4"
DOWN, UP, TROUBLE = "#332288", "#AA4499", "#882255"
WIDE, HALF = (9.4, 3.3), (4.7, 3.0)
HEADROOM = 1.12
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and set in the reader's font
    "svg.hashsalt": "fedrec",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Plot:
    """One figure of the report.

    Attributes:
        name: unique in the report; prefix of every id inside the SVG.
        title: what is plotted.
        caption: how to read it.
        svg: the drawing, without scripts, fonts or links.
        wide: whether it needs the width of the page.
    """

    name: str
    title: str
    caption: str
    svg: str
    wide: bool = True


def draw_all(document: Record) -> list[Plot]:
    """Return every plot that the document has numbers for."""
    import matplotlib.style

    from fedrec.evaluation.life_plot import life_plot

    releases, rounds = document.get("releases") or [], document.get("rounds") or []
    # The reader's own matplotlibrc must not show in the report; the settings return to theirs on leaving.
    with matplotlib.style.context(["default", STYLE]):
        makers = (_quality(releases), life_plot(releases), _groups(releases), _loss(rounds), _traffic(rounds, releases))
        return [plot for plot in (*makers, _answers(rounds), _seconds(rounds)) if plot is not None]


def _quality(releases: Sequence[Record]) -> Plot | None:
    metrics = [name for prefix in METRICS if (name := pick_metric(releases, prefix))]
    panels = [(metric_name(metric), "all", metric) for metric in metrics]
    drawn = _panels(releases, panels, sharey=len(releases) == 1)
    if drawn is None:
        return None
    figure, alt = drawn
    caption = "Higher is better. Dots are means over the tested people, bars are 95% intervals."
    return Plot(
        "quality", "Recommendation quality", caption, to_svg(figure, "quality", f"Recommendation quality. {alt}")
    )


def _groups(releases: Sequence[Record]) -> Plot | None:
    metric = pick_metric(releases, METRICS[0])
    names = {g: None for release in releases for groups in release.get("rows", {}).values() for g in groups}
    drawn = _panels(releases, [(group_name(g).capitalize(), g, metric or "") for g in names if g != "all"])
    if drawn is None or metric is None:
        return None
    figure, alt = drawn
    shown = metric_name(metric)
    caption = f"{shown} of known people, of people first seen in the test, and on items that joined after training."
    return Plot("groups", f"{shown} by group", caption, to_svg(figure, "groups", f"{shown} by group. {alt}"))


def _panels(
    releases: Sequence[Record], panels: Sequence[tuple[str, str, str]], sharey: bool = True
) -> tuple[Figure, str] | None:
    """Draw a panel per (title, group, metric) with numbers: over slices, or as one line per row for one release."""
    rows = rows_of(releases)
    panels = [p for p in panels if any(cell(release, row, *p[1:]) for release in releases for row in rows)]
    if not panels:
        return None
    one = len(releases) == 1
    figure = new_figure((WIDE[0], 0.9 + 0.36 * len(rows)) if one else WIDE)
    axes = figure.subplots(1, len(panels), sharey=sharey, squeeze=False)[0]
    for ax, (title, group, metric) in zip(axes, panels, strict=True):
        ax.set_title(title)
        if one:
            _lines(ax, releases[0], rows, group, metric)
        else:
            _over_slices(ax, releases, rows, group, metric)
    if one:
        axes[0].set_yticks(range(len(rows)), [row_name(row) for row in rows])
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
    else:
        names = {name: h for ax in axes for h, name in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(names.values(), names, loc="outside upper left", ncols=min(5, len(names)), handletextpad=0.2)
        for ax, (*_, metric) in zip(axes, panels, strict=True):
            ax.set_ylim(bottom=0)
            if not sharey or ax is axes[0]:
                ax.set_ylabel(metric_name(metric))
    return figure, " ".join(_in_words(releases[-1], rows, *panel) for panel in panels)


def _in_words(release: Record, rows: Sequence[str], title: str, group: str, metric: str) -> str:
    found = [(row, cell(release, row, group, metric)) for row in rows]
    values = ", ".join(f"{row_name(row)} {score(c['value'])}" for row, c in found if c)
    return f"{title} of release {release.get('version')}: {values or 'not measured'}."


def _lines(ax: Axes, release: Record, rows: Sequence[str], group: str, metric: str) -> None:
    found = [c for row in rows if (c := cell(release, row, group, metric))]
    top = max(c["value"] if c.get("high") is None else c["high"] for c in found) or 1.0
    for y, row in enumerate(rows):
        if c := cell(release, row, group, metric):
            color, marker = _look(row, rows)
            ax.errorbar([c["value"]], [y], xerr=_bars([c]), fmt=marker, color=color, ms=7, lw=2.2, label=row_name(row))
            end = c["value"] if c.get("high") is None else c["high"]
            ax.annotate(score(c["value"]), (end, y), (7, 0), textcoords="offset points", va="center")
    ax.set_xlim(0, top * 1.2)
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(metric_name(metric))


def _over_slices(ax: Axes, releases: Sequence[Record], rows: Sequence[str], group: str, metric: str) -> None:
    from matplotlib.ticker import MaxNLocator

    step = min(0.14, 0.6 / max(len(rows), 1))
    for i, row in enumerate(rows):
        found = [(x, c) for x, release in enumerate(releases) if (c := cell(release, row, group, metric))]
        if found:
            color, marker = _look(row, rows)
            xs = [x + (i - (len(rows) - 1) / 2) * step for x, _ in found]
            ys = [c["value"] for _, c in found]
            bars = _bars([c for _, c in found])
            ax.plot(xs, ys, color=color, lw=1, alpha=0.35)
            ax.errorbar(xs, ys, yerr=bars, fmt=marker, color=color, ms=5.5, lw=1.6, label=row_name(row))
    stride = -(-len(releases) // 12)
    ticks = range(0, len(releases), stride)
    ax.set_xticks(ticks, [str(releases[i].get("slice")) for i in ticks])
    ax.set_xlim(-0.5, len(releases) - 0.5)
    ax.yaxis.set_major_locator(MaxNLocator(6))
    ax.grid(axis="y")
    ax.set_xlabel("Slice")


def _bars(cells: Sequence[Record]) -> list[list[float]]:
    def reach(c: Record, side: str, sign: float) -> float:
        end = c.get(side)
        return 0.0 if end is None else max(0.0, sign * (end - c["value"]))

    return [[reach(c, "low", -1) for c in cells], [reach(c, "high", 1) for c in cells]]


def _look(row: str, rows: Sequence[str]) -> tuple[str, str]:
    if row in ROWS:
        return ROWS[row][1:]
    others = [other for other in rows if other not in ROWS]
    return SPARE[others.index(row) % len(SPARE)]


def _loss(rounds: Sequence[Record]) -> Plot | None:
    with_loss = [(x, r) for x, r in _numbered(rounds) if r.get("loss") is not None]
    if not with_loss:
        return None
    figure = new_figure(WIDE)
    ax = figure.subplots()
    many = len(with_loss) > 60
    for _, part in groupby(with_loss, key=lambda pair: (pair[1].get("slice"), pair[1].get("task"))):
        xs, ys = zip(*((x, r["loss"]) for x, r in part), strict=True)
        ax.plot(xs, ys, color=DOWN, lw=1, alpha=0.35 if many else 1, marker=None if many else "o", ms=3)
        if many:
            ax.plot(xs, _smooth(ys), color=DOWN, lw=1.8)
    _round_axis(ax, rounds, half=False)
    ax.set_ylabel("Mean loss of the clients")
    first, last = with_loss[0][1]["loss"], with_loss[-1][1]["loss"]
    alt = f"Training loss over {len(with_loss)} rounds, from {first:.3g} to {last:.3g}."
    smooth = " The strong line is the mean of the 9 rounds around." if many else ""
    caption = f"What the clients of each round reported before the server's step; lower is better.{smooth}"
    return Plot("loss", "Training loss", caption, to_svg(figure, "loss", alt))


def _traffic(rounds: Sequence[Record], releases: Sequence[Record]) -> Plot | None:
    sides = [("down", "bytes_down", DOWN), ("up", "bytes_up", UP)]
    columns = {key: [float(r.get(key) or 0) for r in rounds] for _, key, _ in sides}
    totals = {key: list(accumulate(column)) for key, column in columns.items()}
    if not any(column[-1] for column in totals.values() if column):
        return None
    figure = new_figure(WIDE)
    axes = figure.subplots(1, 2)
    xs = range(1, len(rounds) + 1)
    for ax, title, lines in ((axes[0], "Each round", columns), (axes[1], "Since the start", totals)):
        divisor, unit = byte_unit(max(max(line) for line in lines.values()))
        for name, key, color in sides:
            label = "down, server to nodes" if name == "down" else "up, nodes to server"
            ys = [y / divisor for y in lines[key]]
            style = {"color": color, "lw": 1.6, "ls": "-" if name == "down" else "--"}
            if lines is totals:
                ax.plot(xs, ys, label=label, **style)
            else:
                _draw(ax, rounds, ys, label=label, **style)
        ax.set_title(title)
        _round_axis(ax, rounds)
        ax.set_ylim(0, max(max(line) for line in lines.values()) / divisor * HEADROOM)
        ax.set_ylabel(unit)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    spent = [f"{size(totals[key][-1])} {name}" for name, key, _ in sides]
    caption = f"What the messages between server and nodes weigh: {' and '.join(spent)} in all.{_lone(rounds)}"
    alone = max((release.get("client_bytes") or 0 for release in releases), default=0)
    if alone:
        caption += f" A client on a node of its own would receive and send {size(alone)} in each of its rounds."
    return Plot(
        "traffic", "Traffic", caption, to_svg(figure, "traffic", f"Bytes per round and since the start. {caption}")
    )


def _answers(rounds: Sequence[Record]) -> Plot | None:
    if not any(r.get("cohort") for r in rounds):
        return None
    figure = new_figure(HALF)
    ax = figure.subplots()
    asked, answered = ([float(r.get(key) or 0) for r in rounds] for key in ("cohort", "clients"))
    _draw(ax, rounds, asked, color=FAINT, lw=1.6, label="asked")
    _draw(ax, rounds, answered, color=DOWN, lw=1.2, label="answered")
    refused = [(x, r.get("clients") or 0) for x, r in _numbered(rounds) if r.get("refused")]
    if refused:
        ax.plot(*zip(*refused, strict=True), "x", color=TROUBLE, ms=6, mew=1.8, label="replies refused")
    _round_axis(ax, rounds)
    ax.set_ylim(0, max(*asked, *answered) * HEADROOM)
    ax.set_ylabel("Clients")
    figure.legend(loc="outside upper left", ncols=3, handlelength=1.4, columnspacing=1.2)
    share = sum(answered) / sum(asked)
    caption = f"Clients asked and clients whose contribution counted: {share:.1%} of those asked.{_lone(rounds)}"
    return Plot("answers", "Clients per round", caption, to_svg(figure, "answers", caption), wide=False)


def _seconds(rounds: Sequence[Record]) -> Plot | None:
    ys = [float(r["seconds"]) if r.get("seconds") is not None else math.nan for r in rounds]
    known = sorted(y for y in ys if not math.isnan(y))
    if not known:
        return None
    figure = new_figure(HALF)
    ax = figure.subplots()
    median = statistics.median(known)
    _draw(ax, rounds, ys, color=DOWN, lw=1.2, label="round")
    ax.axhline(median, color=FAINT, lw=1.4, ls="--", label="median")
    _round_axis(ax, rounds)
    ax.set_ylim(0, known[-1] * HEADROOM or 1)
    ax.set_ylabel("Seconds")
    figure.legend(loc="outside upper left", ncols=2, handlelength=1.8, columnspacing=1.2)
    caption = f"Wall-clock time of each round; the median is {median:.2g} s.{_lone(rounds)}"
    return Plot("seconds", "Time per round", caption, to_svg(figure, "seconds", caption), wide=False)


def _numbered(rounds: Sequence[Record]) -> Iterator[tuple[int, Record]]:
    return enumerate(rounds, start=1)


def _draw(ax: Axes, rounds: Sequence[Record], ys: Sequence[float], label: str, **style: Any) -> None:
    """Draw a value per round, a line for each stretch of one task in one slice and a dot for a lone round."""
    stretches = groupby(_numbered(rounds), key=lambda pair: (pair[1].get("slice"), pair[1].get("task")))
    for _, stretch in stretches:
        xs = [x for x, _ in stretch]
        dot = "o" if len(xs) == 1 else ""
        ax.plot(xs, [ys[x - 1] for x in xs], marker=dot, ms=3.5, label=label, **style)
        label = "_"


def _lone(rounds: Sequence[Record]) -> str:
    stretches = groupby((r.get("slice"), r.get("task")) for r in rounds)
    lone = dict.fromkeys(str(key[1]) for key, part in stretches if len(list(part)) == 1)
    return f" Dots are lone rounds of another task: {', '.join(lone)}." if lone and len(rounds) > 1 else ""


def _smooth(values: Sequence[float], reach: int = 4) -> list[float]:
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _round_axis(ax: Axes, rounds: Sequence[Record], half: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    starts = [(key, next(part)[0]) for key, part in groupby(_numbered(rounds), key=lambda pair: pair[1].get("slice"))]
    named = len(starts) <= (6 if half else 12)
    for place, (name, x) in enumerate(starts):
        if place:
            ax.axvline(x - 0.5, color=FAINT, lw=0.8, ls=(0, (2, 3)))
        if len(starts) > 1 and named:
            text = f"{name}" if half and place else f"slice {name}"
            at = (x - 0.5, 1.0)
            ax.annotate(
                text, at, (2, -1), ax.get_xaxis_transform(), "offset points", color="#6A6A6A", size=8.5, va="top"
            )
    margin = max(0.5, 0.015 * len(rounds))
    ax.set_xlim(1 - margin, max(len(rounds), 2) + margin)
    ax.xaxis.set_major_locator(MaxNLocator(6 if half else 10, integer=True))
    ax.grid(axis="y")
    ax.set_xlabel("Round, counted over the run")


def new_figure(inches: tuple[float, float]) -> Figure:
    """Return an empty figure of this width and height."""
    from matplotlib.figure import Figure

    return Figure(figsize=inches)


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """Print a figure as an SVG element that may stand beside others in one page."""
    from html import escape

    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    body = text[text.index("<svg") :]
    # matplotlib numbers ids afresh in each figure, and its style element would reach the whole page.
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-")
    box = re.search(r'viewBox="[^"]*"', body)
    assert box is not None
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box.group()} '
        f'role="img" aria-label="{escape(alt)}" style="stroke-linejoin:round;stroke-linecap:butt">'
    )
    return opening + body[body.index(">") + 1 :].strip()
