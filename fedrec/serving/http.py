"""Recommendations over HTTP from the release that is current; a promotion or a rollback is served at once.

| method and path | what it answers |
| --- | --- |
| ``POST /recommend`` | the best items for the history in the body (`Asking`), as JSON |
| ``GET /items?search=TEXT`` | items of the catalogue whose id or title holds the text |
| ``GET /health`` | 200 and the release that is served; 503 while there is none |
| ``GET /metrics`` | counters as Prometheus reads them |

Nothing of a request is kept or logged: its history is used for its answer and forgotten. Who does not want to show a
history to a server at all has `fedrec.client.sdk.Device` recommend on the device.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Annotated, Any

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fedrec.errors import ConfigError, CorruptRelease, FedrecError, RegistryError, RunError, UnknownItem
from fedrec.server.recommend import Recommending
from fedrec.server.registry import Registry
from fedrec.server.telemetry import exposition

LARGEST = 1 << 20
"""Bytes of a request's body."""
FOUND = 20
"""Items that a search returns at most."""
METRICS = {
    "fedrec_serve_answered_total": ("counter", "Requests for recommendations that were answered."),
    "fedrec_serve_refused_total": ("counter", "Requests for recommendations that were refused."),
    "fedrec_serve_seconds_total": ("counter", "Time that the answers took."),
    "fedrec_serve_release": ("gauge", "Release that is served."),
    "fedrec_serve_current": ("gauge", "Release that is current in the registry; other than served if it is damaged."),
}

Id = Annotated[str, Field(max_length=1000)]


class Asking(BaseModel):
    """The body of a request for recommendations."""

    model_config = ConfigDict(extra="forbid")
    history: list[Id] = Field(default=[], max_length=10_000)
    """Item ids, oldest first."""
    k: int = Field(default=10, ge=1, le=1000)
    """How many items."""
    exclude: list[Id] = Field(default=[], max_length=10_000)
    """Further item ids that are not wanted."""
    explain: bool = False
    """Also say what each item of the history adds to each score."""
    moment: dict[Id, int | Id] | None = None
    """Hour, weekday, device and place of the request, as `ContextConfig.moment` reads them."""


