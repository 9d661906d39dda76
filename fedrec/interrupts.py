"""An interrupt that Python would drop is raised again.

Where a signal's exception falls into a place that cannot raise (a finaliser, a callback of a weak reference, a check
that a compiled library asks for), Python prints it and goes on; a long run would then not stop when it is told to.
"""

from __future__ import annotations

import _thread
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

AGAIN_SECONDS = 0.05


def redeliver_interrupts() -> None:
    """Raise a dropped ``KeyboardInterrupt`` again in the main thread, as often as it takes; say nothing about it."""
    shown = sys.unraisablehook

    def hook(unraisable: UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            shown(unraisable)
            return
        # Not from here: what the hook itself raises is dropped as well.
        again = threading.Timer(AGAIN_SECONDS, _thread.interrupt_main)
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
