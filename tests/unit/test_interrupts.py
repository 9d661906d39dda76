"""An interrupt that falls where Python cannot raise still ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child that its parent is gone")
@pytest.mark.parametrize("told", [True, False])
def test_a_child_ends_with_a_parent_that_was_killed(told: bool) -> None:
    code = """
import subprocess, sys, time
from fedrec.interrupts import ending_with_parent
first = ending_with_parent() if sys.argv[1] == "True" else None
child = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(60)"],
    preexec_fn=first, start_new_session=True, stdout=subprocess.DEVNULL,
)
print(child.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code, str(told)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    end = time.monotonic() + (30 if told else 0.5)
    while alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    outlived = alive(child)
    if outlived:
        os.kill(child, signal.SIGKILL)
    assert outlived is not told


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
