"""What a device insists on, and its own account of what it took part in over its life."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedrec.errors import PlanRefused
from fedrec.privacy.settings import LocalPrivacy
from fedrec.privacy.terms import Terms as SecureTerms
from fedrec.protocol.plan import RoundPlan
from fedrec.protocol.signing import Terms, digest_of
from fedrec.protocol.task import CountTask, FitTask

Kind = Literal["fit", "count", "cooccurrence", "evaluate"]
KINDS: tuple[Kind, ...] = ("fit", "count", "cooccurrence", "evaluate")
_ROUNDING = 1e-9
OWN = "this device's own ledger"


class Limits(BaseModel):
    """What a device takes part in; whatever asks for more is refused, in one sentence that also goes into its log."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", allow_inf_nan=False)
    cohort_minimum: int = Field(default=20, ge=1)
    """In a sum of fewer people than this it does not hide."""
    epsilon: float | None = Field(default=8.0, gt=0)
    """What may be spent over the device's whole life, over all ledgers that it ever took part in; None: it also takes
    part where nothing is guaranteed."""
    delta: float = Field(default=1e-4, gt=0, lt=1)
    """The largest delta of all those ledgers together."""
    masked: bool = False
    """Take part in masked sums alone, so that nobody sees what it sends."""
    tasks: tuple[Kind, ...] = KINDS
    """Which kinds of tasks it does."""
    most_bytes: int = Field(default=256 << 20, ge=1024)
    """Longer documents are not downloaded."""
    most_kept_bytes: int = Field(default=256 << 20, ge=0)
    """What may be kept on the device of tensors that plans name, such as the frozen part of a model; what was used
    longest ago makes room, and is downloaded again when needed."""
    identities: dict[str, int] | None = None
    """Masked sums are joined only with nodes whose public key, in hexadecimal, is named here, and for how many people
    each may speak; the device's own gateway is one of them. None: whomever the server introduces."""
    local: LocalPrivacy | None = None
    """In mode "local": which noise the device adds itself, and what its own ledger may spend; it then counts and fits
    for no server that asks for less. None: for no server that asks for it."""
    simulation: bool = False
    """Accept noise from a seed, which protects nobody."""

    @model_validator(mode="after")
    def _within(self) -> Self:
        if self.local is not None and self.epsilon is not None and self.local.epsilon > self.epsilon:
            raise ValueError("the own ledger may spend more than the device does over its life; lower local.epsilon")
        return self

    @field_validator("identities")
    @classmethod
    def _keys(cls, said: dict[str, int] | None) -> dict[str, int] | None:
        if said is not None and any(
            len(key) != 64 or set(key) - set("0123456789abcdef") or n < 1 for key, n in said.items()
        ):
            raise ValueError("a public key has 64 hexadecimal digits, a number of people is 1 or more")
        return said


@dataclass(frozen=True)
class Spent:
    """What one privacy ledger has cost a device, by the word of the server that keeps it.

    Attributes:
        ledger: its name.
        epsilon: the largest that a plan which the device answered stated; None: one stated no guarantee.
        delta: the probability that goes with it.
        rounds: how many plans the device answered.
    """

    ledger: str
    epsilon: float | None
    delta: float
    rounds: int


@dataclass(frozen=True)
class PrivacySpent:
    """What a device has spent in all.

    Attributes:
        epsilon: the sum over its ledgers (basic composition); None: it took part where nothing is guaranteed.
        delta: the sum of their deltas.
        ledgers: each on its own.
    """

    epsilon: float | None
    delta: float
    ledgers: tuple[Spent, ...]


def spent(parts: Iterable[Mapping[str, Any]]) -> PrivacySpent:
    """Return what all that a device took part in has cost it."""
    ledgers: dict[str, Spent] = {}
    for part in parts:
        name, epsilon = str(part["ledger"]), part["epsilon"]
        before = ledgers.get(name, Spent(name, 0.0, 0.0, 0))
        unknown = before.epsilon is None or epsilon is None
        ledgers[name] = Spent(
            name,
            None if unknown else max(before.epsilon or 0.0, float(epsilon or 0.0)),
            max(before.delta, float(part["delta"])),
            before.rounds + 1,
        )
    return total(list(ledgers.values()))


def total(ledgers: Sequence[Spent]) -> PrivacySpent:
    """Return the sum over ledgers."""
    found = tuple(ledgers)
    known = [one.epsilon for one in found if one.epsilon is not None]
    return PrivacySpent(sum(known) if len(known) == len(found) else None, sum(one.delta for one in found), found)


