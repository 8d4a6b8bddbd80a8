"""How many of this machine's cores there are to compute on."""

from __future__ import annotations

import os

from torch import distributed


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_a_process() -> int:
    """Return this process's share of them: all are taken to run on this machine, unless the launcher says how many do."""
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
