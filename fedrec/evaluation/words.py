"""The words and numbers of a report: readable names, and how to find and print a figure of a run's document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

ROWS = {
    "release": ("release", "#0072B2", "o"),
    "previous": ("previous release", "#56B4E9", "D"),
    "popularity": ("popularity", "#E69F00", "s"),
    "local_only": ("local only", "#009E73", "^"),
}
SPARE = (("#CC79A7", "v"), ("#D55E00", "P"), ("#7A7A7A", "X"))
GROUPS = {"all": "everyone", "returning": "returning people", "new": "new people", "new_items": "new items"}


def row_name(row: str) -> str:
    """Return the readable name of a recommender: ``local_only`` gives ``local only``."""
    return ROWS[row][0] if row in ROWS else row.replace("_", " ")


def group_name(group: str) -> str:
    """Return the readable name of a group of people or items."""
    return GROUPS.get(group, group.replace("_", " "))


def metric_name(metric: str) -> str:
    """Return a metric as papers write it: ``ndcg@10`` gives ``NDCG@10``, ``coverage@10`` gives ``Coverage@10``."""
    name, at, depth = metric.partition("@")
    shown = name.upper() if name in ("ndcg", "hr", "mrr", "map", "auc") else name.replace("_", " ").capitalize()
    return f"{shown}{at}{depth}"


def score(value: float | None) -> str:
    """Return a metric with three decimals and no leading zero, or a dash where there is none.

    >>> score(0.0806), score(-0.25), score(1.0)
    ('.081', '\N{MINUS SIGN}.250', '1.000')
    """
    if value is None:
        return "\N{EN DASH}"
    text = f"{abs(value):.3f}".removeprefix("0")
    return f"\N{MINUS SIGN}{text}" if value < 0 and text != ".000" else text


def pick_metric(releases: Sequence[Record], prefix: str) -> str | None:
    """Return the name of the first metric called `prefix` in the releases, at depth 10 if there is one."""
    names = {
        name: None
        for release in releases
        for groups in release.get("rows", {}).values()
        for group in groups.values()
        for name in group.get("metrics", {})
        if name.partition("@")[0] == prefix
    }
    return f"{prefix}@10" if f"{prefix}@10" in names else next(iter(names), None)


def cell(release: Record, row: str, group: str, metric: str) -> Record | None:
    """Return ``{"value", "low", "high"}`` of one recommender in one group, or None where it was not measured."""
    found = release.get("rows", {}).get(row, {}).get(group, {}).get("metrics", {}).get(metric)
    return found if found and found.get("value") is not None else None


def rows_of(releases: Sequence[Record]) -> list[str]:
    """Return the recommenders of all releases, in the order of the document."""
    longest_first = sorted(releases, key=lambda release: -len(release.get("rows", {})))
    return list({row: None for release in longest_first for row in release.get("rows", {})})


def byte_unit(largest: float) -> tuple[float, str]:
    """Return the divisor and the name of the decimal unit that suits `largest` bytes.

    >>> byte_unit(2_500_000)
    (1000000.0, 'MB')
    """
    for divisor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= divisor:
            return divisor, unit
    return 1.0, "bytes"


def size(n_bytes: float | None) -> str:
    """Return a number of bytes as people read it.

    >>> size(123_456_789), size(12), size(None) == "\N{EN DASH}"
    ('123 MB', '12 bytes', True)
    """
    if n_bytes is None:
        return "\N{EN DASH}"
    divisor, unit = byte_unit(n_bytes)
    amount = n_bytes / divisor
    return f"{amount:.1f} {unit}" if amount < 10 and divisor > 1 else f"{amount:,.0f} {unit}"


def made(release: Record) -> list[str]:
    """Return what else a reader should know of how a release was made: who taught it, its device student, drift.

    >>> made({"drift": {"alarm": True, "speed": 2.0}})
    ['Drift: the alarm sounded after this release, so the next slice learns 2 times as fast.']
    """
    found: list[str] = []
    lesson, student, drift = (release.get(name) or {} for name in ("lesson", "student", "drift"))
    if lesson.get("teachers"):
        names = ", ".join(f"{name} (weight {one['weight']:g})" for name, one in lesson["teachers"].items())
        steps = lesson.get("step", 0)
        found.append(f"Taught after its rounds, {steps:,} steps on synthetic histories, by: {names}. Added epsilon: 0.")
    if student.get("n_params"):
        found.append(
            f"Device student: {student['n_params']:,} parameters ({student['share_of_params']:.1%} of the release's), "
            f"{size(student['bytes'])}. Added epsilon: 0."
        )
    if drift.get("alarm"):
        found.append(
            f"Drift: the alarm sounded after this release, so the next slice learns {drift['speed']:g} times as fast."
        )
    return found
