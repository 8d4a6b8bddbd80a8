"""Peaks of resident memory. Needs the standard library alone: environments without fedlight use it too."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


def peak_rss_mb() -> float:
    """Return the peak of this process's resident memory in MB."""
    if Path("/proc/self/status").exists():  # on Linux ru_maxrss also covers the process that this one was started from
        return _peak(os.getpid())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def tree_peak_rss_mb() -> float:
    """Return the sum of the peaks of this process and of all that it started and that still run, in MB (this one's alone, if not Linux)."""
    if not Path("/proc/self/status").exists():
        return peak_rss_mb()
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
    tree = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return sum(_peak(process) for process in tree)


def _peak(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6
