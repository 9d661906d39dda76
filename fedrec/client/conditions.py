"""In which conditions a device is, and which it wants for taking part."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

POWER = Path("/sys/class/power_supply")


@dataclass(frozen=True)
class Conditions:
    """Three things that decide whether taking part disturbs anybody.

    Attributes:
        charging: the device is on the mains.
        unmetered: what it sends and receives costs nothing.
        idle: nobody is using it.
    """

    charging: bool = False
    unmetered: bool = False
    idle: bool = False

    def missing(self, here: Conditions) -> tuple[str, ...]:
        """Return the names of the conditions that are wanted and not met `here`.

        >>> Conditions(charging=True, idle=True).missing(Conditions(idle=True))
        ('charging',)
        """
        names = ("charging", "unmetered", "idle")
        return tuple(name for name in names if getattr(self, name) and not getattr(here, name))


def system_conditions() -> Conditions:
    """Return what Linux tells: the power supplies, and a load below half of the cores.

    Whether a connection is metered it does not tell; it counts as unmetered here. An app on a phone asks its system,
    and gives the device a function of its own.
    """
    return Conditions(charging=_charging(POWER), unmetered=True, idle=_load() < (os.cpu_count() or 1) / 2)


def _charging(supplies: Path) -> bool:
    """Return whether a mains supply is on line; a machine without batteries is on the mains."""
    batteries = False
    for supply in sorted(supplies.iterdir()) if supplies.is_dir() else ():
        try:
            kind = (supply / "type").read_text(encoding="utf-8").strip()
            batteries |= kind == "Battery"
            if kind != "Battery" and (supply / "online").read_text(encoding="utf-8").strip() == "1":
                return True
        except OSError:
            continue
    return not batteries


def _load() -> float:
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0
