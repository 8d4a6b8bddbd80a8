"""The number of usable and of idle CPU cores."""

from __future__ import annotations

import os

from torch import distributed


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_a_process() -> int:
    """Return this process's share of the cores: all processes count as local, unless the launcher sets the local number."""
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
