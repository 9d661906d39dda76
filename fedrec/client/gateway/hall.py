"""`Hall`: where devices meet the server's questions. One event loop, no locks; what is large lies on the disk."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import SystemRandom
from typing import Any

from fedrec.client.conditions import Conditions
from fedrec.client.gateway.devices import Devices, Known
from fedrec.client.gateway.rounds import Blob, Round, Task, folded, new_task, upload_limit
from fedrec.client.gateway.settings import GatewaySettings
from fedrec.client.gateway.split import Parts, cut, joined
from fedrec.client.gateway.spool import Spool, Upload
from fedrec.client.gateway.stock import blobs, in_use
from fedrec.client.shelf import FOLDER, FolderShelf
from fedrec.errors import FedrecError, GatewayError, MaskingError, PlanRefused, ProtocolError, TensorsMissing
from fedrec.privacy.terms import Terms as SecureTerms
from fedrec.protocol import wire
from fedrec.protocol.link import Verb
from fedrec.protocol.parcels import Missing, Named
from fedrec.protocol.plan import Census, CensusRequest, RoundPlan
from fedrec.protocol.signing import DeviceRelease, read_key, verify

SPOOL = "spool"
SESSION_SECONDS = 600.0
"""So long after its last phase a masked sum is given up."""
_RETRY_SECONDS = 0.5
Say = Callable[[dict[str, Any]], None]


@dataclass
class Session:
    """A masked sum: its terms, and which device each party is."""

    terms: SecureTerms
    device_of: dict[int, int]
    devices: frozenset[int]
    until: float


@dataclass(frozen=True)
class Said:
    """What a device is told: a task, or when to come back."""

    round: Round | None
    task: Task | None
    come_back_seconds: float
    stay: bool


@dataclass
class _Counts:
    check_ins: int = 0
    uploads: int = 0
    refused: int = 0
    rounds: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=50))


class Hall:
    """A gateway without its network."""

    def __init__(
        self,
        folder: Path,
        settings: GatewaySettings,
        devices: Devices,
        say: Say = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Open the hall of a gateway's folder; whatever an earlier one had spooled is gone."""
        self.folder, self.settings, self.devices = folder, settings, devices
        self._say, self._clock, self._now = say, clock, now
        self._trusted = [bytes.fromhex(key) for key in settings.trusted]
        named = settings.identity
        self._identity = None if named is None else read_key(settings.file(folder, named))
        self._spool = Spool(folder / SPOOL, settings.bounds.spool_bytes)
        self._shelf = FolderShelf(folder / FOLDER, settings.bounds.tensors_bytes)
        self._random = SystemRandom()
        self._rounds: list[Round] = []
        self._tasks: dict[str, tuple[Round, Task]] = {}
        self._roster: list[int] = []
        self._sessions: dict[str, Session] = {}
        self._woken: dict[int, asyncio.Event] = {}
        self._release: tuple[int, Blob] | None = None
        self._release_at: tuple[float, int] | None = None
        self._counts = _Counts()

    # For devices.

    async def check_in(self, device: Known, here: Conditions, kinds: list[str], wait_seconds: float) -> Said:
        """Return something to do for a device, or when it shall come back; it may be held for a while."""
        device.seen = self._now()
        self._counts.check_ins += 1
        until = self._clock() + min(max(wait_seconds, 0.0), self.settings.wait_seconds)
        while True:
            found = self._task_for(device, here, kinds)
            if found is not None:
                return Said(*found, 0.0, True)
            left = until - self._clock()
            stay = any(device.number in one.devices for one in self._live_sessions())
            if left <= 0 or (len(self._woken) >= self.settings.bounds.waiting and device.number not in self._woken):
                return Said(None, None, _RETRY_SECONDS if stay else self._later(), stay)
            event = self._woken.setdefault(device.number, asyncio.Event())
            event.clear()
            try:
                await asyncio.wait_for(event.wait(), left)
            except TimeoutError:
                continue
            finally:
                self._woken.pop(device.number, None)

    def blob(self, device: Known, sha256: str) -> Blob:
        """Return a document that a device may download: of its own open task, its plan's tensors, or the release.

        Raises:
            GatewayError: it is neither.
        """
        for one in self._rounds:
            task = one.tasks.get(device.number)
            if task is None:
                continue
            for blob in (task.document, one.plan, one.tensors.get(sha256)):
                if blob is not None and blob.sha256 == sha256:
                    return blob
        if self._release is not None and self._release[1].sha256 == sha256:
            return self._release[1]
        raise GatewayError("There is no such document for this device; check in again.")

    def task(self, device: Known, name: str) -> tuple[Round, Task]:
        """Return an open task of a device.

        Raises:
            GatewayError: there is none of this name, its round is closed, or it is another device's.
        """
        found = self._tasks.get(name)
        if found is None or not found[0].open:
            raise GatewayError("This task is unknown or its round is closed; nothing more is taken for it.")
        if found[1].device != device.number:
            raise GatewayError("This task was given to another device.")
        return found

    def begin_upload(self, device: Known, name: str, sha256: str, size: int, offset: int) -> Upload:
        """Return where a device's answer goes.

        Raises:
            GatewayError: it is too long, was given before, comes twice at once, or does not go on where it stopped.
        """
        round_, task = self.task(device, name)
        if task.declined:
            raise GatewayError("This task was declined.")
        if not 0 < size <= round_.upload_limit:
            raise GatewayError(f"An answer of {size:,} bytes is refused; at most {round_.upload_limit:,} are taken.")
        upload = task.upload
        if upload is not None and upload.complete:
            raise GatewayError("This task was answered before; an answer is taken once.")
        if upload is not None and upload.busy:
            raise GatewayError("This task is being answered on another connection.")
        if upload is not None and (upload.sha256, upload.size) != (sha256, size):
            upload.drop()
            upload = None
        if upload is None:
            upload = task.upload = Upload(self._spool, f"{name}.part", sha256, size)
        if upload.offset != offset:
            raise GatewayError(f"The answer goes on at byte {upload.offset:,}, not {offset:,}.")
        upload.busy = True
        return upload

    def finish_upload(self, device: Known, name: str) -> None:
        """Take a whole answer.

        Raises:
            GatewayError: its digest is wrong, or the round was closed meanwhile.
        """
        round_, task = self.task(device, name)
        assert task.upload is not None
        task.upload.finish()
        self._counts.uploads += 1
        round_.look()

    def decline(self, device: Known, name: str) -> None:
        """Note that a device will not do a task."""
        round_, task = self.task(device, name)
        task.declined = True
        round_.look()

    @property
    def release(self) -> tuple[int, Blob] | None:
        """Version and document of the release that devices are given; the file is read again when it has changed.

        A file that no trusted server signed is not given out, and said so once.
        """
        if self.settings.release is None:
            return None
        path = self.folder / self.settings.release
        try:
            stat = path.stat()
            if (stat.st_mtime, stat.st_size) == self._release_at:
                return self._release
            self._release_at = (stat.st_mtime, stat.st_size)
            data = path.read_bytes()
            document, _ = verify("release", data, self._trusted)
            self._release = (DeviceRelease.from_bytes(document).version, Blob.of(data, path))
        except (OSError, FedrecError) as error:
            self._say({"event": "release refused", "file": str(path), "why": str(error)})
        return self._release

    # For the server.

    async def answer(self, verb: Verb, document: bytes, parcels: Mapping[str, bytes] | None = None) -> bytes:
        """Return the node's answer to one question of the server, once its devices have given theirs.

        Args:
            verb: what is asked.
            document: the question.
            parcels: the tensors that came with it, by digest.

        Raises:
            FedrecError: the question is malformed, not signed by a trusted server, or nobody can answer it.
        """
        if verb == "census":
            ticket = CensusRequest.from_bytes(document).ticket
            since = self._now() - self.settings.seen_within_seconds
            present = self.devices.present(since, self.settings.bounds.strikes)
            self._roster = [one.number for one in present]
            self.devices.flush()
            self._say({"event": "census", "devices": len(self._roster)})
            return Census(node=self.settings.name, n_clients=len(self._roster), ticket=ticket).to_bytes()
        try:
            if verb == "run":
                return await self._run(document, parcels or {})
            return await self._phase(verb, document, parcels or {})
        except TensorsMissing as error:
            return Missing(digests=error.digests).to_bytes()

    def status(self) -> dict[str, Any]:
        """Return what an operator may want to know, as JSON."""
        every = self.devices.all()
        since = self._now() - self.settings.seen_within_seconds
        return {
            "devices": len(every),
            "revoked": sum(one.revoked for one in every),
            "seen": len(self.devices.present(since, self.settings.bounds.strikes)),
            "quarantined": [one.name for one in every if one.strikes >= self.settings.bounds.strikes],
            "waiting": len(self._woken),
            "check_ins": self._counts.check_ins,
            "uploads": self._counts.uploads,
            "refused": self._counts.refused,
            "spool_bytes": self._spool.used,
            "release": None if self.release is None else self.release[0],
            "open": [one.described for one in self._rounds],
            "rounds": list(self._counts.rounds),
        }

    async def _run(self, document: bytes, parcels: Mapping[str, bytes]) -> bytes:
        content, terms = verify("plan", document, self._trusted)
        plan, named = RoundPlan.outline(content)  # what is only named is never trained, so no check needs it
        if terms is None:
            raise PlanRefused("The plan comes without terms, so no device would answer it.")
        if len(plan.slots) and not 0 <= int(plan.slots.min()) <= int(plan.slots.max()) < len(self._roster):
            raise ProtocolError(
                f"The plan names clients {int(plan.slots.min())} to {int(plan.slots.max())} of {len(self._roster)} "
                "present ones here; take the census again."
            )
        left = terms.expires_at - self.settings.margin_seconds - self._now()
        tensors = await self._tensors(named, parcels)
        path = self._spool.put(f"plan-{os.urandom(8).hex()}", document)
        tasks = {self._roster[slot]: new_task(self._roster[slot], slot) for slot in plan.slots.tolist()}
        blob, limit = Blob.of(document, path), upload_limit(plan)
        made = Round("run", plan.task.kind, blob, limit, self._deadline(left), tasks, tensors=tensors)
        try:
            await self._held(made)
            work = asyncio.to_thread(
                folded, plan, self.settings.name, made.answers(), lambda slot, why: self._blame(made, slot, why)
            )
            return await work
        finally:
            self._swept(made)

    async def _phase(self, verb: Verb, document: bytes, parcels: Mapping[str, bytes]) -> bytes:
        document, terms = verify("phase", document, self._trusted)
        if terms is None:
            raise PlanRefused("A phase of a masked sum comes without terms, so nobody knows when it ends.")
        session = self._session_of(verb, document)
        parts = cut(verb, document, None if session is None else session.terms)
        if verb == "advertise":
            session = self._begin(parts)
        elif session is None or parts.session not in self._sessions:
            raise MaskingError("The server speaks of another masked sum than was begun here.")
        assert session is not None
        session.until = self._clock() + SESSION_SECONDS
        left = terms.expires_at - self.settings.margin_seconds - self._now()
        plan, tensors = None, dict[str, Blob]()
        if parts.plan is not None:
            content, _ = verify("plan", parts.plan, self._trusted)
            tensors = await self._tensors(RoundPlan.outline(content)[1], parcels)
            plan = Blob.of(parts.plan, self._spool.put(f"plan-{os.urandom(8).hex()}", parts.plan))
        tasks = {
            session.device_of[n]: new_task(session.device_of[n], n, Blob.of(part))
            for n, part in parts.documents.items()
            if n in session.device_of
        }
        made = Round(verb, None, plan, parts.most_bytes, self._deadline(left), tasks, parts.session, tensors)
        try:
            await self._held(made)
            reads = {party: path.read_bytes for party, path in made.answers().items()}
            return await asyncio.to_thread(
                joined,
                verb,
                parts.session,
                session.terms,
                reads,
                lambda n, why: self._blame(made, n, why),
                self._identity,
            )
        finally:
            self._swept(made)
            if verb == "unmask":
                self._sessions.pop(parts.session, None)

    async def _tensors(self, named: Mapping[str, Named], parcels: Mapping[str, bytes]) -> dict[str, Blob]:
        return await asyncio.to_thread(blobs, self._shelf, named.values(), parcels, in_use(self._rounds))

    def _begin(self, parts: Parts) -> Session:
        assert parts.terms is not None
        assert parts.slots is not None
        if parts.session in self._sessions or any(slot >= len(self._roster) for slot in parts.slots.values()):
            raise MaskingError("The masked sum was begun before, or names clients that are not here; take the census.")
        device_of = {party: self._roster[slot] for party, slot in parts.slots.items()}
        made = self._sessions[parts.session] = Session(parts.terms, device_of, frozenset(device_of.values()), 0.0)
        return made

    def _session_of(self, verb: Verb, document: bytes) -> Session | None:
        if verb == "advertise":
            return None
        header, _ = wire.unpack(f"secure-{verb}-request", document)
        return self._sessions.get(str(header.get("session")))

    def _live_sessions(self) -> list[Session]:
        now = self._clock()
        for name in [name for name, one in self._sessions.items() if one.until and one.until < now]:
            del self._sessions[name]
        return list(self._sessions.values())

    async def _held(self, made: Round) -> None:
        """Let devices answer until nobody is waited for, or the deadline."""
        self._rounds.append(made)
        self._tasks |= {task.name: (made, task) for task in made.tasks.values()}
        for device in made.tasks:
            event = self._woken.get(device)
            if event is not None:
                event.set()
        made.look()
        with suppress(TimeoutError):
            await asyncio.wait_for(made.done.wait(), max(0.0, made.deadline - self._clock()))
        made.open = False

    def _swept(self, made: Round) -> None:
        """Write down how a round ended, and remove what it left on the disk."""
        made.open = False
        line = made.described
        self._counts.rounds.append(line)
        self._say({"event": "round", **line})
        if made in self._rounds:
            self._rounds.remove(made)
        for task in made.tasks.values():
            self._tasks.pop(task.name, None)
            if task.upload is not None:
                task.upload.drop()
        if made.plan is not None and made.plan.path is not None:
            self._spool.drop(made.plan.path)

    def _blame(self, made: Round, place: int, why: str) -> None:
        device = next(task.device for task in made.tasks.values() if task.place == place)
        self.devices.strike(device)
        self._counts.refused += 1
        self._say({"event": "answer refused", "device": device, "verb": made.verb, "why": why})

    def _deadline(self, seconds: float) -> float:
        return self._clock() + max(0.0, min(seconds, self.settings.deadline_seconds))

    def _task_for(self, device: Known, here: Conditions, kinds: list[str]) -> tuple[Round, Task] | None:
        wanted = Conditions(self.settings.charging, self.settings.unmetered, self.settings.idle)
        for one in self._rounds:
            task = one.tasks.get(device.number)
            if task is None or not one.open or task.closed:
                continue
            if one.kind is not None and one.kind not in kinds:
                task.declined = True
                one.look()
                continue
            if one.session is None and wanted.missing(here):
                continue
            return one, task
        return None

    def _later(self) -> float:
        """Return when a device shall come back: the later the more there are, and never all at once."""
        pace = self.settings.pace
        n = len(self.devices.all())
        mean = min(max(n / pace.per_second, pace.least_seconds), pace.most_seconds)
        return mean * self._random.uniform(1 - pace.jitter, 1 + pace.jitter)
