"""Memory that a block of clients gives back stays with the process."""

import os
import subprocess
import sys

import pytest

from fedrec.client.allocator import keep_freed_memory

FAULTS = """
import resource
from fedrec.client.allocator import keep_freed_memory
kept, found = keep_freed_memory(), []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"x") * (100 << 20)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(kept), *found)
"""


def faults(**more: str) -> tuple[bool, list[int]]:
    """Return whether memory is kept, and the page faults of taking and freeing 100 MiB three times."""
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**quiet, **more}, capture_output=True, text=True, check=True
    )
    kept, *found = (int(word) for word in done.stdout.split())
    return bool(kept), found


@pytest.mark.skipif(os.confstr("CS_GNU_LIBC_VERSION") is None, reason="only glibc is told")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, found = faults()
    assert kept
    assert found[2] < found[0] / 10


def test_what_the_user_has_set_counts() -> None:
    kept, found = faults(MALLOC_TOP_PAD_="131072")
    assert not kept
    assert found[2] > found[0] / 2


def test_it_is_said_once() -> None:
    assert keep_freed_memory() is keep_freed_memory()
