"""Tasks: told apart by their kind, and checked when they are read."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from fedrec.data.slices import LastWindow
from fedrec.protocol.task import AnyTask, CountTask, EvaluateTask, FitTask, LocalTraining, Task

ADAPTER: TypeAdapter[AnyTask] = TypeAdapter(Task)
LAST = {"kind": "last", "skip": 0, "take": 1}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"kind": "fit", "window": LAST}, FitTask(window=LastWindow(skip=0, take=1))),
        ({"kind": "count", "window": LAST}, CountTask(window=LastWindow(skip=0, take=1))),
        (
            {"kind": "evaluate", "window": LAST, "n_known_items": 3, "ks": [5]},
            EvaluateTask(window=LastWindow(skip=0, take=1), n_known_items=3, ks=(5,)),
        ),
    ],
)
def test_the_kind_decides_what_is_read(raw: dict[str, Any], expected: AnyTask) -> None:
    assert ADAPTER.validate_python(raw) == expected


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ({"kind": "dream", "window": LAST}, "'fit', 'fisher', 'count', 'cooccurrence', 'evaluate'"),
        ({"window": LAST}, "kind"),
        ({"kind": "fit", "window": LAST, "locl": {}}, "locl"),
        ({"kind": "fit", "window": LAST, "local": {"steps": 0}}, "steps"),
        ({"kind": "fit", "window": LAST, "local": {"learning_rate": 0}}, "learning_rate"),
        ({"kind": "fit", "window": LAST, "local": {"clip_norm": 0}}, "clip_norm"),
        ({"kind": "count", "window": LAST, "clip_norm": -1}, "clip_norm"),
        ({"kind": "evaluate", "window": LAST}, "n_known_items"),
        ({"kind": "evaluate", "window": LAST, "n_known_items": 1, "probes": 0}, "probes"),
        ({"kind": "evaluate", "window": LAST, "n_known_items": 1, "personalise": {"kind": "count"}}, "personalise"),
    ],
)
def test_what_makes_no_sense_is_refused(raw: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        ADAPTER.validate_python(raw)


def test_a_task_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        LocalTraining().steps = 2  # type: ignore[misc]
