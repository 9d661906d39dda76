"""A secure sum among nodes whose contributions are known vectors, for the tests of masking."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedrec.client.secure import SecureNode
from fedrec.data.slices import LastWindow
from fedrec.errors import FedrecError
from fedrec.models.configs import PopularityConfig
from fedrec.privacy.ledger import PrivacyLedger
from fedrec.privacy.mechanism import GaussianMechanism
from fedrec.privacy.settings import SecureSum
from fedrec.protocol.identities import SIMULATION, SecurePolicy
from fedrec.protocol.link import Reply, Verb
from fedrec.protocol.parcels import Freight
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.tally import Tally
from fedrec.protocol.task import CountTask
from fedrec.random import Key
from fedrec.server.gather import Ask, Roster
from fedrec.server.secure import SecureGathered, secure_gather

D = 1000
SHAPES = {"counts": ((D,), np.dtype(np.float32))}
Tamper = Callable[[Verb, int, bytes], bytes]


def plan_for(slots: NDArray[np.int64]) -> RoundPlan:
    task = CountTask(window=LastWindow(skip=0))
    return RoundPlan(0, 3, task, PopularityConfig(), D, {}, Key.from_seed(0), "x" * 64, slots)


class VectorPool:
    """The client in slot s contributes a vector that depends on s alone."""

    name = "vectors"

    def __init__(self, node: int) -> None:
        self.node = node

    def vector(self, slot: int) -> NDArray[np.float32]:
        return (Key.from_seed(self.node).child(slot).numpy().standard_normal(D) * 0.2).astype(np.float32)

    def run(self, plan: RoundPlan) -> Tally:
        assert len(plan.slots) == 1
        return Tally({"counts": self.vector(int(plan.slots[0]))}, 1, {})


class SecureLink:
    """Nodes with memories as Flower keeps them: bytes. `lose` names answers that never arrive."""

    def __init__(
        self,
        sizes: Sequence[int],
        lose: Collection[tuple[Verb, int]] = (),
        policies: Sequence[SecurePolicy] | None = None,
        asked: Tamper = lambda verb, node, document: document,
        answered: Tamper = lambda verb, node, document: document,
    ) -> None:
        self.policies = dict(zip(range(100, 100 + len(sizes)), policies or [SIMULATION] * len(sizes), strict=True))
        self.sizes, self.lose, self.asked, self.answered = sizes, set(lose), asked, answered
        self.pools = {100 + place: VectorPool(100 + place) for place in range(len(sizes))}
        self.memory: dict[int, bytes] = {}
        self.told: dict[tuple[Verb, int], bytes] = {}
        self.sent: list[tuple[Verb, int, bytes]] = []
        self.verbs: list[Verb] = []

    def nodes(self) -> list[int]:
        return list(self.pools)

    def exchange(
        self,
        verb: Verb,
        documents: Mapping[int, bytes],
        timeout_seconds: float | None,
        freight: Freight | None = None,
    ) -> Iterable[Reply]:
        self.verbs.append(verb)
        held = (freight or Freight()).get
        for number, document in documents.items():
            self.told[verb, number] = document
            node = SecureNode(self.pools[number], self.memory.get(number), self.policies[number], held)  # type: ignore[arg-type]
            try:
                answer = node.answer(verb, self.asked(verb, number, document))
            except FedrecError as error:
                yield Reply(number, None, f"{type(error).__name__}: {error}")
                continue
            self.memory[number] = node.memory
            if (verb, number) not in self.lose:
                self.sent.append((verb, number, answer))
                yield Reply(number, self.answered(verb, number, answer))

    def clipped_sum(self) -> NDArray[np.float64]:
        """The sum of everybody's contribution clipped to norm 1, in plain arithmetic."""
        total = np.zeros(D)
        for size, pool in zip(self.sizes, self.pools.values(), strict=True):
            for slot in range(size):
                vector = pool.vector(slot).astype(np.float64)
                total += vector * min(1.0, 1.0 / float(np.linalg.norm(vector)))
        return total


def gathered(
    link: SecureLink, settings: SecureSum | None = None, multiplier: float = 1.0, seed: Key | None = None
) -> SecureGathered:
    mechanism = GaussianMechanism(1.0, multiplier)
    ledger = PrivacyLedger(None, epsilon=None, delta=1e-5)
    charge = ledger.charge("a sum", mechanism.event(1.0), clip_norm=1.0)
    roster = Roster(tuple((100 + place, f"node {place}", size) for place, size in enumerate(link.sizes)))
    ask = Ask(link, roster, plan_for, SHAPES)
    return secure_gather(ask, ask.everybody, mechanism, charge, settings or SecureSum(minimum=5), seed)
