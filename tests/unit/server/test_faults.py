"""What nodes may do to a round: replay, flood, fall silent, lie again and again; none of it gets in."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mutations import mutated
from fedrec.errors import FedrecError, RunError, TallyRefused
from fedrec.protocol import wire
from fedrec.protocol.link import Reply, Verb
from fedrec.protocol.parcels import Freight
from fedrec.protocol.plan import RoundPlan
from fedrec.server.gather import _opened
from fedrec.server.lifelong import run_stream
from fedrec.server.registry import Registry
from fedrec.server.round import Recipe, run_round, take_census
from fedrec.server.run import cut
from fedrec.server.state import ServerState
from fedrec.server.work import Desk, Event
from tests.support import PoolLink, Tamper, dataset_of, same_bytes, small_experiment, small_rows
from tests.unit.server.test_round import BAD, BAD_NAME, BASE, DATASET, N_NODES, RECIPE, census, fresh

FUZZED = 10_000


def with_training(**changes: Any) -> Recipe:
    experiment = small_experiment(**{f"training__{name}": value for name, value in changes.items()})
    return replace(RECIPE, experiment=experiment)


class Replaying:
    """A node that sends what it, or another node, sent before."""

    def __init__(self) -> None:
        self.kept: bytes | None = None

    def __call__(self, verb: Verb, reply: Reply) -> Sequence[Reply]:
        if verb == "census":
            return [reply]
        first, self.kept = self.kept is None, self.kept or reply.document
        return [reply] if first else [Reply(reply.node, self.kept)]


def test_a_replay_of_an_older_round_is_refused_and_the_round_is_as_without_the_node() -> None:
    link = PoolLink(DATASET, N_NODES, {BAD: Replaying()})
    state, first = run_round(fresh(), link, RECIPE, BASE, census(link))
    assert first["refused"] == []
    state, second = run_round(state, link, RECIPE, BASE, census(link))
    [refusal] = second["refused"]
    assert refusal == {
        "node": BAD_NAME, "reason": "it answers another request: a replay, a late answer or another node's"
    }  # fmt: skip
    assert state.offences == {str(BAD): 1}


def test_another_nodes_answer_is_refused() -> None:
    heard: list[bytes | None] = []

    def listens(verb: Verb, reply: Reply) -> Sequence[Reply]:
        heard.append(reply.document)
        return [reply]

    def repeats(verb: Verb, reply: Reply) -> Sequence[Reply]:
        return [reply] if verb == "census" else [Reply(reply.node, heard[-1])]

    link = PoolLink(DATASET, N_NODES, {100: listens, BAD: repeats})
    _, record = run_round(fresh(), link, RECIPE, BASE, census(link))
    assert [one["reason"][:27] for one in record["refused"]] == ["it answers another request:"]


def test_an_old_census_is_refused() -> None:
    kept: list[Reply] = []

    def stale(verb: Verb, reply: Reply) -> Sequence[Reply]:
        kept.append(reply)
        return [kept[0]]

    link = PoolLink(DATASET, N_NODES, {BAD: stale})
    assert len(census(link).nodes) == N_NODES
    assert len(census(link).nodes) == N_NODES - 1
    alone = PoolLink(DATASET, 1, {100: lambda verb, reply: [Reply(100, kept[0].document)]})
    with pytest.raises(RunError, match="it answers another request"):
        take_census(alone, BASE.train, RECIPE)


def honest_exchange() -> tuple[RoundPlan, bytes, Any]:
    """Return a plan as the server sends it, an honest answer, and what the server expects."""
    from fedrec.protocol.tally import Expectation

    link = PoolLink(DATASET, N_NODES)
    documents: list[bytes] = []

    def listens(verb: Verb, reply: Reply) -> Sequence[Reply]:
        if verb == "run" and reply.document is not None:
            documents.append(reply.document)
        return [reply]

    link.tamper[100] = listens
    run_round(fresh(), link, RECIPE, BASE, census(link))
    shapes = {name: (value.shape, value.dtype) for name, value in fresh().params.items()}
    plan = link.plans[0]
    return plan, documents[0], Expectation(shapes, len(plan.slots), RECIPE.experiment.training.local.clip_norm)


def test_ten_thousand_mutated_messages_and_none_gets_in() -> None:
    plan, document, expectation = honest_exchange()
    _opened(document, plan, expectation)
    rng, refused = random.Random(17), 0
    for _ in range(FUZZED):
        bad = mutated(document, rng, len(plan.slots))
        if bad == document:
            refused += 1  # nothing was changed
            continue
        try:
            _opened(bad, plan, expectation)
        except FedrecError:  # anything else would have ended the server
            refused += 1
        else:
            pytest.fail(f"accepted: {bad[:300]!r}")
    assert refused == FUZZED


def test_fuzzed_rounds_end_as_without_the_offender_who_is_named_and_then_asked_no_more() -> None:
    rng = random.Random(5)
    sent: list[RoundPlan] = []

    def fuzzes(verb: Verb, reply: Reply) -> Sequence[Reply]:
        if verb == "census" or reply.document is None:
            return [reply]
        return [Reply(reply.node, mutated(reply.document, rng, len(link.plans[-1].slots)))]

    def nothing(verb: Verb, reply: Reply) -> Sequence[Reply]:
        return [reply] if verb == "census" else []

    found = []
    for tamper in (fuzzes, nothing):
        link = PoolLink(DATASET, N_NODES, {BAD: tamper})
        state, roster = fresh(), census(link)
        for _ in range(5):
            state, record = run_round(state, link, RECIPE, BASE, roster)
            sent.append(link.plans[-1])
            assert [one["node"] for one in record["refused"]] == [BAD_NAME]
        found.append(state)
    assert same_bytes(found[0].params, found[1].params)
    assert found[0].offences == {str(BAD): 5}
    assert found[1].offences == {}  # to be slow or gone is no offence
    assert found[0].quarantined(3) == {BAD}
    assert found[0].quarantined(None) == frozenset()


def test_a_node_in_quarantine_is_asked_no_more_and_the_report_says_so(tmp_path: Path) -> None:
    experiment, dataset = small_experiment(split__later=0, evaluation__local_only__people=0), dataset_of(small_rows())
    recipe = Recipe(experiment, dataset.catalog.digest(), lambda: 0.0)

    def lies(verb: Verb, reply: Reply) -> Sequence[Reply]:
        return [reply] if verb == "census" else [Reply(reply.node, b"lies")]

    link = PoolLink(dataset, N_NODES, {BAD: lies})
    events: list[Event] = []
    desk = Desk(Registry(tmp_path), dataset.catalog, lambda state: None, events.append)
    state = ServerState("small/001", experiment.digest(), recipe.catalog_digest)
    [(state, _)] = run_stream(state, link, cut(experiment, dataset), recipe, desk)
    told = [event.record for event in events if event.kind == "quarantine"]
    assert told == [{"node": BAD, "offences": 3}]
    assert [len(record["refused"]) for record in state.rounds] == [1, 1, 0, 0, 0, 0]  # the first was at the counts
    assert ServerState.from_record(*state.to_record()).quarantined(3) == {BAD}


def test_a_round_below_its_minimum_is_abandoned_and_learns_nothing() -> None:
    recipe = with_training(minimum_share=0.9, cohort__expected=14.0)
    silent: Tamper = lambda verb, reply: [reply] if verb == "census" else []  # noqa: E731
    link = PoolLink(DATASET, N_NODES, {BAD: silent})
    state, record = run_round(fresh(), link, recipe, BASE, census(link))
    assert same_bytes(state.params, fresh().params)
    assert state.round == 1
    assert record["update_norm"] == 0.0
    assert record["refused"][-1]["reason"].startswith("the round is abandoned: ")
    whole, _ = run_round(fresh(), PoolLink(DATASET, N_NODES), recipe, BASE, census(link))
    assert not same_bytes(whole.params, fresh().params)


class Lazy(PoolLink):
    """Answers one node at a time, so that a round that is full can be closed before the others compute."""

    def exchange(
        self,
        verb: Verb,
        documents: Mapping[int, bytes],
        timeout_seconds: float | None,
        freight: Freight | None = None,
    ) -> Iterable[Reply]:
        for node, document in documents.items():
            yield from super().exchange(verb, {node: document}, timeout_seconds, freight)


def test_with_over_selection_the_round_is_closed_when_it_is_full() -> None:
    recipe = with_training(over_selection=1.0, cohort={"kind": "fixed", "size": 8})
    link = Lazy(DATASET, 6)
    _, record = run_round(fresh(), link, recipe, BASE, take_census(link, BASE.train, recipe))
    assert record["cohort"] == 16
    assert 8 <= record["clients"] < 16
    assert record["refused"] == []  # nobody is blamed for being slower than was needed


def test_a_message_that_is_far_too_long_is_not_even_read() -> None:
    plan, document, expectation = honest_exchange()
    with pytest.raises(TallyRefused, match="bytes long where"):
        _opened(document + bytes(64 << 20), plan, expectation)
    header = {"n_clients": 1, "stats": {"loss": 1e300}, "ticket": plan.ticket}
    with pytest.raises(TallyRefused, match="beyond what so many clients can have"):
        _opened(wire.pack("tally", header, {}), plan, expectation)