class Served:
    """The current release of a registry, ready to answer; it changes when the registry's does."""

    def __init__(self, registry: Registry, student: bool = False) -> None:
        """Load the current release.

        Args:
            registry: where it comes from; looked at again before every answer, which costs a read of one row.
            student: serve the small student for devices.

        Raises:
            RegistryError: there is no release, or it has no student.
            CorruptRelease: its files are damaged.
        """
        self._registry, self._student = registry, student
        self._lock = threading.Lock()
        self._values = dict.fromkeys((name for name, (kind, _) in METRICS.items() if kind == "counter"), 0.0)
        self.damaged: dict[int, str] = {}
        self._ready = Recommending(registry.load(), student)

    def current(self) -> Recommending:
        """Return the current release; the one before it, if the current one cannot be loaded.

        A damaged release is read once, and again when another one was current in between.
        """
        with self._lock:
            version = self._registry.row().version
            if version == self._ready.release.version:
                self.damaged.clear()
            elif version not in self.damaged:
                try:
                    self._ready = Recommending(self._registry.load(version), self._student)
                    self.damaged.clear()
                except (CorruptRelease, RegistryError) as error:
                    self.damaged[version] = str(error)
            return self._ready

    def answer(self, asking: Asking) -> dict[str, Any]:
        """Return the document that answers a request.

        Raises:
            UnknownItem: the catalogue does not hold an id.
            ConfigError: the model knows no such moment.
        """
        began = time.perf_counter()
        ready = self.current()
        found = ready.recommend(asking.history, asking.k, asking.exclude, asking.explain, asking.moment)
        self.count("answered", seconds=time.perf_counter() - began)
        return {
            "release": ready.release.version,
            "student": ready.student,
            "history": [{"id": i, "title": t} for i, t in zip(asking.history, found.history_titles, strict=True)],
            "items": [item.to_dict() for item in found.items],
        }

    def search(self, text: str) -> list[dict[str, Any]]:
        """Return items whose id is the text or whose title holds it, in order of arrival, at most `FOUND`."""
        catalog, wanted = self.current().release.catalog, text.casefold()
        rows = zip(catalog.ids, catalog.titles, catalog.attributes, strict=True)
        found = (row for row in rows if row[0] == text or wanted in row[1].casefold())
        return [{"id": i, "title": t, "attributes": a} for (i, t, a), _ in zip(found, range(FOUND), strict=False)]

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Return whether the current release is served, and what is wrong if it is not."""
        served = self.current().release.version
        wrong = self.damaged.get(self._registry.row().version)
        return wrong is None, {"release": served, **({"error": wrong} if wrong else {})}

    def metrics(self) -> str:
        """Return the counters as Prometheus reads them."""
        served, current = self.current().release.version, self._registry.row().version
        with self._lock:
            return exposition(METRICS, self._values | {"fedrec_serve_release": served, "fedrec_serve_current": current})

    def count(self, what: str, seconds: float = 0.0) -> None:
        """Count one request that was ``answered`` or ``refused``."""
        with self._lock:
            self._values[f"fedrec_serve_{what}_total"] += 1
            self._values["fedrec_serve_seconds_total"] += seconds


def web(served: Served) -> Starlette:
    """Return the application; run it with any ASGI server."""

    async def recommend(request: Request) -> Response:
        body = await _body(request)
        if body is None:
            return _refused(served, 413, f"A request may have {LARGEST:,} bytes.")
        try:
            asking = Asking.model_validate_json(body)
            return JSONResponse(await run_in_threadpool(served.answer, asking))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "body"
            return _refused(served, 422, f"{place}: {first['msg']}.")
        except (UnknownItem, ConfigError) as error:
            return _refused(served, 422, str(error))

    async def items(request: Request) -> Response:
        text = request.query_params.get("search", "")
        if not text:
            return _error(422, "Say what to look for: /items?search=TEXT.")
        return JSONResponse({"items": await run_in_threadpool(served.search, text)})

    async def health(request: Request) -> Response:
        up, document = await run_in_threadpool(served.health)
        return JSONResponse(document, 200 if up else 503)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(await run_in_threadpool(served.metrics), media_type="text/plain; version=0.0.4")

    async def failed(request: Request, error: Exception) -> Response:
        return _error(503, str(error))

    return Starlette(
        routes=[
            Route("/recommend", recommend, methods=["POST"]),
            Route("/items", items),
            Route("/health", health),
            Route("/metrics", metrics),
        ],
        exception_handlers={FedrecError: failed},
    )


def serve(served: Served, host: str, port: int, say: Callable[[str], None]) -> None:
    """Answer until the process is told to end; requests that are under way are finished. For the main thread.

    Raises:
        RunError: the address cannot be listened on.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise RunError(f"Cannot listen on {host}:{port} ({error}); choose another with --host and --port.") from error
    with closing(listening):
        say(f"Serving release {served.current().release.version} on http://{host}:{listening.getsockname()[1]}")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # uvicorn ends by them, then raises them again: this is the answer
        http_server(served).run(sockets=[listening])


def http_server(served: Served) -> uvicorn.Server:
    """Return the server that `serve` runs. It has no access log: what people ask for is nobody's business."""
    return uvicorn.Server(uvicorn.Config(web(served), log_level="warning", access_log=False, lifespan="off", ws="none"))


async def _body(request: Request) -> bytes | None:
    """Return the body, None if it is too large; no more than that is ever held."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST:
            return None
    return bytes(body)


def _refused(served: Served, code: int, why: str) -> Response:
    served.count("refused")
    return _error(code, why)


def _error(code: int, why: str) -> Response:
    return JSONResponse({"error": why}, code)
