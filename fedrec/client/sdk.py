"""`Device`: what an app holds. It records, recommends, explains, takes part and forgets, for one person on one device.

Source: docs/device.md shows each of these at work.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from fedrec.client.conditions import Conditions, system_conditions
from fedrec.client.device_pool import DevicePool
from fedrec.client.enrolment import Enrolment
from fedrec.client.keys import KeyPlace
from fedrec.client.limits import OWN, Limits, PrivacySpent, Spent, spent, total
from fedrec.client.shelf import FOLDER, FolderShelf
from fedrec.client.store import Retention, Store
from fedrec.clock import system_clock
from fedrec.errors import ConfigError, PlanRefused, ProtocolError, StoreError
from fedrec.models import portable
from fedrec.models.configs import moment_of
from fedrec.protocol.signing import DeviceRelease, verify

if TYPE_CHECKING:
    from fedrec.client.budget import LocalBudget
    from fedrec.client.participation import Participation

__all__ = ["Conditions", "Device", "Enrolment", "Limits", "Reason", "Recommendation", "Retention"]

LEDGERS = "ledgers"
"""Folder of the device's own privacy ledger, in the store's."""
RELEASE, ENROLMENT, LIMITS = "release", "enrolment", "limits"
"""Under these names the store keeps the device's release, its enrolment and its limits."""


@dataclass(frozen=True)
class Recommendation:
    """One recommended item: its id, its title, and the model's score."""

    item: str
    title: str
    score: float


@dataclass(frozen=True)
class Reason:
    """Why an item is recommended: an item of the person's history, and by how much it raises the score.

    Attributes:
        item: id.
        title: of the item.
        contribution: what this part of the history adds to the explained item's score.
    """

    item: str
    title: str
    contribution: float


