"""Frozen tensors travel to a node once; rounds are, bit for bit, those whose plans carry everything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedrec.client.app import client_app
from fedrec.client.pool import LogPool
from fedrec.client.shelf import FolderShelf, MemoryShelf, Shelf
from fedrec.config import Experiment
from fedrec.data.sources import load_dataset
from fedrec.grid.in_process import InProcessGrid
from fedrec.models.freeze import trainable
from fedrec.params import Params, n_bytes
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.settings import SecureSum
from fedrec.protocol.flower import from_record, parcels_of, to_record
from fedrec.protocol.identities import SIMULATION
from fedrec.protocol.link import Reply, Verb
from fedrec.protocol.parcels import Freight, Missing
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import CountTask
from fedrec.random import Key
from fedrec.server.app import GridLink
from fedrec.server.gather import Ask, Roster, gather
from fedrec.server.judge import initial
from fedrec.server.round import Recipe, run_round, take_census
from fedrec.server.run import cut
from fedrec.server.secure import secure_gather
from fedrec.server.start import public_vectors, source_of
from fedrec.server.state import ServerState
from tests.support import PoolLink, dataset_of, merged, same_bytes, small_document, small_project, small_rows

DATASET = dataset_of(small_rows())
MODEL: dict[str, Any] = {
    "kind": "text_transformer", "dim": 32, "heads": 2, "expand": 2, "length": 8, "residual": 2, "lora": 2,
    "train": "adapters", "features": {"rank": 20, "fourier": 0}, "softmax": {"kind": "sampled", "negatives": 8},
}  # fmt: skip
NODES = 3


def experiment(**training: Any) -> Experiment:
    cohort = {"kind": "poisson", "expected": 25.0}
    return Experiment.parse(merged({**small_document(), "model": MODEL}, {"training": {"cohort": cohort, **training}}))


EXPERIMENT = experiment()
BASE = cut(EXPERIMENT, DATASET)[0]


def recipe_of(settings: Experiment) -> Recipe:
    vectors = public_vectors(settings, DATASET.catalog, BASE.n_items, source_of(settings))
    return Recipe(settings, DATASET.catalog.digest(), lambda: 0.0, vectors=vectors)


def fresh(recipe: Recipe) -> ServerState:
    params = initial(recipe.experiment.model, BASE.n_items, recipe)
    return ServerState("small/001", recipe.experiment.digest(), recipe.catalog_digest, params=params)


def frozen(params: Params) -> int:
    """Return the bytes of all frozen tensors that are large enough to be named."""
    trained = set(trainable(EXPERIMENT.model, params))
    return n_bytes({name: v for name, v in params.items() if name not in trained and v.nbytes >= 4096})


class Nodes:
    """Three nodes in this process, each with a shelf of its own; a test may change what one hears and says."""

    def __init__(self, make: Callable[[int], Shelf] = lambda node: MemoryShelf()) -> None:
        self.shelves = {node: make(node) for node in range(2, 2 + NODES)}
        self.pools = {
            node: LogPool.partition(DATASET.log, DATASET.catalog, node - 2, NODES) for node in range(2, 2 + NODES)
        }
        self.heard: list[tuple[int, set[str]]] = []
        self.mask: list[tuple[int, set[str]]] = []
        self.hears: dict[int, Callable[[dict[str, bytes]], dict[str, bytes]]] = {}
        self.says: dict[int, Callable[[bytes], bytes]] = {}
        app = client_app(lambda c: self.pools[c.node_id], lambda c: SIMULATION, lambda c: self.shelves[c.node_id])

        def carried(message: Message, context: Any) -> Message:
            node, document = context.node_id, from_record(message.content)
            parcels = self.hears.get(node, lambda parcels: parcels)(parcels_of(message.content))
            if message.metadata.message_type == "train.mask":
                self.mask.append((node, set(parcels)))
            if message.metadata.message_type == "train.run":
                self.heard.append((node, set(parcels)))
            message.content = to_record(document, parcels)
            reply = app(message, context)
            if message.metadata.message_type == "train.run" and node in self.says:
                reply.content = to_record(self.says[node](from_record(reply.content)))
            return reply

        self.grid = InProcessGrid(carried, [{}] * NODES, {})  # type: ignore[arg-type]

    def link(self) -> GridLink:
        return GridLink(self.grid)


class Whole(PoolLink):
    """Nodes that are told everything in every plan, as it was before tensors had names."""

    def exchange(
        self,
        verb: Verb,
        documents: Mapping[int, bytes],
        timeout_seconds: float | None,
        freight: Freight | None = None,
    ) -> Iterable[Reply]:
        if verb == "run" and freight is not None:
            documents = {n: RoundPlan.from_bytes(one, freight.get).to_bytes() for n, one in documents.items()}
        return super().exchange(verb, documents, timeout_seconds)


def rounds(link: Any, n: int, settings: Experiment = EXPERIMENT, state: ServerState | None = None) -> ServerState:
    recipe = recipe_of(settings)
    roster = take_census(link, BASE.train, recipe)
    state = state or fresh(recipe)
    for _ in range(n):
        state, _ = run_round(state, link, recipe, BASE, roster)
    return state


def records(state: ServerState, name: str) -> list[Any]:
    return [record[name] for record in state.rounds]


@pytest.mark.parametrize("download", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", ["memory", "folder"])
def test_rounds_are_bit_for_bit_those_of_plans_that_carry_everything(kept: str, download: str, tmp_path: Path) -> None:
    settings = experiment(download=download)
    nodes = Nodes(lambda node: MemoryShelf() if kept == "memory" else FolderShelf(tmp_path / str(node)))
    here, there = rounds(nodes.link(), 4, settings), rounds(Whole(DATASET, NODES), 4, settings)
    assert same_bytes(here.params, there.params)
    assert same_bytes(here.average, there.average)
    assert records(here, "loss") == records(there, "loss")
    assert not same_bytes(here.params, fresh(recipe_of(settings)).params)


def test_the_first_plan_to_a_node_carries_what_is_frozen_and_no_later_one_does() -> None:
    nodes = Nodes()
    state = rounds(nodes.link(), 3)
    names = nodes.heard[0][1]
    assert len(names) == 4
    assert nodes.heard == [(n, names) for n in (2, 3, 4)] + [(n, set()) for n in (2, 3, 4, 2, 3, 4)]
    first, second, third = records(state, "bytes_down")
    size = frozen(state.params)
    assert NODES * size < first - second < NODES * (size + 400 * len(names))
    assert abs(third - second) < 1000
    assert second < 0.5 * first


def test_a_node_that_lost_its_shelf_says_so_and_takes_part_all_the_same() -> None:
    nodes = Nodes()
    link, recipe = nodes.link(), recipe_of(EXPERIMENT)
    roster = take_census(link, BASE.train, recipe)
    state, _ = run_round(fresh(recipe), link, recipe, BASE, roster)
    names, nodes.heard = nodes.heard[0][1], []
    nodes.shelves[3] = MemoryShelf()
    state, record = run_round(state, link, recipe, BASE, roster)
    assert nodes.heard == [(2, set()), (3, set()), (4, set()), (3, names)]
    assert record["refused"] == []
    assert state.offences == {}
    assert (
        frozen(state.params) < record["bytes_down"] - state.rounds[0]["bytes_down"] / NODES < 2 * frozen(state.params)
    )
    nodes.heard = []
    state, _ = run_round(state, link, recipe, BASE, roster)
    assert nodes.heard == [(2, set()), (3, set()), (4, set())]
    assert same_bytes(state.params, rounds(Whole(DATASET, NODES), 3).params)


def test_a_shelf_that_is_too_small_costs_bytes_and_nothing_else() -> None:
    nodes = Nodes(lambda node: MemoryShelf(0 if node == 3 else 10_000))
    state = rounds(nodes.link(), 3)
    assert [record["refused"] for record in state.rounds] == [[], [], []]
    assert same_bytes(state.params, rounds(Whole(DATASET, NODES), 3).params)


def test_a_server_that_starts_again_begins_with_whole_plans_and_comes_to_the_same_bytes() -> None:
    nodes = Nodes()
    before = rounds(nodes.link(), 2)
    nodes.heard = []
    state = rounds(nodes.link(), 2, state=before)  # what it knew of its nodes is gone with its link
    assert [bool(names) for _, names in nodes.heard] == [True] * 3 + [False] * 3
    assert same_bytes(state.params, rounds(Whole(DATASET, NODES), 4).params)


def test_a_poisoned_tensor_is_refused_by_its_node_and_sent_again_in_the_next_round() -> None:
    nodes = Nodes()
    nodes.hears[3] = lambda parcels: {sha256: parcel[:-1] + b"!" for sha256, parcel in parcels.items()}
    link, recipe = nodes.link(), recipe_of(EXPERIMENT)
    roster = take_census(link, BASE.train, recipe)
    state, record = run_round(fresh(recipe), link, recipe, BASE, roster)
    [refused] = record["refused"]
    assert "ProtocolError: The tensor sent as" in refused["reason"]
    assert state.offences == {}
    del nodes.hears[3]
    nodes.heard = []
    _, record = run_round(state, link, recipe, BASE, roster)
    assert record["refused"] == []
    assert [bool(names) for _, names in nodes.heard] == [False, True, False]


def test_a_node_that_lacks_what_it_was_just_sent_has_failed_after_one_more_try() -> None:
    nodes = Nodes()
    nodes.hears[3] = lambda parcels: {}
    state = rounds(nodes.link(), 2)
    assert [node for node, _ in nodes.heard] == [2, 3, 4, 3] * 2
    for record in state.rounds:
        [refused] = record["refused"]
        assert "it lacks" in refused["reason"]
        assert "that it has just been sent" in refused["reason"]
    assert state.offences == {}


@pytest.mark.parametrize("digests", [("0" * 64,), ("x",)])
def test_a_node_that_lacks_what_no_plan_named_says_what_no_honest_node_says(digests: tuple[str, ...]) -> None:
    nodes = Nodes()
    nodes.says[3] = lambda document: Missing(digests=digests).to_bytes()
    state = rounds(nodes.link(), 1)
    assert state.offences == {"3": 1}
    assert [node for node, _ in nodes.heard] == [2, 3, 4]
    assert "Expected a 'tally' document, got a 'missing'" in state.rounds[0]["refused"][0]["reason"]


def test_what_a_teacher_and_its_pupil_have_in_common_travels_once() -> None:
    nodes = Nodes()
    local = {"imitate": 0.5}
    settings = experiment(local=local)
    recipe = recipe_of(settings)
    link = nodes.link()
    roster = take_census(link, BASE.train, recipe)
    state = fresh(recipe)
    state = replace(state, teacher=state.params)
    state, _ = run_round(state, link, recipe, BASE, roster)
    names = nodes.heard[0][1]
    trained = [v for v in trainable(EXPERIMENT.model, state.params) if state.params[v].nbytes >= 4096]
    plain = Nodes()
    rounds(plain.link(), 1)
    assert len(names) == len(plain.heard[0][1]) + len(trained)
    nodes.heard = []
    state, record = run_round(state, link, recipe, BASE, roster)
    assert nodes.heard == [(2, set()), (3, set()), (4, set())]
    whole = Whole(DATASET, NODES)
    other, there = replace(fresh(recipe), teacher=fresh(recipe).params), take_census(whole, BASE.train, recipe)
    for _ in range(2):
        other, _ = run_round(other, whole, recipe, BASE, there)
    assert same_bytes(state.params, other.params)
    assert np.isfinite(record["loss"])


def test_a_node_that_lost_its_shelf_in_the_middle_of_a_masked_sum_stays_in_it() -> None:
    nodes, window = Nodes(), BASE.train
    params, shapes = fresh(recipe_of(EXPERIMENT)).params, {"counts": ((BASE.n_items,), np.dtype(np.float32))}
    digest = DATASET.catalog.digest()

    def plan_for(slots: Any) -> RoundPlan:
        task = CountTask(window=window, clip_norm=2.0)
        return RoundPlan(0, 2, task, EXPERIMENT.model, BASE.n_items, params, Key.from_seed(4), digest, slots)

    link = nodes.link()
    sizes = [(node, pool.name, pool.census(window, digest)) for node, pool in nodes.pools.items()]
    ask = Ask(link, Roster(tuple(sizes)), plan_for, shapes)
    mechanism = GaussianMechanism(2.0, 1e-4)
    plain = gather(ask, bound=2.0)
    assert nodes.mask == []
    nodes.shelves[3] = MemoryShelf()
    charge = PrivacyLedger(None, epsilon=None, delta=1e-5).charge("sum", mechanism.event(1.0), clip_norm=2.0)
    secure = secure_gather(ask, ask.everybody, mechanism, charge, SecureSum(minimum=5, neighbours=28))
    assert [(node, bool(names)) for node, names in nodes.mask] == [(2, False), (3, False), (4, False), (3, True)]
    assert (secure.refused, secure.offenders, secure.n_clients) == ((), (), plain.n_clients)
    np.testing.assert_allclose(secure.sums["counts"], plain.sums["counts"], atol=0.01)
    assert frozen(params) < secure.bytes_down


def test_nodes_of_a_simulation_share_a_folder_and_processes_that_come_and_go_find_it(tmp_path: Path) -> None:
    from fedrec.client.app import _partition, app

    toml = small_project(tmp_path, model=MODEL, training__cohort__expected=25.0)
    settings = Experiment.find(str(toml))
    partitions = [{"partition-id": place, "num-partitions": NODES} for place in range(NODES)]
    link = GridLink(InProcessGrid(app, partitions, {"experiment": str(toml), "out": str(tmp_path / "runs")}))
    dataset = load_dataset(settings.data.source)
    base = cut(settings, dataset)[0]
    vectors = public_vectors(settings, dataset.catalog, base.n_items, source_of(settings))
    recipe = Recipe(settings, dataset.catalog.digest(), lambda: 0.0, vectors=vectors)
    params = initial(settings.model, base.n_items, recipe)
    found = []
    for one in (link, Whole(dataset, NODES)):
        state = ServerState("small/001", settings.digest(), recipe.catalog_digest, params=params)
        roster = take_census(one, base.train, recipe)
        for _ in range(2):
            state, _ = run_round(state, one, recipe, base, roster)
            _partition.cache_clear()  # as in another process
        found.append(state)
    assert same_bytes(found[0].params, found[1].params)
    assert [record["refused"] for record in found[0].rounds] == [[], []]
    named = {path.name: path.stat().st_size for path in (tmp_path / "runs" / "tensors").iterdir()}
    first, second = records(found[0], "bytes_down")
    assert first - second > 0.9 * NODES * sum(named.values()) > 0
