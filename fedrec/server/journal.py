"""What a deployed server writes down: an audit trail that only grows, and where it stands now."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedrec.server.deployment import LOG, DeploymentFolder
from fedrec.server.files import refusal, write_atomically
from fedrec.server.work import Event

AUDIT, STATUS, OUTCOME, PROCESS = "audit.jsonl", "status.json", "outcome.json", "serverapp.json"


def wall_clock() -> float:
    """Return seconds since 1970 UTC."""
    return time.time()


class Journal:
    """The audit trail ``log/audit.jsonl``, one JSON object a line, and ``state/status.json``.

    The trail says what was asked of whom and what came of it: slices, rounds, refusals with node and reason, releases,
    starts and ends. It holds no update, no history and nothing about a single person.
    """

    def __init__(
        self, folder: DeploymentFolder, now: Callable[[], float] = wall_clock, say: Callable[[str], None] = print
    ) -> None:
        """Write into a deployment's folder; each line also goes to `say`."""
        self._path = folder.path / LOG / AUDIT
        self._status = folder.state(STATUS)
        self._now = now
        self._say = say

    def note(self, kind: str, **facts: Any) -> None:
        """Append one line, and force it to the disk.

        Raises:
            RegistryError: the disk refuses.
        """
        at = datetime.fromtimestamp(self._now(), UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"at": at, "kind": kind, **facts}, ensure_ascii=False, allow_nan=False)
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
            try:
                os.write(descriptor, line.encode() + b"\n")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise refusal(self._path, error) from error
        self._say(line)

    def stand(self, doing: str, **facts: Any) -> None:
        """Say where the server stands now.

        Raises:
            RegistryError: the disk refuses.
        """
        document = {"at": self._now(), "doing": doing, **facts}
        write_atomically(self._status, json.dumps(document).encode())

    def observe(self, event: Event) -> None:
        """Write down what a run tells its observers."""
        record = event.record
        if event.kind == "slice":
            self.note("slice", **record)
            self.stand("counting", slice=record["slice"])
        elif event.kind == "round":
            refused = record["refused"]
            self.note("round", **{name: record[name] for name in ROUND if name in record})
            for one in refused:
                self.note("refused", slice=record["slice"], round=record["round"], **one)
            self.stand("training", slice=record["slice"], round=record["round"] + 1)
        elif event.kind == "evaluate":
            self.stand("evaluating", slice=record["slice"])
        elif event.kind == "release":
            self.note("release", **{name: record[name] for name in RELEASE if name in record})
            for one in record["refused"]:
                self.note("refused", slice=record["slice"], **one)
        else:
            self.note(event.kind, **record)


ROUND = ("slice", "round", "task", "cohort", "clients", "loss", "update_norm", "bytes_down", "bytes_up", "seconds")
RELEASE = ("version", "slice", "digest", "parent", "promoted", "n_items", "rounds", "epsilon")


def read_document(path: Path) -> dict[str, Any]:
    """Return a JSON document, or nothing where there is none or it is being replaced."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