class Device:
    """One person's device: a store, a release to recommend from, and limits to what it takes part in.

    Attributes:
        store: the encrypted history.
        limits: what the device insists on when it takes part.
    """

    def __init__(
        self,
        folder: Path,
        *,
        enrolment: Enrolment | None = None,
        release: bytes | None = None,
        trusted: Collection[bytes] = (),
        limits: Limits | None = None,
        retention: Retention | None = None,
        keys: KeyPlace | None = None,
        senses: Callable[[], Conditions] = system_conditions,
        now: Callable[[], int] = system_clock,
    ) -> None:
        """Open the device of `folder`, or make one there. What is given is kept, what is not is as it was kept.

        Args:
            folder: of the store, for its owner alone.
            enrolment: how to reach a gateway, and whom to trust.
            release: a signed release to recommend from.
            trusted: further public keys whose signatures count, 32 bytes each.
            limits: what the device insists on.
            retention: how much history is kept.
            keys: where the store's key is.
            senses: tells the conditions that the device is in now.
            now: the clock, in seconds since 1970 UTC.

        Raises:
            StoreError: the store cannot be opened.
            PlanRefused: the release is not signed by somebody trusted.
        """
        self.store = Store(folder, retention=retention, keys=keys, now=now)
        self._now, self._senses = now, senses
        self._also_trusted = tuple(trusted)
        try:
            self.limits = self._settle_limits(limits)
            if enrolment is not None:
                self.enrol(enrolment)
            self._release: DeviceRelease | None = None
            if release is not None:
                self.adopt(release)
        except BaseException:
            self.store.close()
            raise

    def record(self, item: str, event: str = "interaction", value: float | None = None, time: int | None = None) -> int:
        """Keep one interaction and return its row number; it is on the disk when this returns.

        Args:
            item: id in the catalogue; others are kept too, and count once a catalogue knows them.
            event: what happened.
            value: for example a rating; must be finite.
            time: seconds since 1970 UTC; now, if not given.

        Raises:
            StoreError: the disk refuses, or the value is not finite.
        """
        return self.store.record(item, event, value, time)

    def recommend(
        self,
        k: int = 10,
        exclude: Collection[str] = (),
        context: Sequence[str] = (),
        known: bool = False,
        moment: Mapping[str, Any] | None = None,
    ) -> list[Recommendation]:
        """Return the k items with the highest scores, best first. Nothing leaves the device.

        Args:
            k: how many.
            exclude: ids that are not to be recommended.
            context: ids that the person looks at now; they count as the newest of the history and are not recorded.
            known: recommend also what the person has already.
            moment: "hour" (0 to 23, UTC), "weekday" (0 is Monday), "device" and "place" of the request, as far as known
                and as the model tells them apart; or "time", in seconds since 1970 UTC.

        Raises:
            ConfigError: the device has no release yet, k is below 1, or the model knows no such moment.
            UnknownItem: an id in `context` is not in the catalogue.
        """
        if k < 1:
            raise ConfigError(f"Cannot recommend {k} items; ask for at least one.")
        release = self.release
        history = self._numbers(release) + release.catalog.numbers(context)
        scores = self._scores(release, history, moment)
        number_of = release.catalog.number_of
        out = {number_of[item] for item in exclude if item in number_of} | (set() if known else set(history))
        scores[[one for one in out if one < len(scores)]] = -np.inf
        best = np.argsort(-scores, kind="stable")[:k]
        catalog = release.catalog
        return [
            Recommendation(catalog.ids[i], catalog.titles[i], float(scores[i])) for i in best if np.isfinite(scores[i])
        ]

    def explain(self, item: str, k: int = 5) -> list[Reason]:
        """Return which items of the history raise an item's score most, by the released model's own scores.

        Args:
            item: id of the item to explain.
            k: how many reasons.

        Raises:
            ConfigError: the device has no release yet, or its model does not know the item.
            UnknownItem: the item is not in the catalogue.

        Source: `fedrec.models.explain.contributions`.
        """
        from fedrec.models.explain import contributions

        release = self.release
        number = release.catalog.numbers([item])[0]
        if number >= release.n_known:
            raise ConfigError(f"Item '{item}' joined after release {release.version}, whose model does not score it.")
        history = [one for one in self._numbers(release) if one < release.n_known]
        parts = contributions(release.model, release.params, history, [number]).history[0]
        found: dict[int, float] = {}
        for one, part in zip(history, parts.tolist(), strict=True):  # an item may be there more than once
            found[one] = found.get(one, 0.0) + part
        best = sorted(found, key=lambda one: (-found[one], one))[:k]
        return [Reason(release.catalog.ids[one], release.catalog.titles[one], found[one]) for one in best]

    def participate(
        self, when: Conditions | None = None, *, wait_seconds: float = 20.0, patience_seconds: float = 600.0
    ) -> Participation:
        """Ask the gateway for something to do, and do it if the limits allow; return what came of it.

        An upload that was cut off, by whatever, goes on where it stopped.

        Args:
            when: the device does nothing unless it is in these conditions; charging, unmetered and idle if not given.
            wait_seconds: how long to wait at the gateway for something to do.
            patience_seconds: how long to stay for the phases of a masked sum.

        Raises:
            ConfigError: the device is not enrolled at a gateway.
            GatewayError: the gateway cannot be reached or will not have the device; the message says why.
            StoreError: the store cannot be read or written.
        """
        from fedrec.client.participation import take_part

        wanted = Conditions(charging=True, unmetered=True, idle=True) if when is None else when
        return take_part(self, wanted, self._senses, self._now, wait_seconds, patience_seconds)

    def forget(self, items: Collection[str] | None = None, since: int | None = None) -> int:
        """Delete the interactions with these items, or from this time on, or both; return how many.

        What was sent cannot be called back; an answer that waits to be sent is dropped.

        Raises:
            StoreError: neither is given, or the disk refuses.
        """
        from fedrec.client.keeping import drop_unsent

        drop_unsent(self.store)
        return self.store.forget(items, since)

    def forget_everything(self) -> None:
        """Destroy the store's key and remove all its files; the device cannot be used afterwards.

        Raises:
            StoreError: the key cannot be destroyed or the disk refuses.
        """
        from fedrec.client.keeping import LOCK

        self.store.forget_everything()
        for name in (LEDGERS, FOLDER):
            shutil.rmtree(self.store.folder / name, ignore_errors=True)
        (self.store.folder / LOCK).unlink(missing_ok=True)

    def export_history(self) -> str:
        """Return the history as JSON lines with the keys item, event, value and time."""
        return self.store.export_history()

    def privacy_spent(self) -> PrivacySpent:
        """Return what taking part has cost over the device's life: by the word of servers, and by its own ledger."""
        found, budget = spent(self.store.parts()), self._budget
        if budget is None:
            return found
        rounds = sum(one.rounds for one in found.ledgers if one.ledger == OWN)
        own = Spent(OWN, budget.spent(self.store.number), budget.settings.delta if rounds else 0.0, rounds)
        others = [one for one in found.ledgers if one.ledger != OWN]
        return total([*others, own])

    def sent(self) -> list[dict[str, Any]]:
        """Return a line for everything that ever left the device, oldest first."""
        return self.store.sent()

    def refused(self) -> list[dict[str, Any]]:
        """Return a line for everything that the device refused, oldest first, with the reason."""
        return self.store.refused()

    def enrol(self, enrolment: Enrolment) -> None:
        """Keep how to reach a gateway and whom to trust, in place of what was kept."""
        self.store.keep(ENROLMENT, enrolment.model_dump_json().encode())

    @property
    def enrolment(self) -> Enrolment:
        """How to reach the gateway.

        Raises:
            ConfigError: the device is not enrolled.
        """
        kept = self.store.kept(ENROLMENT)
        if kept is None:
            raise ConfigError("This device is not enrolled at a gateway; call `enrol` or run `fedrec device enrol`.")
        return Enrolment.parse(kept.decode(), "the kept enrolment")

    @property
    def trusted(self) -> tuple[bytes, ...]:
        """Public keys of those whose plans and releases the device acts on."""
        kept = self.store.kept(ENROLMENT)
        enrolled = () if kept is None else Enrolment.parse(kept.decode(), "the kept enrolment").trusted
        return (*self._also_trusted, *(bytes.fromhex(key) for key in enrolled))

    def adopt(self, envelope: bytes, *, older: bool = False) -> DeviceRelease:
        """Recommend from this release from now on.

        Args:
            envelope: a signed release.
            older: accept a lower version than the device has; otherwise an old one cannot be slipped in.

        Raises:
            PlanRefused: it is not signed by somebody trusted, or it is older.
            ProtocolError: it is malformed.
        """
        document, _ = verify("release", envelope, self.trusted)
        release = DeviceRelease.from_bytes(document)
        has = self._current()
        if has is not None and release.version < has.version and not older:
            raise PlanRefused(
                f"Release {release.version} is older than release {has.version}, which this device has; it stays."
            )
        self.store.keep(RELEASE, envelope)
        self._release = release
        return release

    @property
    def release(self) -> DeviceRelease:
        """The release that the device recommends from.

        Raises:
            ConfigError: it has none yet.
        """
        found = self._current()
        if found is None:
            raise ConfigError("This device has no release yet; call `adopt` with one, or `participate` to fetch it.")
        return found

    @property
    def pool(self) -> DevicePool:
        """The device as the pool of one person, in the numbering of its release's catalogue."""
        return DevicePool([self.store], self.release.catalog, budget=self._budget)

    @property
    def shelf(self) -> FolderShelf:
        """Where the device keeps tensors that plans name; they are the same for everybody, so they lie in the open."""
        return FolderShelf(self.store.folder / FOLDER, self.limits.most_kept_bytes)

    @property
    def _budget(self) -> LocalBudget | None:
        """The device's own ledger, where it insists on noise of its own."""
        if self.limits.local is None:
            return None
        from fedrec.client.budget import LocalBudget

        return LocalBudget(self.limits.local, self.store.folder / LEDGERS)

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def __enter__(self) -> Device:
        """Return the device, to be closed at the end of the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the store."""
        self.close()

    def _current(self) -> DeviceRelease | None:
        if self._release is None:
            kept = self.store.kept(RELEASE)
            if kept is not None:
                try:
                    self._release = DeviceRelease.from_bytes(verify("release", kept, self.trusted)[0])
                except ProtocolError:
                    return None  # of a signer whom the device no longer trusts, or of another version of fedrec
        return self._release

    def _settle_limits(self, limits: Limits | None) -> Limits:
        if limits is not None:
            self.store.keep(LIMITS, limits.model_dump_json().encode())
            return limits
        kept = self.store.kept(LIMITS)
        try:
            return Limits() if kept is None else Limits.model_validate(json.loads(kept))
        except ValidationError as error:
            raise StoreError("The kept limits are of another version of fedrec; give new ones.") from error

    def _numbers(self, release: DeviceRelease) -> list[int]:
        number_of = release.catalog.number_of
        return [number_of[one.item] for one in self.store.history() if one.item in number_of]

    def _scores(
        self, release: DeviceRelease, history: list[int], moment: Mapping[str, Any] | None = None
    ) -> NDArray[np.float32]:
        """Return [n_known] scores; items that the model does not know take no part in the history."""
        known = [one for one in history if one < release.n_known]
        at = moment_of(release.model, moment)
        return np.array(portable.score(release.model, release.params, known, at), np.float32)
