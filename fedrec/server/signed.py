"""`SignedLink`: every plan and phase signed with the server's key, so that devices behind a gateway act on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedrec.errors import FedrecError
from fedrec.privacy.settings import DistributedPrivacy
from fedrec.protocol import wire
from fedrec.protocol.link import Link, Reply, Verb
from fedrec.protocol.parcels import Freight
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.secure import AdvertiseRequest, MaskRequest
from fedrec.protocol.signing import Terms, digest_of, public_key, sign
from fedrec.protocol.task import EvaluateTask
from fedrec.server.guard import Guard

DEFAULT_SECONDS = 3600.0
"""For so long a plan holds where nothing says how long is waited for it."""


@dataclass(frozen=True)
class Promise:
    """What the server can say about its plans.

    Attributes:
        ledger: names the privacy ledger that they are charged to.
        cohort_minimum: with fewer contributions a sum is thrown away unread, which the link sees to.
        epsilon: what the ledger has spent, this plan included; None: no guarantee.
        delta: the probability that goes with it.
    """

    ledger: str
    cohort_minimum: int
    epsilon: float | None
    delta: float


def promise_of(guard: Guard | None, ledger: str, cohort_minimum: int = 1) -> Callable[[], Promise]:
    """Return how to state what a run promises now: its ledger has been charged before anything is asked.

    Args:
        guard: of a run that is private at user level, None for one that guarantees nothing.
        ledger: names the run's ledger.
        cohort_minimum: what is promised where sums are not masked; masked ones have a minimum of their own.
    """
    if guard is None:
        return lambda: Promise(ledger, cohort_minimum, None, 0.0)
    settings = guard.settings
    minimum = settings.secure_sum.minimum if isinstance(settings, DistributedPrivacy) else cohort_minimum
    return lambda: Promise(ledger, minimum, guard.ledger.spent(), settings.delta)


class SignedLink:
    """A `Link` that signs what it sends. The terms hold the promise, a nonce, and when it expires.

    Attributes:
        promise: says what is promised at the time of sending.
    """

    def __init__(
        self,
        link: Link,
        key: Ed25519PrivateKey,
        promise: Callable[[], Promise] | None = None,
        cohort_minimum: int = 1,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Send through `link`.

        Args:
            link: carries the documents.
            key: the server's; devices trust its public half.
            promise: what is promised; nothing until `stand_for`, if not given.
            cohort_minimum: what is promised of sums that are not masked.
            now: the clock, in seconds since 1970 UTC.
        """
        self._link, self._key, self._now = link, key, now
        self._minimum = cohort_minimum
        self.promise = promise or promise_of(None, self._ledger("no run"), cohort_minimum)
        self._secure: dict[str, str] = {}

    def stand_for(self, run: str, guard: Guard | None) -> None:
        """Promise from now on what a run guarantees; its ledger is named after the key, for runs of others are, too."""
        self.promise = promise_of(guard, self._ledger(run), self._minimum)

    def _ledger(self, run: str) -> str:
        return f"{public_key(self._key).hex()[:16]} {run}"[:200]

    def nodes(self) -> list[int]:
        """Return the ids of the nodes that are there now."""
        return self._link.nodes()

    def exchange(
        self,
        verb: Verb,
        documents: Mapping[int, bytes],
        timeout_seconds: float | None,
        freight: Freight | None = None,
    ) -> Iterable[Reply]:
        """Sign, send, and yield the replies as they arrive; tensors go beside what is signed, which names them."""
        if verb == "census" or not documents:
            return self._link.exchange(verb, documents, timeout_seconds)
        promise = self.promise()
        until = int(self._now() + (timeout_seconds or DEFAULT_SECONDS)) + 1
        terms = Terms(
            ledger=promise.ledger, cohort_minimum=promise.cohort_minimum, epsilon=promise.epsilon,
            delta=promise.delta, expires_at=until, nonce=os.urandom(16).hex(),
        )  # fmt: skip
        if verb == "run" and _exact_metrics(next(iter(documents.values()))):
            terms = terms.model_copy(update={"epsilon": None, "delta": 0.0})  # no ledger pays for exact metrics
        signed = {node: self._signed(verb, document, terms) for node, document in documents.items()}
        replies = self._link.exchange(verb, signed, timeout_seconds, freight)
        return replies if verb != "run" or terms.cohort_minimum == 1 else enough(replies, terms.cohort_minimum)

    def _signed(self, verb: Verb, document: bytes, terms: Terms) -> bytes:
        if verb == "run":
            return sign("plan", document, self._key, terms)
        if verb == "advertise":
            request = AdvertiseRequest.from_bytes(document)
            self._secure = {request.session: digest_of(request.terms)}
        if verb == "mask":
            asked = MaskRequest.from_bytes(document)
            bound = terms.model_copy(update={"secure": self._secure[asked.session]})
            plan = sign("plan", asked.plan.tobytes(), self._key, bound)
            document = replace(asked, plan=np.frombuffer(plan, np.uint8)).to_bytes()
        return sign("phase", document, self._key, terms)


def enough(replies: Iterable[Reply], minimum: int) -> list[Reply]:
    """Return the replies to a plan, or errors in their place if all of them together count too few clients."""
    found = list(replies)
    n = sum(_counted(reply.document) for reply in found if reply.document is not None)
    if n >= minimum:
        return found
    why = f"{n} clients contributed where {minimum} were promised at least; the sum was thrown away unread"
    return [Reply(reply.node, None, reply.error or why) for reply in found]


def _counted(document: bytes) -> int:
    try:
        header, _ = wire.unpack("tally", document)
        return max(0, int(header["n_clients"]))
    except (FedrecError, KeyError, TypeError, ValueError):
        return 0


def _exact_metrics(document: bytes) -> bool:
    task = RoundPlan.outline(document)[0].task
    return isinstance(task, EvaluateTask) and not task.private
