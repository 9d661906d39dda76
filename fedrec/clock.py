"""The clock of the system; whoever needs the time is given a clock, and this one by default."""

from __future__ import annotations

import time


def system_clock() -> int:
    """Return the time now in seconds since 1970 UTC."""
    return int(time.time())
