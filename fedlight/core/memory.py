"""What a process does with memory that it has freed: it keeps it, so that the next step need not ask the system for pages anew."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

MAPPED_FROM = 32 << 20  # bytes; the most that every version of glibc takes
KEPT = 256 << 20  # bytes of free memory at the heap's end before it is given back
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


@functools.cache
def keep_freed_memory() -> bool:
    """Let the C library keep what this process frees, and return whether it does so (glibc alone).

    By itself glibc gives large blocks back to the system: a training step on the CPU, which frees and allocates the same tensors over
    and over, has its pages zeroed and mapped again each time. It holds for the whole process and cannot be undone; set one of glibc's own
    variables in the environment, such as ``MALLOC_TRIM_THRESHOLD_``, to choose otherwise.
    """
    chosen = any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"))
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)) and bool(library.mallopt(_M_TRIM_THRESHOLD, KEPT))
