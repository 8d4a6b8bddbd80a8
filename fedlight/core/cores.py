"""How many of this machine's cores are left."""

from __future__ import annotations

import os

import torch


def spare_cores(processes: int) -> int:
    """Return how many of the cores that this process may use are left when as many ``processes`` have torch's threads busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, cores - processes * torch.get_num_threads())
