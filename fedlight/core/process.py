"""What a process may use and what it shows: its cores, the memory that it has freed, its loggers."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

MAPPED_FROM = 32 << 20  # bytes; the most that every version of glibc takes
KEPT = 256 << 20  # bytes of free memory at the heap's end before it is given back
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_a_process() -> int:
    """Return this process's share of the cores: all processes count as local, unless the launcher sets the local number."""
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", world)))


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


@contextmanager
def quiet(*names: str, level: int = logging.ERROR) -> Iterator[None]:
    """Silence these loggers' records below ``level`` within the block."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, own in zip(loggers, before, strict=True):
            logger.setLevel(own)
