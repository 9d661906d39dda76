"""One conversation of a device with its gateway: what was left unsent, something to do, and the answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from fedrec.client.answering import Answerer, able
from fedrec.client.conditions import Conditions
from fedrec.client.gateway_client import Assignment, GatewayClient, GatewayUnavailable, Given
from fedrec.client.keeping import LOCK, drop_unsent, kept_unsent
from fedrec.errors import ConfigError, FedrecError, GatewayError, PlanRefused, StoreError
from fedrec.protocol.link import Verb
from fedrec.protocol.parcels import Freight, Held, Named
from fedrec.protocol.plan import RoundPlan

if TYPE_CHECKING:
    from fedrec.client.sdk import Device

VERBS = ("run", "advertise", "share", "mask", "unmask")


@dataclass(frozen=True)
class Participation:
    """What came of taking part once.

    Attributes:
        outcome: "answered": something was sent; "refused": the device declined, see ``device.refused()``; "nothing":
            there was nothing to do; "unfit": the device is not in the conditions that were asked for.
        why: one sentence.
        come_back_seconds: when to try again.
    """

    outcome: Literal["answered", "refused", "nothing", "unfit"]
    why: str
    come_back_seconds: float = 0.0


def take_part(
    device: Device,
    when: Conditions,
    senses: Callable[[], Conditions],
    now: Callable[[], int],
    wait_seconds: float,
    patience_seconds: float,
) -> Participation:
    """Do what `Device.participate` says."""
    here = senses()
    missing = when.missing(here)
    if missing:
        return Participation("unfit", f"The device is not {' and not '.join(missing)}.", 900.0)
    enrolment = device.enrolment
    with _alone(device):
        client = GatewayClient(enrolment.address, enrolment.root_certificates.encode(), enrolment.token)
        try:
            return _Conversation(device, client, now).hold(here, wait_seconds, patience_seconds)
        finally:
            client.close()


class _Conversation:
    def __init__(self, device: Device, client: GatewayClient, now: Callable[[], int]) -> None:
        self._device, self._client, self._now = device, client, now
        self._done: list[str] = []

    def hold(self, here: Conditions, wait_seconds: float, patience_seconds: float) -> Participation:
        until = time.monotonic() + patience_seconds
        self._send_kept()
        while True:
            said = self._client.check_in(here, able(self._device.limits), wait_seconds)
            self._device.store.log_repeated(
                {
                    "what": "check-in", "to": self._client.address,
                    "conditions": [name for name in ("charging", "unmetered", "idle") if getattr(here, name)],
                }
            )  # fmt: skip
            if said.release is not None:
                self._fetch(said.release)
            if said.assignment is not None:
                refusal = self._do(said.assignment)
                if refusal is not None:
                    return Participation("refused", refusal, said.come_back_seconds)
                if said.assignment.verb in ("run", "unmask"):
                    return Participation("answered", f"Sent: {', '.join(self._done)}.", said.come_back_seconds)
            elif not said.stay or time.monotonic() >= until:
                why = f"Sent: {', '.join(self._done)}." if self._done else "There was nothing to do."
                return Participation("answered" if self._done else "nothing", why, said.come_back_seconds)
            else:
                time.sleep(min(said.come_back_seconds, max(0.0, until - time.monotonic())))

    def _send_kept(self) -> None:
        """Send what an earlier conversation could not; a gateway that no longer wants it does not get it."""
        unsent = kept_unsent(self._device.store)
        if unsent is None:
            return
        try:
            self._client.upload(unsent)
            self._done.append(unsent.verb)
        except GatewayUnavailable:
            raise
        except GatewayError as error:
            self._device.store.log_refused({"what": unsent.verb, "by": "gateway", "why": str(error)})
        drop_unsent(self._device.store)

    def _fetch(self, offered: tuple[int, Given]) -> None:
        version, blob = offered
        try:
            if self._device.release.version >= version:
                return
        except ConfigError:
            pass  # it has none yet
        try:
            self._device.adopt(self._client.download(blob, self._device.limits.most_bytes))
        except GatewayUnavailable:
            raise
        except FedrecError as error:
            self._refuse(f"release {version}", str(error))

    def _do(self, asked: Assignment) -> str | None:
        """Answer an assignment; return why not, if not."""
        store, client, limits = self._device.store, self._client, self._device.limits
        try:
            if asked.verb not in VERBS:
                raise GatewayError(f"The gateway asks for '{asked.verb}', which this version of fedrec does not know.")
            document, plan = (
                b"" if given is None else client.download(given, limits.most_bytes)
                for given in (asked.document, asked.plan)
            )
            device = self._device
            answerer = Answerer(store, device.pool, device.trusted, limits, self._held)
            found = answerer.answer(cast(Verb, asked.verb), document, plan, self._now())
            if len(found.document) > asked.upload_limit:
                raise GatewayError(f"The answer has {len(found.document):,} bytes, the gateway takes no more than "
                                   f"{asked.upload_limit:,}.")  # fmt: skip
        except GatewayUnavailable:
            raise
        except FedrecError as error:
            self._refuse(asked.verb, str(error))
            store.log_sent({"what": "declined", "to": client.address})
            client.decline(asked.task)
            return str(error)
        client.upload(found.keep(store, asked.task, asked.verb))
        drop_unsent(store)
        self._done.append(asked.verb)
        return None

    def _held(self, plan: RoundPlan, named: Collection[Named]) -> Held:
        """Return how to get what a plan names: from the device's shelf, its release, or else from the gateway.

        Raises:
            PlanRefused: it is more than the limits allow.
        """
        sizes = {one.sha256: one.size for one in named}
        most, shelf = self._device.limits.most_bytes, self._device.shelf
        if sum(sizes.values()) > most:
            raise PlanRefused(
                f"The plan names tensors of {sum(sizes.values()):,} bytes, more than the {most:,} of the limits."
            )
        installed: Freight | None = None

        def held(sha256: str) -> bytes:
            nonlocal installed
            kept = shelf.get(sha256)
            if kept is not None:
                return kept
            installed = installed or self._installed(plan, sizes.values())
            parcel = installed.get(sha256)
            if parcel is None:
                parcel = self._client.download(Given(sha256, sizes[sha256]), most)
                shelf.keep(sha256, parcel)
            return parcel

        return held

    def _installed(self, plan: RoundPlan, sizes: Collection[int]) -> Freight:
        """Return the release's tensors as they would travel with a plan; what can be none of the named is left out."""
        freight = Freight()
        for value in self._device.release.params.values():
            for form in {plan.download, "float32"} if value.nbytes // 2 <= max(sizes) else ():
                freight.load(value, form)  # a teacher travels unrounded, and often it is this release
        return freight

    def _refuse(self, what: str, why: str) -> None:
        self._device.store.log_refused({"what": what, "by": "device", "why": why})


@contextmanager
def _alone(device: Device) -> Iterator[None]:
    """Let one process at a time take part for a device.

    Raises:
        StoreError: another one does.
    """
    import fcntl

    with (device.store.folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(f"Another process takes part for the device in '{device.store.folder}' now.") from error
        yield
