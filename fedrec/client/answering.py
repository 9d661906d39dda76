"""How a device answers a server: the signature first, then its own limits, then the work; nothing is sent from here."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from fedrec.client.device_pool import DevicePool
from fedrec.client.keeping import Unsent, keep_secrets, keep_unsent, kept_secrets
from fedrec.client.limits import Kind, Limits, check
from fedrec.client.store import Store
from fedrec.data.slices import LastWindow, TimeWindow
from fedrec.errors import PlanRefused
from fedrec.evaluation.asked import shapes_of
from fedrec.privacy.terms import Terms as SecureTerms
from fedrec.protocol.link import Verb
from fedrec.protocol.parcels import Held, Named, nothing
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.signing import verify
from fedrec.protocol.tally import Tally

if TYPE_CHECKING:
    from fedrec.protocol.identities import SecurePolicy

_NEEDS_TORCH: tuple[Kind, ...] = ("fit", "evaluate")
_SAID = {"advertise": "keys for a masked sum", "share": "sealed shares of keys", "unmask": "shares that open a sum"}


def able(limits: Limits) -> list[str]:
    """Return which kinds of tasks this device can do and wants to: some need torch."""
    torch = _torch()
    return [kind for kind in limits.tasks if torch or kind not in _NEEDS_TORCH]


def _torch() -> bool:
    try:
        return find_spec("torch") is not None
    except ModuleNotFoundError:
        return False


@dataclass(frozen=True)
class Answer:
    """What a device would send, and what it must write down before it does.

    Attributes:
        document: the answer.
        sent: the line for the log.
        part: the line for the device's privacy ledger; None: nothing of the history is in the answer.
        secrets: what a masked sum needs until its next phase.
    """

    document: bytes
    sent: dict[str, Any]
    part: dict[str, Any] | None = None
    secrets: bytes | None = None

    def keep(self, store: Store, task: str, verb: str) -> Unsent:
        """Write all of it down at once, so that it can be sent, and only once."""
        unsent = Unsent(task, verb, self.document)
        line = {**self.sent, "verb": verb, "bytes": len(self.document), "sha256": unsent.sha256}
        with store.together():
            if self.part is not None:
                store.take_part(self.part)
            if self.secrets is not None:
                keep_secrets(store, self.secrets)
            store.log_sent(line)
            keep_unsent(store, unsent)
        return unsent


@dataclass(frozen=True)
class Answerer:
    """Whoever answers for a device: what it has, whom it trusts and what it insists on.

    Attributes:
        store: the device's.
        pool: the device as a pool of one.
        trusted: public keys of those whose plans count.
        limits: what the device insists on.
        fetch: given what a plan names, which the limits allow by then, returns how to get it.
    """

    store: Store
    pool: DevicePool
    trusted: Collection[bytes]
    limits: Limits
    fetch: Callable[[RoundPlan, Collection[Named]], Held] = lambda plan, named: nothing

    def answer(self, verb: Verb, document: bytes, envelope: bytes, now: int) -> Answer:
        """Do what is asked.

        Args:
            verb: "run", or a phase of a masked sum.
            document: what is asked in a phase of a masked sum, for this device alone.
            envelope: the signed plan, in "run" and "mask".
            now: seconds since 1970 UTC.

        Raises:
            PlanRefused: the plan is not signed, was changed, or asks for more than the device gives.
            FedrecError: something is wrong with what was asked.
        """
        if verb != "run":
            return self._masked(verb, document, envelope, now)
        plan, sent, part = self._agreed(envelope, None, now)
        tally = self.pool.run(plan) if _eligible(self.pool, plan) else Tally({}, 0, {})
        tally = replace(tally, ticket=plan.ticket)
        return Answer(tally.to_bytes(plan.coding, self.pool.name), {**sent, "masked": False}, part)

    def _masked(self, verb: Verb, document: bytes, envelope: bytes, now: int) -> Answer:
        from fedrec.client.secure import SecureNode  # cryptography's half of the work: only who takes part loads it
        from fedrec.protocol.secure import AdvertiseRequest, MaskRequest

        if verb == "advertise":
            _check_terms(AdvertiseRequest.from_bytes(document).terms, self.limits)
        node = SecureNode(_Alone(self.pool), kept_secrets(self.store), self._policy)
        if verb != "mask":
            reply = node.answer(verb, document)
            return Answer(reply, {"what": _SAID.get(verb, verb)}, None, node.memory)
        if node.terms is None:
            raise PlanRefused("The plan belongs to a masked sum that this device did not begin.")
        plan, sent, part = self._agreed(envelope, node.terms, now)
        request = MaskRequest.from_bytes(document)
        reply = node.answer(verb, replace(request, plan=np.frombuffer(plan.to_bytes(), np.uint8)).to_bytes())
        return Answer(reply, {**sent, "masked": True}, part, node.memory)

    @property
    def _policy(self) -> SecurePolicy:
        from fedrec.protocol.identities import Identities, SecurePolicy

        named = self.limits.identities
        known = None if named is None else Identities({bytes.fromhex(key): n for key, n in named.items()})
        return SecurePolicy(known=known, seeded_noise=self.limits.simulation)

    def _agreed(
        self, envelope: bytes, secure: SecureTerms | None, now: int
    ) -> tuple[RoundPlan, dict[str, Any], dict[str, Any]]:
        """Return the plan, for the device's one person, and what to write into the log and into the device's ledger."""
        document, terms = verify("plan", envelope, self.trusted)
        if terms is None:
            raise PlanRefused("The plan comes without terms, so nothing is promised about it.")
        plan, named = RoundPlan.outline(document)
        part = check(plan, terms, secure, self.limits, self.store.parts(), self.pool.catalog.digest(), now)
        if plan.task.kind not in able(self.limits) or (self.pool.budget is not None and not _torch()):
            raise PlanRefused(f"The plan asks for a {plan.task.kind}, which needs torch, and this device has none.")
        if named:
            plan = RoundPlan.from_bytes(document, self.fetch(plan, named.values()))
        sent = {"what": plan.task.kind, "slice": plan.slice, "round": plan.round, "ledger": terms.ledger,
                "epsilon": terms.epsilon, "cohort_minimum": terms.cohort_minimum,
                "tensors": {name: list(shape) for name, (shape, _) in shapes_of(plan).items()}}  # fmt: skip
        return replace(plan, slots=np.zeros(1, np.int64)), sent, part


def _check_terms(terms: SecureTerms, limits: Limits) -> None:
    """Refuse a masked sum before any key is made for it; its plan is checked again, by what was signed."""
    if terms.noise == "seed" and not limits.simulation:
        raise PlanRefused("The masked sum takes noise from a seed, which protects nobody outside a simulation.")
    if terms.settings.minimum < limits.cohort_minimum:
        raise PlanRefused(
            f"The masked sum may be opened for {terms.settings.minimum} people, this device hides among at least "
            f"{limits.cohort_minimum}."
        )


def _eligible(pool: DevicePool, plan: RoundPlan) -> bool:
    return pool.census(plan.task.window, plan.catalog_digest) > 0


class _Alone:
    """One person's pool that always contributes: zeros if there is nothing to tell, so that silence tells nothing."""

    def __init__(self, pool: DevicePool) -> None:
        self._pool = pool

    @property
    def name(self) -> str:
        return self._pool.name

    def census(self, window: TimeWindow | LastWindow, catalog_digest: str) -> int:
        return self._pool.census(window, catalog_digest)

    def run(self, plan: RoundPlan) -> Tally:
        found = self._pool.run(plan) if _eligible(self._pool, plan) else Tally({}, 0, {})
        if found.sums:
            return found
        sums = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes_of(plan).items()}
        return Tally(sums, 0, {})