def check(
    plan: RoundPlan,
    terms: Terms,
    secure: SecureTerms | None,
    limits: Limits,
    parts: list[dict[str, Any]],
    catalog_digest: str,
    now: int,
) -> dict[str, Any]:
    """Refuse a plan that asks for more than the device gives; return what goes into its account otherwise.

    Args:
        plan: what is asked, its signature checked.
        terms: what the server promises about it, signed with it.
        secure: the terms of the masked sum that asks for it; None: what is sent is not masked.
        limits: what the device insists on.
        parts: all that it took part in before.
        catalog_digest: of the catalogue that it knows.
        now: seconds since 1970 UTC.

    Raises:
        PlanRefused: in one sentence.
    """
    _check_identity(plan, terms, parts, catalog_digest, now)
    if plan.task.kind not in limits.tasks:
        raise PlanRefused(f"The plan asks for a task of kind '{plan.task.kind}', which this device does not do.")
    _check_cohort(terms, secure, limits)
    own = _check_noise(plan, terms, secure, limits)
    said = {
        "ledger": terms.ledger, "epsilon": terms.epsilon, "delta": terms.delta, "nonce": terms.nonce,
        "expires_at": terms.expires_at, "slice": plan.slice, "round": plan.round, "task": plan.task.kind,
    }  # fmt: skip
    if own:  # what it costs stands in the device's own ledger, which refuses by itself
        return said | {"ledger": OWN, "epsilon": 0.0, "delta": 0.0}
    before = [one for one in spent(parts).ledgers if one.ledger == terms.ledger]
    if before and before[0].epsilon and (terms.epsilon or 0.0) < before[0].epsilon * (1 - _ROUNDING):
        raise PlanRefused(
            f"The plan says that ledger '{terms.ledger}' has spent epsilon {terms.epsilon or 0.0:.4g}, but it had "
            f"spent {before[0].epsilon:.4g} before; what is spent never comes back."
        )
    _check_budget(spent([*parts, said]), limits)
    return said


def _check_identity(plan: RoundPlan, terms: Terms, parts: list[dict[str, Any]], catalog_digest: str, now: int) -> None:
    if plan.catalog_digest != catalog_digest:
        raise PlanRefused(
            f"The plan numbers items by catalogue {plan.catalog_digest[:12]}, which this device does not know (it has "
            f"{catalog_digest[:12]}); it needs a newer release."
        )
    if now >= terms.expires_at:
        raise PlanRefused(f"The plan expired {now - terms.expires_at} s ago; it is a replay, or a clock is wrong.")
    if any(part["nonce"] == terms.nonce for part in parts):
        raise PlanRefused("The plan was answered before; this device answers each once.")


def _check_cohort(terms: Terms, secure: SecureTerms | None, limits: Limits) -> None:
    least = terms.cohort_minimum if secure is None else min(terms.cohort_minimum, secure.settings.minimum)
    if least < limits.cohort_minimum:
        raise PlanRefused(
            f"The plan opens sums of {least} people, this device hides among at least {limits.cohort_minimum}."
        )
    if secure is None and (limits.masked or terms.secure is not None):
        raise PlanRefused("The plan asks for a sum that is not masked, and this device takes part in masked ones only.")
    if secure is not None and terms.secure != digest_of(secure):
        raise PlanRefused("The plan was signed for other terms of the masked sum than the device was told.")


def _check_noise(plan: RoundPlan, terms: Terms, secure: SecureTerms | None, limits: Limits) -> bool:
    """Refuse noise that protects too little; return whether the device is to add noise of its own."""
    own = plan.task.private if isinstance(plan.task, FitTask | CountTask) else None
    seeded = (secure is not None and secure.noise == "seed") or (own is not None and own.noise == "seed")
    if seeded and not limits.simulation:
        raise PlanRefused("The plan asks for noise from a seed, which protects nobody outside a simulation.")
    if secure is not None and terms.epsilon is not None and secure.noise_multiplier == 0:
        raise PlanRefused("The plan promises an epsilon, but its masked sum has no noise.")
    if own is not None and limits.local is None:
        raise PlanRefused(
            "The plan asks for noise of the device's own, and this device keeps no ledger to pay it from."
        )
    return own is not None


def _check_budget(after: PrivacySpent, limits: Limits) -> None:
    if limits.epsilon is None:
        return
    if after.epsilon is None:
        raise PlanRefused(
            "The plan guarantees no privacy (it names no epsilon), and this device spends at most epsilon "
            f"{limits.epsilon:g} over its life."
        )
    kept = limits.local  # its own ledger's whole budget is spoken for
    epsilon = after.epsilon + (0.0 if kept is None else kept.epsilon)
    delta = after.delta + (0.0 if kept is None else kept.delta)
    if epsilon > limits.epsilon * (1 + _ROUNDING) or delta > limits.delta * (1 + _ROUNDING):
        raise PlanRefused(
            f"The plan would bring what this device has spent over its life to epsilon {epsilon:.4g} at delta "
            f"{delta:.2g}, above its own {limits.epsilon:g} at {limits.delta:.2g}."
        )
