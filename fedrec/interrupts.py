"""Signals that would be lost: an interrupt that Python drops, and the end of a parent that its child does not hear of.

Where a signal's exception falls into a place that cannot raise (a finaliser, a callback of a weak reference, a check
that a compiled library asks for), Python prints it and goes on; a long run would then not stop when it is told to.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

AGAIN_SECONDS = 0.05
PR_SET_PDEATHSIG = 1


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


def ending_with_parent() -> Callable[[], None] | None:
    """Return what a child process does first (`preexec_fn`) to be told to end when its parent is killed.

    None where the system is not Linux: there a child outlives a parent that could not stop it.
    """
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded here: between fork and exec nothing may be imported

    def follow() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)

    return follow
