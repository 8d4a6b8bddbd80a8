"""How many of this machine's cores there are to compute on, and how many are left."""

from __future__ import annotations

import os

import torch
from torch import distributed


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_a_process() -> int:
    """Return this process's share of them: all are taken to run on this machine, unless the launcher says how many do."""
    world = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", world)))


def spare_cores(processes: int) -> int:
    """Return how many of the usable cores are left when as many ``processes`` have torch's threads busy."""
    return max(0, usable_cores() - processes * torch.get_num_threads())
