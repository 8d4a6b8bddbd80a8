"""Which clients of a cohort each process runs: shares of equal work, since a round takes as long as its slowest process."""

from __future__ import annotations

import heapq

import numpy as np


def balanced_shares(clients: np.ndarray, work: np.ndarray, processes: int) -> list[np.ndarray]:
    """Return the clients ``[n]`` of every process, in their order, such that all have about equal ``work`` ``[n]`` (samples to go through).

    The longest go first, each to the process with the least work so far: none then works more than 4/3 as long as in the best division
    (Graham 1969, Theorem 2). Equal clients, and those without work, are dealt out in turn. Everyone who calls this finds the same shares.
    """
    if processes == 1:
        return [clients]
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [(0, 0, process) for process in range(processes)]  # work and clients so far
    for place in np.argsort(-work, kind="stable").tolist():
        load, count, process = loads[0]
        shares[process].append(place)
        heapq.heapreplace(loads, (load + work[place].item(), count + 1, process))
    return [clients[np.sort(np.array(share, dtype=np.int64))] for share in shares]
