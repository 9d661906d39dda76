"""A deployment: made by one command, checked before anything starts, run to its end by the ServerApp."""

from __future__ import annotations

import json
import os
import socket
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from typer.testing import CliRunner

from fedrec.client.app import client_app
from fedrec.client.node import hosted_pool
from fedrec.data.cleaning import Dataset
from fedrec.errors import ConfigError, FedrecError, RunError
from fedrec.grid.in_process import SERVER_NODE_ID, InProcessGrid
from fedrec.server.app import GridLink
from fedrec.server.certificates import certificate_problem, check_node_key, make_certificates
from fedrec.server.deploy_commands import app, make_node
from fedrec.server.deployed import run_deployed
from fedrec.server.deployment import Deployment, DeploymentFolder, catalog_only
from fedrec.server.journal import OUTCOME, PROCESS, STATUS, Journal, read_document
from fedrec.server.run import check
from fedrec.server.telemetry import Telemetry
from fedrec.settings import parsed
from tests.support import START, dataset_of, small_document, small_experiment, small_rows, to_toml

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LAST = START + 3600 * 900
"""After the last row of the small data set."""
DAY = 86_400


def said(*arguments: object) -> str:
    """Run `fedrec server` and return what a mistake says."""
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert isinstance(result.exception, FedrecError), result.output
    return str(result.exception)


