from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedrec.data.slices import LastWindow
from fedrec.errors import RunError
from fedrec.models.configs import PopularityConfig
from fedrec.protocol.link import Reply, Verb
from fedrec.protocol.parcels import Freight
from fedrec.protocol.plan import CensusRequest, RoundPlan
from fedrec.protocol.signing import opened, public_key, verify
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import AnyTask, CountTask, EvaluateTask
from fedrec.random import Key
from fedrec.server.gather import Ask, Roster, gather
from fedrec.server.signed import Promise, SignedLink

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
WINDOW = LastWindow(skip=0)


class Counting:
    """Nodes of so many clients each, who all took item 0."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.sizes = sizes
        self.sent: list[tuple[Verb, bytes]] = []

    def nodes(self) -> list[int]:
        return list(self.sizes)

    def exchange(
        self,
        verb: Verb,
        documents: Mapping[int, bytes],
        timeout_seconds: float | None,
        freight: Freight | None = None,
    ) -> Iterable[Reply]:
        for node, document in documents.items():
            self.sent.append((verb, document))
            counts = np.zeros(3, np.float32)
            counts[0] = self.sizes[node]
            ticket = RoundPlan.from_bytes(opened(document)).ticket if verb == "run" else ""
            yield Reply(node, Tally({"counts": counts}, self.sizes[node], {}, ticket=ticket).to_bytes())


def plan(slots: Any, task: AnyTask | None = None) -> RoundPlan:
    task = task or CountTask(window=WINDOW)
    return RoundPlan(0, 0, task, PopularityConfig(), 3, {}, Key.from_seed(0), "c" * 64, slots)


def gathered(link: SignedLink, sizes: dict[int, int]) -> float:
    roster = Roster(tuple((node, f"node {node}", n) for node, n in sizes.items()))
    ask = Ask(link, roster, plan, {"counts": ((3,), np.dtype(np.float32))}, 60.0)
    return float(gather(ask).sums["counts"][0])


def test_plans_are_signed_with_a_promise_a_nonce_and_an_end() -> None:
    inner = Counting({1: 4})
    link = SignedLink(inner, KEY, lambda: Promise("main", 2, 1.5, 1e-6), now=lambda: 1000.0)
    assert [gathered(link, {1: 4}) for _ in range(2)] == [4, 4]
    said = [verify("plan", document, [public_key(KEY)])[1] for _, document in inner.sent]
    assert [(one.ledger, one.cohort_minimum, one.epsilon, one.expires_at) for one in said if one] == [
        ("main", 2, 1.5, 1061)
    ] * 2
    assert len({one.nonce for one in said if one}) == 2, "asked again, it is another plan"
    request = CensusRequest(window=WINDOW, catalog_digest="c" * 64).to_bytes()
    list(link.exchange("census", {1: request}, None))
    assert inner.sent[-1] == ("census", request)
    asked = RoundPlan.from_bytes(opened(inner.sent[0][1]))
    assert replace(asked, ticket="").to_bytes() == plan(np.arange(4)).to_bytes()


def test_a_sum_of_fewer_than_were_promised_is_thrown_away() -> None:
    sizes = {1: 4, 2: 5}
    promise = SignedLink(Counting(sizes), KEY, cohort_minimum=9)
    assert gathered(promise, sizes) == 9
    with pytest.raises(
        RunError, match="9 clients contributed where 10 were promised at least; the sum was thrown away"
    ):
        gathered(SignedLink(Counting(sizes), KEY, cohort_minimum=10), sizes)


def test_no_epsilon_is_claimed_for_exact_metrics() -> None:
    inner = Counting({1: 1})
    link = SignedLink(inner, KEY, lambda: Promise("main", 1, 1.5, 1e-6))
    for private in (False, True):
        task = EvaluateTask(window=WINDOW, n_known_items=3, private=private)
        list(link.exchange("run", {1: plan(np.zeros(1, np.int64), task).to_bytes()}, 1.0))
    said = [verify("plan", document, [public_key(KEY)])[1] for _, document in inner.sent]
    assert [one.epsilon for one in said if one] == [None, 1.5]


def test_a_run_gives_its_ledger_the_name_of_its_key() -> None:
    link = SignedLink(Counting({1: 1}), KEY, cohort_minimum=30)
    link.stand_for("small/001", None)
    assert link.promise() == Promise(f"{public_key(KEY).hex()[:16]} small/001", 30, None, 0.0)
