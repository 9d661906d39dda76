"""A round folds exactly what passed the checks, names who did not, and depends on no order of arrival."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from fedrec import params as named
from fedrec.data.slices import TimeSlice
from fedrec.errors import ProtocolError, RunError
from fedrec.protocol.link import Reply, Verb
from fedrec.protocol.plan import Census, RoundPlan
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import FitTask
from fedrec.server import optimizer
from fedrec.server.gather import Ask, Gathered, Roster, gather
from fedrec.server.judge import initial
from fedrec.server.round import Recipe, round_key, run_round, take_census
from fedrec.server.run import cut
from fedrec.server.sampling import sample
from fedrec.server.state import ServerState
from tests.support import PoolLink, Tamper, dataset_of, same_bytes, small_experiment, small_rows

DATASET = dataset_of(small_rows())
EXPERIMENT = small_experiment(training__cohort__expected=14.0)
RECIPE = Recipe(EXPERIMENT, DATASET.catalog.digest(), lambda: 0.0)
BASE: TimeSlice = cut(EXPERIMENT, DATASET)[0]
N_NODES, BAD = 3, 101
BAD_NAME = "partition 000001"


def fresh() -> ServerState:
    return ServerState(
        "small/001",
        EXPERIMENT.digest(),
        DATASET.catalog.digest(),
        params=initial(EXPERIMENT.model, BASE.n_items, RECIPE),
    )


def census(link: PoolLink) -> Roster:
    return take_census(link, BASE.train, RECIPE)


def fit(link: PoolLink, roster: Roster, state: ServerState, places: np.ndarray | None = None) -> Gathered:
    """Gather one fit round as `run_round` does, but from these places."""
    key = round_key(EXPERIMENT, 0, state.round)
    task = FitTask(window=BASE.train, local=EXPERIMENT.training.local)
    shapes = {name: (value.shape, value.dtype) for name, value in state.params.items()}
    if places is None:
        places = sample(EXPERIMENT.training.cohort, roster.n_clients, key.child("cohort"))

    def plan_for(slots: np.ndarray) -> RoundPlan:
        return RoundPlan(
            0, state.round, task, EXPERIMENT.model, BASE.n_items, state.params, key, RECIPE.catalog_digest, slots
        )

    return gather(Ask(link, roster, plan_for, shapes), places, task.local.clip_norm)


def changed(change: Callable[[Tally], Tally]) -> Tamper:
    """Return a node that answers the census honestly and sends a changed tally."""

    def tamper(verb: Verb, reply: Reply) -> Sequence[Reply]:
        if verb == "census" or reply.document is None:
            return [reply]
        honest = Tally.from_bytes(reply.document)
        return [Reply(reply.node, replace(change(honest), ticket=honest.ticket).to_bytes())]

    return tamper


def instead(*replies: Reply) -> Tamper:
    return lambda verb, reply: [reply] if verb == "census" else replies


def with_tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Tamper:
    return changed(lambda tally: replace(tally, sums={**tally.sums, name: change(tally.sums[name])}))


def poisoned(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def poison(tensor: np.ndarray) -> np.ndarray:
        tensor = tensor.copy()
        tensor.flat[-1] = value
        return tensor

    return poison


BAD_NODES: dict[str, tuple[Tamper, str]] = {
    "NaN": (with_tensor("item", poisoned(np.nan)), "'item' holds a NaN or an infinity"),
    "infinity": (with_tensor("start", poisoned(-np.inf)), "'start' holds a NaN or an infinity"),
    "huge": (with_tensor("item", poisoned(1e30)), "is above the bound"),
    "shape": (with_tensor("item", lambda tensor: tensor[:-1]), "'item' is float32"),
    "flat": (with_tensor("item", lambda tensor: tensor.ravel()), "'item' is float32"),
    "dtype": (with_tensor("item", lambda tensor: tensor.astype(np.float64)), "'item' is float64"),
    "one more name": (changed(lambda t: replace(t, sums={**t.sums, "x": t.sums["start"]})), "missing or unknown: x"),
    "one name less": (
        changed(lambda t: replace(t, sums={n: v for n, v in t.sums.items() if n != "start"})),
        "missing or unknown: start",
    ),
    "empty": (changed(lambda t: replace(t, sums={})), "missing or unknown"),
    "too long": (
        changed(lambda t: replace(t, sums=named.scale(t.sums, 10.1 * t.n_clients / named.norm(t.sums)))),
        "is above the bound",
    ),
    "too many clients": (changed(lambda t: replace(t, n_clients=1000)), "it counts 1000 clients where"),
    "negative clients": (changed(lambda t: replace(t, n_clients=-8)), "it counts -8 clients where"),
    "too few clients": (
        changed(lambda t: replace(t, n_clients=0, sums=named.scale(t.sums, 1.0))),
        "it carries sums of no clients",
    ),
    "statistics": (changed(lambda t: replace(t, stats={"loss": float("inf")})), "statistics are not finite"),
    "garbage": (instead(Reply(BAD, b"\x80\x04garbage, perhaps a pickle")), "Not a fedrec document"),
    "nothing in it": (instead(Reply(BAD, b"")), "Not a fedrec document"),
    "another kind": (instead(Reply(BAD, Census(node="x", n_clients=1).to_bytes())), "Expected a 'tally' document"),
    "an error": (instead(Reply(BAD, None, "the node failed: out of memory")), "the node failed: out of memory"),
    "silence": (instead(), "it did not answer in time"),
}


@pytest.mark.parametrize("what", BAD_NODES)
def test_a_bad_node_is_named_and_the_others_count_as_if_it_had_nobody(what: str) -> None:
    tamper, reason = BAD_NODES[what]
    roster = census(PoolLink(DATASET, N_NODES))
    got = fit(PoolLink(DATASET, N_NODES, {BAD: tamper}), roster, fresh())
    [refusal] = got.refused
    assert refusal["node"] == BAD_NAME
    assert reason in refusal["reason"]

    nobody = changed(lambda tally: Tally({}, 0, {}))
    without = fit(PoolLink(DATASET, N_NODES, {BAD: nobody}), roster, fresh())
    assert not without.refused
    assert 0 < without.n_clients < without.cohort
    assert (got.n_clients, got.stats, got.cohort) == (without.n_clients, without.stats, without.cohort)
    assert same_bytes(got.sums, without.sums)


def test_the_whole_round_goes_on_without_the_bad_node() -> None:
    def after(tamper: Tamper) -> tuple[ServerState, dict[str, object]]:
        link = PoolLink(DATASET, N_NODES, {BAD: tamper})
        return run_round(fresh(), link, RECIPE, BASE, census(link))

    state, record = after(BAD_NODES["NaN"][0])
    expected, honest = after(changed(lambda tally: Tally({}, 0, {})))
    assert same_bytes(state.params, expected.params)
    assert same_bytes(state.memory, expected.memory)
    assert record["refused"] == [{"node": BAD_NAME, "reason": "'item' holds a NaN or an infinity"}]
    same = ("loss", "clipped", "cohort", "clients", "bytes_down", "update_norm")
    assert {name: record[name] for name in same} == {name: honest[name] for name in same}
    assert state.rounds == (record,)
    assert state.round == 1


def test_a_second_answer_and_a_stranger_are_refused_and_change_nothing() -> None:
    twice: Tamper = lambda verb, reply: [reply] if verb == "census" else [reply, reply]  # noqa: E731
    stranger: Tamper = lambda verb, reply: [reply] if verb == "census" else [Reply(7, reply.document), reply]  # noqa: E731
    roster = census(PoolLink(DATASET, N_NODES))
    honest = fit(PoolLink(DATASET, N_NODES), roster, fresh())
    got = fit(PoolLink(DATASET, N_NODES, {100: stranger, BAD: twice}), roster, fresh())
    assert list(got.refused) == [
        {"node": "node 7", "reason": "it answered twice or was not asked"},
        {"node": BAD_NAME, "reason": "it answered twice or was not asked"},
    ]
    assert (got.n_clients, got.stats) == (honest.n_clients, honest.stats)
    assert same_bytes(got.sums, honest.sums)


def test_an_error_after_the_answer_does_not_take_the_answer_back() -> None:
    late = Reply(BAD, None, "the node failed: late")
    tamper: Tamper = lambda verb, reply: [reply] if verb == "census" else [reply, late]  # noqa: E731
    roster = census(PoolLink(DATASET, N_NODES))
    got = fit(PoolLink(DATASET, N_NODES, {BAD: tamper}), roster, fresh())
    assert got.n_clients == fit(PoolLink(DATASET, N_NODES), roster, fresh()).n_clients


def test_a_tally_without_a_loss_does_not_end_the_run() -> None:
    mute = changed(lambda tally: replace(tally, stats={}))
    link = PoolLink(DATASET, N_NODES, dict.fromkeys(range(100, 100 + N_NODES), mute))
    state, record = run_round(fresh(), link, RECIPE, BASE, census(link))
    assert record["loss"] is None
    assert record["clients"] > 0
    assert not same_bytes(state.params, fresh().params)


@pytest.mark.parametrize("what", ["NaN", "an error", "silence", "garbage"])
def test_when_every_node_fails_the_run_stops_and_says_why(what: str) -> None:
    tamper, reason = BAD_NODES[what]
    link = PoolLink(DATASET, 1, {100: tamper if what != "garbage" else instead(Reply(100, b"garbage"))})
    if what == "an error":
        link = PoolLink(DATASET, 1, {100: instead(Reply(100, None, reason))})
    with pytest.raises(RunError, match=r"^Every node failed in this round; the first: partition 000000: ") as caught:
        run_round(fresh(), link, RECIPE, BASE, census(link))
    assert reason in str(caught.value)


def test_an_empty_cohort_leaves_the_parameters_as_they_were() -> None:
    experiment = small_experiment(training__cohort__expected=1e-9, training__average=0.0)
    recipe = replace(RECIPE, experiment=experiment)
    link = PoolLink(DATASET, N_NODES)
    before = fresh().advanced(memory={"start/step": np.asarray(3.0, np.float32)})
    state, record = run_round(before, link, recipe, BASE, census(link))
    assert same_bytes(state.params, before.params)
    assert same_bytes(state.memory, before.memory)
    assert (state.round, record["cohort"], record["clients"], record["loss"]) == (1, 0, 0, None)
    assert (record["refused"], record["bytes_down"], link.plans) == ([], 0, [])


def test_the_order_of_arrival_does_not_change_a_byte() -> None:
    states, records = [], []
    for order in ([0, 1, 2], [2, 0, 1], [2, 1, 0]):
        link = PoolLink(DATASET, N_NODES, order=lambda replies, order=order: [replies[i] for i in order])
        state = fresh()
        for _ in range(2):
            state, _ = run_round(state, link, RECIPE, BASE, census(link))
        states.append(state)
        records.append(state.rounds)
    assert records[0] == records[1] == records[2]
    for state in states[1:]:
        assert same_bytes(state.params, states[0].params)
        assert same_bytes(state.memory, states[0].memory)


def test_a_round_is_the_optimizers_step_on_the_mean_update() -> None:
    link = PoolLink(DATASET, N_NODES)
    roster = census(link)
    got = fit(link, roster, fresh())
    state, record = run_round(fresh(), link, RECIPE, BASE, roster)
    mean = {name: (value / got.n_clients).astype(np.float32) for name, value in got.sums.items()}
    rate = optimizer.speed(EXPERIMENT.training.base, 0)
    expected, _ = optimizer.step(EXPERIMENT.training.server, fresh().params, {}, mean, rate)
    for name in expected:
        np.testing.assert_allclose(state.params[name], expected[name], rtol=1e-6, atol=1e-8)
    assert record["loss"] == got.stats["loss"] / got.n_clients
    assert record["update_norm"] == pytest.approx(named.norm(mean))
    assert record["clients"] == record["cohort"] == len(np.concatenate([plan.slots for plan in link.plans])) / 2


def test_the_split_over_nodes_hardly_shows_in_the_sum() -> None:
    """The same people are chosen only if everybody is, for the roster numbers clients node by node."""
    sums = []
    for n_nodes in (1, 3):
        link = PoolLink(DATASET, n_nodes)
        roster = census(link)
        everybody = np.arange(roster.n_clients, dtype=np.int64)
        got = fit(link, roster, fresh(), everybody)
        assert got.n_clients == roster.n_clients
        sums.append(got.sums)
    for name in sums[0]:
        np.testing.assert_allclose(sums[0][name], sums[1][name], rtol=1e-4, atol=1e-6)


def test_bytes_are_counted_as_they_travelled() -> None:
    link = PoolLink(DATASET, N_NODES)
    got = fit(link, census(link), fresh())
    assert got.bytes_down == sum(len(plan.to_bytes()) for plan in link.plans)
    assert got.bytes_up > N_NODES * named.n_bytes(fresh().params)


def test_a_roster_deals_places_to_nodes_in_order() -> None:
    roster = Roster(((12, "a", 3), (10, "b", 0), (11, "c", 4)))
    assert roster.n_clients == 7
    dealt = roster.slots(np.array([0, 2, 3, 6]))
    assert {node: own.tolist() for node, own in dealt.items()} == {12: [0, 2], 11: [0, 3]}
    assert roster.slots(np.array([], np.int64)) == {}
    assert (roster.name(11), roster.name(99)) == ("c", "node 99")


def test_the_census_orders_nodes_by_name_and_leaves_out_those_that_fail() -> None:
    broken = Reply(BAD, None, "the node failed: no data")
    link = PoolLink(DATASET, N_NODES, {BAD: lambda verb, reply: [broken]}, order=lambda replies: replies[::-1])
    roster = census(link)
    assert [(node, name) for node, name, _ in roster.nodes] == [(100, "partition 000000"), (102, "partition 000002")]
    whole = census(PoolLink(DATASET, N_NODES))
    assert roster.n_clients == sum(n for node, _, n in whole.nodes if node != BAD)
    times = np.asarray(DATASET.log.time)
    assert whole.n_clients == len(np.unique(DATASET.log.user[times < BASE.train.end]))
    _, record = run_round(fresh(), link, RECIPE, BASE, roster)
    assert record["clients"] == record["cohort"] > 0
    assert record["refused"] == []


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (
            lambda verb, reply: [Reply(reply.node, None, "the node failed: no data")],
            "node 100: the node failed: no data",
        ),
        (lambda verb, reply: [Reply(reply.node, b"garbage")], "node 100: Not a fedrec document"),
        (lambda verb, reply: [], "none is connected"),
    ],
)
def test_a_census_that_nobody_answers_stops_the_run_and_says_why(tamper: Tamper, told: str) -> None:
    with pytest.raises(RunError, match=r"^No node answered the census") as caught:
        census(PoolLink(DATASET, 1, {100: tamper}))
    assert told in str(caught.value)


def test_a_node_with_other_data_says_so() -> None:
    with pytest.raises(ProtocolError, match="The server numbers items by catalogue 000000000000, this node has"):
        take_census(PoolLink(DATASET, 1), BASE.train, replace(RECIPE, catalog_digest="0" * 64))
