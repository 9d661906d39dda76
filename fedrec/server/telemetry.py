"""Metrics, health and status of a deployed server over HTTP on loopback, read from its audit trail."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fedrec.errors import ConfigError, RunError
from fedrec.server.certificates import expires
from fedrec.server.deployment import LOG, DeploymentFolder
from fedrec.server.journal import AUDIT, STATUS, read_document

METRICS = {
    "fedrec_rounds_total": ("counter", "Rounds of training that were done."),
    "fedrec_round_seconds_total": ("counter", "Time that they took."),
    "fedrec_clients_total": ("counter", "Clients whose contributions were added up."),
    "fedrec_bytes_down_total": ("counter", "Bytes sent to nodes in rounds."),
    "fedrec_bytes_up_total": ("counter", "Bytes received from nodes in rounds."),
    "fedrec_refused_total": ("counter", "Replies that were not added up, and nodes that did not answer."),
    "fedrec_abandoned_total": ("counter", "Rounds that were abandoned."),
    "fedrec_quarantined_total": ("counter", "Nodes that were put into quarantine."),
    "fedrec_releases_total": ("counter", "Releases that were published."),
    "fedrec_failures_total": ("counter", "Times that SuperLink or ServerApp ended early."),
    "fedrec_slice": ("gauge", "Slice being learnt."),
    "fedrec_epsilon_spent": ("gauge", "Epsilon spent at the last release."),
    "fedrec_last_round_timestamp_seconds": ("gauge", "When the last round ended."),
    "fedrec_certificate_expires_timestamp_seconds": ("gauge", "When the server's certificate expires."),
    "fedrec_restarts": ("gauge", "Times that this process started something again."),
    "fedrec_up": ("gauge", "1 while the SuperLink runs."),
}


def exposition(metrics: Mapping[str, tuple[str, str]], values: Mapping[str, float]) -> str:
    """Return the metrics that have a value in Prometheus' text format; `metrics` gives each one's type and help."""
    lines: list[str] = []
    for name, (kind, help_) in metrics.items():
        if name in values:
            lines += [f"# HELP {name} {help_}", f"# TYPE {name} {kind}", f"{name} {values[name]:.17g}"]
    return "\n".join(lines) + "\n"


class Telemetry:
    """Counts what stands in the audit trail; what was read is remembered, so a look costs little."""

    def __init__(self, folder: DeploymentFolder) -> None:
        """Watch a deployment."""
        self._folder = folder
        self._lock = threading.Lock()
        self._at = 0
        self._values: dict[str, float] = dict.fromkeys(
            (name for name, (kind, _) in METRICS.items() if kind == "counter"), 0.0
        )
        self.restarts = 0
        self.superlink_pid = 0

    def rounds(self) -> int:
        """Return how many rounds are done."""
        return int(self.values()["fedrec_rounds_total"])

    def values(self) -> dict[str, float]:
        """Return every metric that has a value."""
        from fedrec.server.supervisor import alive

        with self._lock:
            self._read()
            found = dict(self._values)
        found["fedrec_restarts"] = self.restarts
        found["fedrec_up"] = float(bool(self.superlink_pid) and alive(self.superlink_pid))
        with suppress(ConfigError):
            expiry = expires(self._folder.certificate("server.crt")).timestamp()
            found["fedrec_certificate_expires_timestamp_seconds"] = expiry
        return found

    def text(self) -> str:
        """Return the metrics as Prometheus reads them."""
        return exposition(METRICS, self.values())

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Return whether the server is up, and where it stands."""
        up = bool(self.values()["fedrec_up"])
        return up, {"up": up, **read_document(self._folder.state(STATUS))}

    @contextmanager
    def serving(self, port: int) -> Iterator[None]:
        """Answer on ``127.0.0.1:port`` while the context lasts; port 0: do not.

        Raises:
            RunError: the port is taken.
        """
        if not port:
            yield
            return
        try:
            server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        except OSError as error:
            raise RunError(
                f"Port {port} for metrics is taken ({error.strerror}); set operations.port to a free one, or to 0."
            ) from error
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _read(self) -> None:
        path = self._folder.path / LOG / AUDIT
        if not path.is_file():
            return
        with path.open("rb") as handle:
            handle.seek(self._at)
            for line in handle:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._at += len(line)
                self._count(json.loads(line))

    def _count(self, record: dict[str, Any]) -> None:
        from datetime import datetime

        values, kind = self._values, record["kind"]
        if kind == "round":
            values["fedrec_rounds_total"] += 1
            values["fedrec_round_seconds_total"] += record.get("seconds", 0.0)
            values["fedrec_clients_total"] += record.get("clients", 0)
            values["fedrec_bytes_down_total"] += record.get("bytes_down", 0)
            values["fedrec_bytes_up_total"] += record.get("bytes_up", 0)
            values["fedrec_abandoned_total"] += bool(record.get("abandoned"))
            values["fedrec_last_round_timestamp_seconds"] = datetime.fromisoformat(record["at"]).timestamp()
        elif kind == "slice":
            values["fedrec_slice"] = record["slice"]
        elif kind == "refused":
            values["fedrec_refused_total"] += 1
        elif kind == "quarantine":
            values["fedrec_quarantined_total"] += 1
        elif kind == "release":
            values["fedrec_releases_total"] += 1
            if record.get("epsilon") is not None:
                values["fedrec_epsilon_spent"] = record["epsilon"]
        elif kind in ("died", "failed"):
            values["fedrec_failures_total"] += kind == "died"


def _handler(telemetry: Telemetry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, "text/plain; version=0.0.4; charset=utf-8", telemetry.text())
            elif self.path in ("/health", "/status"):
                up, document = telemetry.health()
                self._answer(200 if up else 503, "application/json", json.dumps(document) + "\n")
            else:
                self._answer(404, "text/plain", "There are /metrics, /health and /status.\n")

        def _answer(self, code: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: a look every few seconds is no news."""

    return Handler
