"""Flower apps that know nothing of fedrec run unchanged on `InProcessGrid`."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedrec.client.app import client_app
from fedrec.client.pool import LogPool
from fedrec.data.slices import TimeWindow
from fedrec.errors import ProtocolError
from fedrec.grid.in_process import SERVER_NODE_ID, InProcessGrid
from fedrec.protocol.flower import from_record
from fedrec.protocol.plan import Census, CensusRequest
from fedrec.server.app import GridLink, server_app
from tests.support import START, dataset_of, small_rows

DATASET = dataset_of(small_rows())


def plain_client_app() -> ClientApp:
    """Return an app in plain Flower style: each node pulls the weights towards its own number."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"].to_numpy_ndarrays()
        target = float(context.node_config["partition-id"])
        new = ArrayRecord([array + context.run_config["rate"] * (target - array) for array in arrays])
        metrics = MetricRecord({"num-examples": 10, "loss": float(abs(target - arrays[0]).mean())})
        return Message(RecordDict({"arrays": new, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        [array] = message.content["arrays"].to_numpy_ndarrays()
        metrics = MetricRecord({"num-examples": 10, "mean": float(array.mean())})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @app.query()
    def visits(message: Message, context: Context) -> Message:
        seen = context.state.get("visits")
        before = int(seen["n"]) if isinstance(seen, MetricRecord) else 0
        context.state["visits"] = MetricRecord({"n": before + 1})
        return Message(RecordDict({"visits": MetricRecord({"n": before + 1})}), reply_to=message)

    @app.query("raise")
    def fail(message: Message, context: Context) -> Message:
        raise ValueError(f"node {context.node_config['partition-id']} has no data")

    return app


def plain_grid(n_nodes: int = 3) -> InProcessGrid:
    configs = [{"partition-id": place, "num-partitions": n_nodes} for place in range(n_nodes)]
    return InProcessGrid(plain_client_app(), configs, {"rate": 0.5})


def query(grid: InProcessGrid, kind: str, nodes: list[int]) -> list[Message]:
    messages = [Message(RecordDict(), dst_node_id=node, message_type=kind) for node in nodes]
    return list(grid.send_and_receive(messages))


def test_flowers_own_fedavg_runs_on_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    app = ServerApp()
    found = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        assert context.run_config["rate"] == 0.5
        strategy = FedAvg(min_available_nodes=3)
        start = ArrayRecord([np.full(4, 9.0, np.float32)])
        found.append(strategy.start(grid=grid, initial_arrays=start, num_rounds=3))

    grid = plain_grid()
    app(grid, grid.server_context())
    [result] = found
    [weights] = result.arrays.to_numpy_ndarrays()
    np.testing.assert_allclose(weights, 1 + 8 * 0.5**3)  # towards the mean of 0, 1, 2
    assert [result.evaluate_metrics_clientapp[n]["mean"] for n in (1, 2, 3)] == [5.0, 3.0, 2.0]
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(8.0)


def test_each_node_keeps_its_own_state_between_messages() -> None:
    grid = plain_grid()
    first, *others = list(grid.get_node_ids())
    for _ in range(3):
        query(grid, "query", [first])
    replies = query(grid, "query", [first, *others])
    assert [int(reply.content["visits"]["n"]) for reply in replies] == [4, 1, 1]


def test_node_ids_are_stable_and_not_the_servers() -> None:
    assert list(plain_grid().get_node_ids()) == list(plain_grid().get_node_ids()) == [2, 3, 4]
    assert SERVER_NODE_ID not in plain_grid().get_node_ids()


def test_an_exception_becomes_an_error_reply_and_the_others_answer() -> None:
    grid = plain_grid()
    failed = query(grid, "query.raise", [3])
    [reply] = failed
    assert reply.has_error()
    assert "node 1 has no data" in reply.error.reason
    assert reply.metadata.src_node_id == 3
    assert not query(grid, "query", [3])[0].has_error()


def test_a_message_that_no_handler_takes_and_an_unknown_node_give_error_replies() -> None:
    grid = plain_grid()
    [unhandled] = query(grid, "query.nothing", [2])
    assert unhandled.has_error()
    [nobody] = query(grid, "query", [99])
    assert nobody.has_error()
    assert nobody.error.reason == "no such node"
    assert nobody.metadata.src_node_id == 99


def test_replies_are_pulled_once_and_carry_the_id_of_their_message() -> None:
    grid = plain_grid()
    messages = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in (2, 3)]
    ids = list(grid.push_messages(messages))
    assert len(set(ids)) == 2
    replies = list(grid.pull_messages(ids))
    assert [reply.metadata.reply_to_message_id for reply in replies] == ids
    assert list(grid.pull_messages(ids)) == []


def test_create_message_makes_what_send_and_receive_takes() -> None:
    grid = plain_grid()
    message = grid.create_message(RecordDict({"c": ConfigRecord({"a": 1})}), "query", 2, "round 1")
    [reply] = grid.send_and_receive([message])
    assert reply.metadata.group_id == "round 1"
    assert not reply.has_error()


def fedrec_grid(n_nodes: int) -> InProcessGrid:
    pools = [LogPool.partition(DATASET.log, DATASET.catalog, place, n_nodes) for place in range(n_nodes)]
    return InProcessGrid(client_app(lambda context: pools[context.node_id - 2]), [{}] * n_nodes, {})


def test_fedrecs_apps_meet_over_it() -> None:
    grid = fedrec_grid(2)
    request = CensusRequest(window=TimeWindow(start=0, end=2**40), catalog_digest=DATASET.catalog.digest()).to_bytes()
    found: list[tuple[int, str, int]] = []

    def main(link: GridLink, context: Context) -> None:
        link.wait_for(2, timeout_seconds=0.0)
        for reply in link.exchange("census", dict.fromkeys(link.nodes(), request), None):
            assert reply.document is not None
            census = Census.from_bytes(reply.document)
            found.append((reply.node, census.node, census.n_clients))

    server_app(main)(grid, grid.server_context())
    n = DATASET.log.n_users
    assert found == [(2, "partition 000000", n - n // 2), (3, "partition 000001", n // 2)]


def test_a_link_passes_on_why_a_node_failed() -> None:
    request = CensusRequest(window=TimeWindow(start=START, end=START + 1), catalog_digest="0" * 64).to_bytes()
    link = GridLink(fedrec_grid(1))
    [other] = link.exchange("census", {2: request}, None)
    assert other.document is None
    assert other.error.startswith("the node failed: ProtocolError: The server numbers items by catalogue 000000000000")
    [garbled] = link.exchange("run", {2: b"not a plan"}, None)
    assert "Not a fedrec document" in garbled.error
    [stranger] = GridLink(plain_grid(1)).exchange("run", {2: b"x"}, None)
    assert stranger.document is None


def test_a_reply_without_a_document_is_an_error() -> None:
    app = ClientApp()

    @app.query("census")
    def census(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    [reply] = GridLink(InProcessGrid(app, [{}], {})).exchange("census", {2: b"x"}, None)
    assert reply.document is None
    assert "holds no fedrec document" in reply.error
    with pytest.raises(ProtocolError, match="different software"):
        from_record(RecordDict())


class Telling(InProcessGrid):
    """Says itself that a node is gone, as a SuperLink does: the error comes from node 1."""

    def _deliver(self, message: Message) -> Message:
        reply = super()._deliver(message)
        if reply.has_error():
            reply.metadata.__dict__["_src_node_id"] = 1
        return reply


def test_the_grids_own_word_that_a_node_is_gone_is_taken_as_that_nodes_failure() -> None:
    link = GridLink(Telling(client_app(lambda context: LogPool(DATASET.log, DATASET.catalog)), [{}], {}))
    window = TimeWindow(start=0, end=2**40)
    document = CensusRequest(window=window, catalog_digest=DATASET.catalog.digest()).to_bytes()
    replies = {reply.node: reply for reply in link.exchange("census", {2: document, 7: document}, 5.0)}
    assert sorted(replies) == [2, 7]
    assert replies[2].document is not None
    assert (replies[7].document, replies[7].error) == (None, "the node failed: no such node")
