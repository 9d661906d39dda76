"""How the C library of a process that trains clients keeps its memory."""

from __future__ import annotations

import ctypes
import os
from functools import cache

KEPT, LARGEST, GROWN = 1 << 30, 128 << 20, 64 << 20
"""Bytes: of the free end of a heap that stay; from which on an array stands outside it; and by which it grows."""
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_SET_BY_THE_USER = ("MALLOC_", "GLIBC_TUNABLES")


@cache
def keep_freed_memory() -> bool:
    """Let freed memory be used again at once, and return whether this process now does that.

    Every block of clients takes and frees the same tens of megabytes. glibc hands them back to the system in between,
    and taking them anew costs a page fault for each 4 KiB. Arrays of 128 MiB and more are handed back as before.

    Nothing changes where the C library is not glibc, or where the user has set its ``MALLOC_...`` variables.
    """
    if any(name.startswith(_SET_BY_THE_USER) for name in os.environ):
        return False
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if library is None or not hasattr(library, "gnu_get_libc_version"):
        return False
    options = ((_TRIM_THRESHOLD, KEPT), (_TOP_PAD, GROWN), (_MMAP_THRESHOLD, LARGEST))
    return all(library.mallopt(option, size) == 1 for option, size in options)