@pytest.fixture
def place(tmp_path: Path) -> DeploymentFolder:
    """A deployment whose server knows the catalogue, and two nodes that know their own people."""
    dataset = dataset_of(small_rows())
    dataset.catalog.save(tmp_path / "public")
    rows = small_rows()
    for name, odd in (("node-1", False), ("node-2", True)):
        own = [row for row in rows if (int(row[0][1:]) % 2 == 1) is odd]
        dataset_of(own).save(tmp_path / f"data-{name}")
    split = {"kind": "schedule", "start": LAST - 10 * DAY, "interval_seconds": 10 * DAY, "later": 1, "test": 0.4}
    document = small_document(training__base__rounds=2, training__later__rounds=1, evaluation__local_only__people=0)
    (tmp_path / "life.toml").write_text(to_toml(document | {"name": "life", "split": split}), encoding="utf-8")
    result = CliRunner().invoke(
        app,
        ["init", str(tmp_path / "dep"), "--experiment", str(tmp_path / "life.toml"), "--catalog",
         str(tmp_path / "public"), "--nodes", "2"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = DeploymentFolder(tmp_path / "dep")
    found.prepare()
    for name in ("node-1", "node-2"):
        toml = found.path / "nodes" / name / "node.toml"
        lines = [f'data = "{tmp_path / f"data-{name}"}"', f'catalog = "{tmp_path / "public"}"']
        toml.write_text("\n".join([toml.read_text(encoding="utf-8"), *lines]), encoding="utf-8")
    return found


def grid_of(place: DeploymentFolder) -> GridLink:
    pools = [hosted_pool(path) for path in sorted((place.path / "nodes").glob("*/node.toml"))]
    made = client_app(lambda context: pools[context.node_id - SERVER_NODE_ID - 1])
    return GridLink(InProcessGrid(made, [{}] * len(pools), {}))


class Clock:
    """A clock that moves when somebody sleeps."""

    def __init__(self, time: float) -> None:
        self.time = time
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


def audit(place: DeploymentFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place.path / "log/audit.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_life_from_the_catalogue_alone_waits_for_each_slice_and_ends(place: DeploymentFolder) -> None:
    clock = Clock(LAST - 11 * DAY)
    run_deployed(place, grid_of(place), 7, clock.now, clock.sleep)
    assert clock.time >= LAST
    kinds = [record["kind"] for record in audit(place)]
    assert kinds == ["started", "slice", "round", "round", "release", "slice", "round", "release", "finished"]
    assert read_document(place.state(OUTCOME)) == {"attempt": 7, "finished": True}
    assert read_document(place.state(STATUS))["doing"] == "finished"
    first, second = place.registry.load(1), place.registry.load(2)
    assert len(first.catalog) < len(second.catalog) <= 60
    values = Telemetry(place).values()
    assert (values["fedrec_rounds_total"], values["fedrec_releases_total"], values["fedrec_up"]) == (3, 2, 0)
    assert values["fedrec_clients_total"] == sum(one["clients"] for one in audit(place) if one["kind"] == "round") > 0
    assert "# TYPE fedrec_rounds_total counter\nfedrec_rounds_total 3\n" in Telemetry(place).text()
    run_deployed(place, grid_of(place), 8, clock.now, clock.sleep)  # the life is over: nothing more happens
    assert len(place.registry.list()) == 2


def test_a_killed_life_goes_on_to_the_same_bytes(place: DeploymentFolder, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    clock = Clock(LAST)
    link = grid_of(place)
    calls = iter(range(1_000))

    class Dying(GridLink):
        def exchange(self, *arguments: Any) -> Iterator[Any]:
            if next(calls) == 5:
                raise Killed
            yield from super().exchange(*arguments)

    with pytest.raises(Killed):
        run_deployed(place, Dying(link.grid), 1, clock.now, clock.sleep)
    assert read_document(place.state(PROCESS))["attempt"] == 1
    assert not place.state(OUTCOME).exists()
    run_deployed(place, link, 2, clock.now, clock.sleep)
    assert [one["kind"] for one in audit(place)].count("resumed") == 1
    resumed = [row.digest for row in place.registry.list()]

    (place.path / "runs").rename(tmp_path / "old-runs")
    (place.path / "registry").rename(tmp_path / "old-registry")
    place.prepare()
    run_deployed(place, link, 3, clock.now, clock.sleep)
    assert [row.digest for row in place.registry.list()] == resumed


def test_without_nodes_a_life_is_put_off_and_says_so(place: DeploymentFolder) -> None:
    clock = Clock(LAST)
    made = client_app(lambda context: pytest.fail("nobody is there"))
    with pytest.raises(
        RunError, match=r"0 of the 2 nodes that waiting.minimum_nodes asks for are connected after 3600"
    ):
        run_deployed(place, GridLink(InProcessGrid(made, [], {})), 1, clock.now, clock.sleep)
    outcome = read_document(place.state(OUTCOME))
    assert (outcome["finished"], outcome["again"]) == (False, True)
    assert read_document(place.state(STATUS)) == {
        "at": LAST, "doing": "waiting for nodes", "nodes": 0, "minimum": 2
    }  # fmt: skip


def test_one_run_has_one_process(place: DeploymentFolder) -> None:
    from fedrec.server.deployed import only_one

    clock = Clock(LAST)
    with only_one(place, clock.sleep), pytest.raises(RunError, match="Another process carries out"):
        run_deployed(place, grid_of(place), 1, clock.now, clock.sleep)


def test_what_init_makes_is_private_where_it_must_be_and_is_made_once(place: DeploymentFolder) -> None:
    for secret in ("certificates/ca.key", "certificates/server.key", "nodes/node-1/node.key"):
        assert (place.path / secret).stat().st_mode & 0o077 == 0, secret
    place.check()
    assert "holds a deployment already" in said("init", place.path, "--experiment", "quickstart", "--data", "ml-100k")
    assert "There is a node 'node-1' already" in said("add-node", place.path, "node-1")
    assert "is no name for a node" in said("add-node", place.path, "../evil")
    assert "holds no deployment; make one with `fedrec server init`" in said("status", place.path / "none")
    assert CliRunner().invoke(app, ["status", str(place.path)]).exit_code == 3
    assert CliRunner().invoke(app, ["stop", str(place.path)]).output == "The server does not run.\n"


def test_a_node_may_keep_its_own_key(place: DeploymentFolder, tmp_path: Path) -> None:
    public = place.path / "nodes/node-1.pub"
    own = make_node(place, "shop", public)
    assert not (own / "node.key").exists()
    assert check_node_key(place.path / "nodes/shop.pub") == public.read_bytes()
    (tmp_path / "rsa.pub").write_text("ssh-rsa AAAA", encoding="utf-8")
    assert "is not a public key in OpenSSH format" in said(
        "add-node", place.path, "x", "--public-key", tmp_path / "rsa.pub"
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"host": "0.0.0.0"}, "'0.0.0.0' is not loopback, and whoever reaches Flower's control endpoint can run code"),
        ({"data": "d"}, "give one of 'catalog' (a real deployment) and 'data' (a trial)"),
        ({"waiting": {"minimum_node": 3}}, "Unknown key 'waiting.minimum_node' in server.toml; did you mean"),
        ({"port": 0}, "'port' in server.toml: Input should be greater than or equal to 1 (got '0')."),
    ],
)
def test_a_mistake_in_the_settings_gives_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(Deployment, {"experiment": "quickstart", "catalog": "c"} | changes, "server.toml")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_a_certificate(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["fedrec.example", "10.0.0.1"], NOW, days=30)
    server, ca = tmp_path / "server.crt", tmp_path / "ca.crt"
    for host in ("fedrec.example", "10.0.0.1", "127.0.0.1", "localhost"):
        assert certificate_problem(server, ca, host, NOW) is None
    late = NOW + timedelta(days=31)
    assert "expired on 2026-01-31; `fedrec server renew`" in str(certificate_problem(server, ca, "localhost", late))
    early = NOW - timedelta(days=1)
    assert "is the clock right?" in str(certificate_problem(server, ca, "localhost", early))
    assert "is not for 'other' but for fedrec.example, localhost, 10.0.0.1" in str(
        certificate_problem(server, ca, "other", NOW)
    )
    before = ca.read_bytes()
    make_certificates(tmp_path, ["fedrec.example"], late)  # renewed by the CA that is there
    assert certificate_problem(server, ca, "fedrec.example", late) is None
    assert ca.read_bytes() == before
    make_certificates(tmp_path / "other", ["fedrec.example"], NOW)
    assert "was not signed by" in str(certificate_problem(server, tmp_path / "other" / "ca.crt", "localhost", late))


def test_a_server_without_interactions_says_how_to_cut(tmp_path: Path) -> None:
    data: Dataset = dataset_of(small_rows())
    data.catalog.save(tmp_path / "public")
    (tmp_path / "small.toml").write_text(to_toml(small_document()), encoding="utf-8")
    options = ["--experiment", str(tmp_path / "small.toml"), "--catalog", str(tmp_path / "public"), "--nodes", "0"]
    assert CliRunner().invoke(app, ["init", str(tmp_path / "dep"), *options]).exit_code == 0
    with pytest.raises(ConfigError, match=r'so it cannot cut by their times; set split\.kind = "schedule"'):
        DeploymentFolder(tmp_path / "dep").check()


def test_metrics_and_health_are_served_on_loopback(place: DeploymentFolder) -> None:
    journal = Journal(place, now=lambda: 1000.0, say=lambda line: None)
    journal.note("round", slice=0, round=0, clients=7, seconds=1.5, bytes_down=10, bytes_up=20)
    journal.note("refused", node="x", reason="it lies")
    journal.note("quarantine", node=4, offences=3)
    journal.stand("training", slice=0)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    telemetry = Telemetry(place)
    with telemetry.serving(port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
            text = reply.read().decode()
        assert "\nfedrec_clients_total 7\n" in text
        assert "\nfedrec_refused_total 1\n" in text
        assert "\nfedrec_quarantined_total 1\n" in text
        assert "\nfedrec_last_round_timestamp_seconds 1000\n" in text
        with pytest.raises(HTTPError) as caught:  # no SuperLink runs here
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
        assert caught.value.code == 503
        assert json.load(caught.value)["doing"] == "training"
        caught.value.close()
        telemetry.superlink_pid = os.getpid()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            assert json.load(reply)["up"] is True
        with pytest.raises(RunError, match=f"Port {port} for metrics is taken"), Telemetry(place).serving(port):
            pass


def test_a_server_that_knows_the_catalogue_alone_may_ask_for_masked_sums() -> None:
    masked = {"mode": "distributed", "epsilon": 8.0, "delta": 1e-3}
    experiment = small_experiment(split={"kind": "leave_one_out"}, training__cohort__expected=20.0, privacy=masked)
    check(experiment, catalog_only(dataset_of(small_rows()).catalog, "shop"))
