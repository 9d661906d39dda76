"""What a client promises itself: its own privacy settings and its own ledger, whatever a server asks for."""

from __future__ import annotations

import os
from pathlib import Path

from fedrec.errors import BudgetExhausted, PrivacyError
from fedrec.privacy.events import GaussianEvent
from fedrec.privacy.ledger import Charge, PrivacyLedger
from fedrec.privacy.local import adjacency, unit_name
from fedrec.privacy.noise import NoiseSource, SecureNoise, SeededNoise
from fedrec.privacy.settings import AnyPrivacy, LocalPrivacy
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.task import CooccurrenceTask, CountTask, EvaluateTask, FisherTask, FitTask
from fedrec.random import Key


class LocalBudget:
    """The budgets of a pool's clients: one ledger each, on disk, or in memory where nobody is to be protected.

    Attributes:
        settings: what every client here insists on.
        folder: one file for each client; None: in memory, gone with the process.
    """

    def __init__(self, settings: LocalPrivacy, folder: Path | None = None) -> None:
        """Keep ledgers in `folder`."""
        self.settings = settings
        self.folder = folder
        self._kept: dict[int, PrivacyLedger] = {}

    @classmethod
    def of(cls, settings: AnyPrivacy, folder: Path) -> LocalBudget | None:
        """Return the budgets of an experiment's clients; None: its mode is not "local"."""
        return cls(settings, folder) if isinstance(settings, LocalPrivacy) else None

    def check(self, plan: RoundPlan) -> None:
        """Refuse a plan under which something would leave a client less private than it insists on.

        Raises:
            PrivacyError: in one sentence; nothing was computed.
        """
        task, own = plan.task, self.settings
        if isinstance(task, EvaluateTask):
            return  # settings of this mode have to say that metrics are exact
        if isinstance(task, CooccurrenceTask):
            raise PrivacyError(
                'These clients trust nobody (privacy.mode = "local") and give no co-occurrence statistic; '
                "leave training.statistics out."
            )
        if isinstance(task, FisherTask):
            raise PrivacyError(
                'These clients trust nobody (privacy.mode = "local") and do not say what matters to them; leave '
                "training.ewc out."
            )
        if task.private is None or task.private.noise != own.noise:
            raise PrivacyError(
                f"The plan asks for a {task.kind} without the noise that these clients insist on "
                f'(privacy.mode = "local", privacy.noise = "{own.noise}").'
            )
        if isinstance(task, CountTask) and task.clip_norm is None:
            raise PrivacyError("The plan asks for counts that are not bounded, so no noise can hide them.")
        if isinstance(task, FitTask) and task.private.unit != own.unit:
            raise PrivacyError(
                f"The plan protects {unit_name(task.private.unit)} by other settings than these clients' own "
                f"({unit_name(own.unit)})."
            )

    def charge(self, client: int, name: str, event: GaussianEvent, clip_norm: float) -> Charge | None:
        """Let a client pay from its own budget; None: it is spent, and the client takes no part.

        Raises:
            PrivacyError: its ledger is damaged, in use or of other settings.
        """
        kept = self._kept.get(client) or self._open(client)
        try:
            return kept.charge(name, event, clip_norm=clip_norm)
        except BudgetExhausted:
            return None
        finally:
            if self.folder is not None:
                kept.close()

    def secret(self, client: int, charge: Charge, plan: RoundPlan) -> Key:
        """Return what a client draws everything private of a charge from."""
        if self.settings.noise == "system":
            return Key(os.urandom(32))
        return charge.key(plan.key.child("local", client))

    def source(self, secret: Key) -> NoiseSource:
        """Return the noise of a charge."""
        return SecureNoise() if self.settings.noise == "system" else SeededNoise(secret.child("noise"))

    def spent(self, client: int) -> float:
        """Return the epsilon that a client has spent."""
        kept = self._kept.get(client) or self._open(client)
        try:
            return kept.spent()
        finally:
            if self.folder is not None:
                kept.close()

    def _open(self, client: int) -> PrivacyLedger:
        own = self.settings
        path = None if self.folder is None else self.folder / f"client-{client:06d}.jsonl"
        opened = PrivacyLedger(
            path, epsilon=own.epsilon, delta=own.delta, unit=unit_name(own.unit), adjacency=adjacency(own.unit)
        )
        if path is None:
            self._kept[client] = opened
        return opened
