"""Shares of a cohort: every client once, in order, and never far from the best division."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedlight.rounds.clients import balanced_shares

WORK = st.lists(st.integers(0, 50), max_size=8)


def heaviest(shares: list[np.ndarray], work: dict[int, int]) -> int:
    """Return the work of the process that has the most."""
    return max(sum(work[client] for client in share.tolist()) for share in shares)


@given(WORK, st.integers(1, 3))
def test_every_client_is_run_once_and_no_process_far_longer_than_need_be(work: list[int], processes: int) -> None:
    clients = np.arange(len(work)) * 3 + 1
    shares = balanced_shares(clients, np.array(work, dtype=np.int64), processes)
    assert len(shares) == processes
    assert sorted(np.concatenate(shares).tolist()) == clients.tolist()
    assert all((np.diff(share) > 0).all() for share in shares)
    loads = [
        [sum(w for w, process in zip(work, places, strict=True) if process == p) for p in range(processes)]
        for places in itertools.product(range(processes), repeat=len(work))
    ]
    best = min(map(max, loads))
    assert heaviest(shares, dict(zip(clients.tolist(), work, strict=True))) <= (4 / 3 - 1 / (3 * processes)) * best + 1e-9


@given(st.integers(0, 40), st.integers(1, 5), st.sampled_from([7, 0.5, 0]))
def test_equal_clients_are_dealt_out_in_turn(count: int, processes: int, work: float) -> None:
    clients = np.arange(count)
    shares = balanced_shares(clients, np.full(count, work), processes)
    assert [share.tolist() for share in shares] == [clients[process::processes].tolist() for process in range(processes)]
