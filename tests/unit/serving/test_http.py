"""Recommendations over HTTP: the real application on loopback, a real registry; the last test is the command itself."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest

from fedrec.data.context import ContextConfig
from fedrec.errors import RegistryError, RunError
from fedrec.models.build import build
from fedrec.models.configs import PopularityConfig, TransformerConfig
from fedrec.models.recommender import get_params
from fedrec.random import Key
from fedrec.server.recommend import recommend
from fedrec.server.registry import Registry
from fedrec.serving.http import LARGEST, Asking, Served, http_server, serve
from tests.support import FEDREC, environment
from tests.unit.server.test_recommend import CATALOG, COUNTS, N, release

TURNED = {"counts": COUNTS["counts"][::-1].copy()}


def publish(root: Path, params: dict[str, np.ndarray], slice: int, promote: bool = True) -> Registry:
    registry = Registry(root)
    registry.publish(
        params, CATALOG, run="r/001", slice=slice, parent=None, model=PopularityConfig().model_dump(mode="json"),
        experiment={}, experiment_digest="", metrics={}, privacy={}, promote=promote,
    )  # fmt: skip
    return registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return publish(tmp_path, COUNTS, 0)


@dataclass
class Client:
    """Asks a server on loopback."""

    url: str

    def ask(self, path: str, body: bytes | dict[str, Any] | None = None) -> tuple[int, str]:
        """Return the status and the text of the answer."""
        sent = json.dumps(body).encode() if isinstance(body, dict) else body
        try:
            with urlopen(Request(self.url + path, sent), timeout=10) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as refused:
            return refused.code, refused.read().decode()

    def recommend(self, **asking: Any) -> dict[str, Any]:
        """Return the document that answers."""
        status, text = self.ask("/recommend", asking)
        assert status == 200, text
        found: dict[str, Any] = json.loads(text)
        return found


@pytest.fixture
def client(registry: Registry) -> Iterator[Client]:
    server = http_server(Served(registry))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield Client(f"http://127.0.0.1:{listening.getsockname()[1]}")
        server.should_exit = True
        thread.join(10)


def ids(document: dict[str, Any]) -> list[str]:
    return [item["id"] for item in document["items"]]


def test_the_answer_is_what_the_command_line_says(registry: Registry, client: Client) -> None:
    document = client.recommend(history=["i3", "i0"], k=4, explain=True)
    found = recommend(registry.load(), ["i3", "i0"], 4, why=True)
    assert document["items"] == json.loads(json.dumps([item.to_dict() for item in found.items]))
    assert document["release"] == 1
    assert document["history"] == [{"id": "i3", "title": "Title 3"}, {"id": "i0", "title": "Title 0"}]


def test_what_is_excluded_or_known_does_not_come_back(client: Client) -> None:
    assert ids(client.recommend())[:3] == ["i1", "i3", "i8"]
    assert ids(client.recommend(history=["i1"], exclude=["i8"], k=2)) == ["i3", "i10"]


def test_the_moment_counts_where_the_model_looks_at_it(tmp_path: Path) -> None:
    config = TransformerConfig(dim=4, blocks=1, heads=1, length=5, context=ContextConfig(hours=2))
    params = get_params(build(config, N, Key.from_seed(0)))
    params["moment"] = np.array([[1, -1], [2, 0], [0, 1], [-1, 1]], np.float32)
    released = release(tmp_path, config, params)
    served, told = Served(Registry(tmp_path)), {}
    for hour in (6, 18):
        asking = Asking.model_validate_json(json.dumps({"history": ["i3"], "moment": {"hour": hour}}))
        told[hour] = served.answer(asking)["items"]
        expected = recommend(released, ["i3"], 10, moment={"hour": hour})
        assert told[hour] == [item.to_dict() for item in expected.items]
    assert told[6] != told[18]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"history": ["i99"]}', "Unknown item id 'i99'"),
        (b'{"history": "i1"}', "history: "),
        (b'{"k": 0}', "k: "),
        (b'{"user": "ann"}', "user: "),
        (b'{"moment": {"hour": 3}}', "This model does not look at the moment"),
        (b'{"moment": 3}', "moment: "),
        (b"not JSON", "body: "),
    ],
)
def test_a_bad_request_is_told_why_and_counted(client: Client, body: bytes, told: str) -> None:
    status, text = client.ask("/recommend", body)
    assert status == 422
    assert json.loads(text)["error"].startswith(told)
    assert "fedrec_serve_refused_total 1\n" in client.ask("/metrics")[1]


def test_a_large_body_is_refused(client: Client) -> None:
    assert client.ask("/recommend", b" " * (LARGEST + 1))[0] == 413


def test_items_are_found_by_id_and_title(client: Client) -> None:
    assert ids(json.loads(client.ask("/items?search=title%201")[1])) == ["i1", "i10", "i11"]
    assert ids(json.loads(client.ask("/items?search=i4")[1])) == ["i4"]
    assert client.ask("/items")[0] == 422


def test_promotion_and_rollback_are_served_at_once(registry: Registry, client: Client) -> None:
    publish(registry.root, TURNED, 1, promote=False)
    assert client.recommend(k=1)["release"] == 1
    registry.promote(2)
    second = client.recommend(k=1)
    assert (second["release"], ids(second)) == (2, ["i8"])
    registry.rollback()
    assert client.ask("/health") == (200, '{"release":1}')
    assert "fedrec_serve_answered_total 2\n" in client.ask("/metrics")[1]


def test_a_damaged_release_leaves_the_one_before_in_place_and_says_so(registry: Registry, client: Client) -> None:
    publish(registry.root, TURNED, 1)
    (registry.root / "releases" / "0002" / "model.safetensors").write_bytes(b"torn")
    assert client.recommend(k=1)["release"] == 1
    status, text = client.ask("/health")
    assert status == 503
    assert "release 2" in text.lower()
    told = client.ask("/metrics")[1]
    assert "fedrec_serve_release 1\n" in told
    assert "fedrec_serve_current 2\n" in told


def test_a_mended_release_is_served_when_it_is_promoted_again(registry: Registry, client: Client) -> None:
    publish(registry.root, TURNED, 1)
    model = registry.root / "releases" / "0002" / "model.safetensors"
    sound = model.read_bytes()
    model.write_bytes(b"torn")
    assert client.recommend(k=1)["release"] == 1
    model.write_bytes(sound)
    registry.rollback()
    assert client.ask("/health") == (200, '{"release":1}')
    registry.promote(2)
    assert client.recommend(k=1)["release"] == 2


def test_a_registry_that_went_away_is_a_sentence(registry: Registry, client: Client) -> None:
    (registry.root / "registry.sqlite").unlink()
    status, text = client.ask("/recommend", {})
    assert status == 503
    assert json.loads(text)["error"].startswith("No registry at")


def test_no_student_and_a_taken_port_are_refused(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="has no device student"):
        Served(registry, student=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"Cannot listen on 127.0.0.1:{port} "):
            serve(Served(registry), "127.0.0.1", port, print)


def test_the_command_serves_until_it_is_told_to_end(registry: Registry, tmp_path: Path) -> None:
    command = [FEDREC, "serve", "--registry", registry.root, "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(tmp_path), cwd=tmp_path
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        assert line.startswith("Serving release 1 on http://127.0.0.1:")
        asked = Client(line.split()[-1])
        assert ids(asked.recommend(history=["i1"], k=1)) == ["i3"]
        assert asked.ask("/elsewhere")[0] == 404
    finally:
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert "i1" not in rest + errors
