"""An interrupt that falls where Python cannot raise still ends the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOST = """
import signal, sys, time, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts the tests may have it ignored
{ready}
class Thing:
    pass
class Finalised:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        for _ in range(1000):  # the interrupt is raised in here, and dropped
            pass
def callback(_):
    signal.raise_signal(signal.SIGINT)
    for _ in range(1000):
        pass
if {finaliser}:
    Finalised()
else:
    thing = Thing(); reference = weakref.ref(thing, callback); del thing
print("went on", flush=True)
end = time.monotonic() + {seconds}
while time.monotonic() < end:
    pass
print("to the end")
"""
READY = "from fedrec.interrupts import redeliver_interrupts; redeliver_interrupts()"


def lose(finaliser: bool, ready: str, seconds: float) -> subprocess.CompletedProcess[str]:
    code = LOST.format(ready=ready, finaliser=finaliser, seconds=seconds)
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("finaliser", [True, False])
def test_a_dropped_interrupt_is_raised_again(finaliser: bool) -> None:
    result = lose(finaliser, READY, 30)
    assert "to the end" not in result.stdout
    assert result.returncode != 0
    assert result.stderr.count("Traceback") == 1
    assert result.stderr.endswith("KeyboardInterrupt\n")
    assert "Exception ignored" not in result.stderr


def test_python_alone_would_go_on() -> None:
    result = lose(True, "", 0.3)
    assert result.stdout == "went on\nto the end\n"


def test_other_dropped_errors_are_still_printed() -> None:
    code = f"{READY}\nclass Broken:\n    def __del__(self):\n        raise ValueError('seen')\nBroken()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Exception ignored in" in result.stderr
    assert "ValueError: seen" in result.stderr
