"""A run that learns its clip norm: what is charged is used, it survives a resume, a lying count is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedrec.config import Experiment
from fedrec.errors import PrivacyError, TallyRefused
from fedrec.grid.simulate import simulate
from fedrec.privacy.events import GaussianEvent
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.protocol.link import Reply, Verb
from fedrec.protocol.tally import Expectation, Tally
from fedrec.server.guard import calibrated, guard_of
from fedrec.server.judge import initial
from fedrec.server.round import Recipe, run_round, take_census
from fedrec.server.run import LEDGER, check, cut
from fedrec.server.state import ServerState
from fedrec.server.work import Event
from tests.support import PoolLink, dataset_of, merged, small_document, small_rows

DATASET = dataset_of(small_rows())
PRIVACY: dict[str, Any] = {"mode": "central", "epsilon": 8.0, "delta": 1e-3, "noise": "seed", "adaptive": {}}
FIRST = 0.3


class Crash(Exception):
    pass


def adaptive(privacy: Mapping[str, Any] | None = None, **others: Any) -> Experiment:
    document = merged(small_document(training__local__clip_norm=FIRST, **others), {"privacy": PRIVACY})
    return Experiment.parse(merged(document, {"privacy": privacy or {}}))


def run(experiment: Experiment, root: Path, **more: Any) -> tuple[dict[str, Any], Path]:
    return simulate(experiment, runs=root, registry=root / "registry", dataset=DATASET, **more)


def test_the_clip_norm_moves_over_all_slices_and_every_round_is_charged_with_the_one_it_used(tmp_path: Path) -> None:
    document, folder = run(adaptive(), tmp_path)
    norms = [record["clip_norm"] for record in document["rounds"]]
    assert norms[0] == FIRST
    assert len(set(norms)) == len(norms) == 12
    steps = [abs(math.log(b / a)) for a, b in itertools.pairwise(norms)]
    assert max(steps) <= 0.2 * 0.5 + 1e-9  # learning rate times the distance of 0 or 1 from the median
    book = PrivacyLedger.read(folder / LEDGER)
    rounds = [entry for entry in book.entries() if "round" in entry.name]
    assert [entry.clip_norm for entry in rounds] == norms
    events = {entry.event for entry in rounds}
    assert len(events) == 1  # one event a round, of the multiplier that a fixed clip norm would have been charged with
    assert isinstance(event := events.pop(), GaussianEvent)
    assert event.noise_multiplier == document["privacy"]["scale"]
    assert 7.9 < book.spent() <= 8.0
    assert all(record["clipped"] == 0.0 for record in document["rounds"])


def test_it_costs_the_same_epsilon_as_a_fixed_one() -> None:
    fixed = Experiment.parse(merged(adaptive().model_dump(mode="json"), {"privacy": {"adaptive": None}}))
    assert calibrated(adaptive(), (20, 20)) == calibrated(fixed, (20, 20))


def test_a_resume_goes_on_with_the_clip_norm_that_was_learnt(tmp_path: Path) -> None:
    whole, _ = run(adaptive(), tmp_path / "a")

    def stop(event: Event) -> None:
        if event.kind == "slice" and event.record["slice"] == 1:
            raise Crash

    with pytest.raises(Crash):
        run(adaptive(), tmp_path / "b", observe=stop)
    resumed, _ = run(adaptive(), tmp_path / "b", resume=True)
    assert [r["digest"] for r in resumed["releases"]] == [r["digest"] for r in whole["releases"]]
    assert [r["clip_norm"] for r in resumed["rounds"]] == [r["clip_norm"] for r in whole["rounds"]]


def test_the_clip_norm_is_in_the_state() -> None:
    state = ServerState("small/001", "a", "b", clip_norm=0.7)
    assert ServerState.from_record(*state.to_record()) == state


def test_a_node_that_counts_more_than_it_hosts_is_refused_alone() -> None:
    def lie(verb: Verb, reply: Reply) -> Sequence[Reply]:
        if verb != "run" or reply.document is None:
            return [reply]
        tally = Tally.from_bytes(reply.document)
        lying = replace(tally, stats={**tally.stats, "clipped": tally.n_clients + 1000.0})
        return [Reply(reply.node, lying.to_bytes())]

    experiment = adaptive({"calibrate": False}, training__cohort__expected=20)
    base, digest = cut(experiment, DATASET)[0], DATASET.catalog.digest()
    ledger = PrivacyLedger(None, epsilon=None, delta=1e-3)
    recipe = Recipe(experiment, digest, lambda: 0.0, guard_of(experiment, ledger, 20))
    state = ServerState(
        "small/001", experiment.digest(), digest, params=initial(experiment.model, base.n_items, recipe)
    )
    link = PoolLink(DATASET, 2, tamper={101: lie})
    _, record = run_round(state, link, recipe, base, take_census(link, base.train, recipe))
    assert len(record["refused"]) == 1
    assert "counts more clients than there are" in record["refused"][0]["reason"]
    assert 0 < record["clients"] < record["cohort"]


def test_a_missing_count_is_refused() -> None:
    expected = Expectation({}, 5, counts=("clipped",))
    expected.check(Tally({}, 5, {"clipped": 5.0}))
    expected.check(Tally({}, 0, {}))
    for stats in ({}, {"clipped": -1.0}, {"clipped": 6.0}, {"clipped": float("nan")}):
        with pytest.raises(TallyRefused):
            expected.check(Tally({}, 5, stats))


def test_a_count_that_costs_more_than_its_round_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    experiment = adaptive({"adaptive": {"count_noise": 0.01}})
    check(adaptive(), DATASET)
    with pytest.raises(PrivacyError, match=r"set privacy\.adaptive\.count_noise above"):
        calibrated(experiment, (20, 20))
    with pytest.raises(PrivacyError, match=r"set privacy\.adaptive\.count_noise above"):
        run(experiment, tmp_path)
    assert PrivacyLedger.read(tmp_path / "small" / "001" / LEDGER).entries() == ()
