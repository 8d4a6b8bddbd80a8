"""Sums modulo a window: exact where they lie within it, put right where few left it, left out and told where many did."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.core.errors import MessageError
from fedlight.core.windows import BLOCK, PRIME, Run, WindowFormat, checks, count_checks, mend

FORMAT = WindowFormat((Run(1, 30), Run(7, 200), Run(300, 70)), 10)
LIMITS = np.repeat([run.limit for run in FORMAT.parts], [run.length for run in FORMAT.parts])


def fold(sums: np.ndarray) -> np.ndarray:
    """What is left of sums modulo their windows."""
    window = 2 * LIMITS + 1
    return (sums + LIMITS) % window - LIMITS


def sums_within(seed: int) -> np.ndarray:
    """Sums of three and a half deviations a window."""
    drawn = np.random.default_rng(seed).normal(0, LIMITS / 3.5)
    return np.clip(np.rint(drawn), -LIMITS, LIMITS).astype(np.int64)


@given(st.integers(0, 10**6))
def test_a_code_is_packed_in_the_base_of_its_windows_and_read_back(seed: int) -> None:
    code = torch.from_numpy(np.random.default_rng(seed).integers(-LIMITS, LIMITS + 1).astype(np.int32))
    packed = FORMAT.pack(code)
    assert len(packed) == FORMAT.payload_bytes and torch.equal(FORMAT.unpack(packed), code)
    worth = sum(length * np.log2(2 * limit + 1) for limit, length in FORMAT.parts) / 8
    assert worth <= FORMAT.payload_bytes <= 1.03 * worth + 2.2 * len(FORMAT.parts)


@pytest.mark.parametrize("at", [0, 100, 299])
def test_what_lies_outside_its_window_is_refused(at: int) -> None:
    code = torch.zeros(300, dtype=torch.int32)
    code[at] = -int(LIMITS[at]) - 1
    with pytest.raises(MessageError, match=f"within .*coordinate {at} is larger"):
        FORMAT.pack(code)
    for wrong in (code.float(), code[1:]):
        with pytest.raises(MessageError, match="Expected a code of 300 integers"):
            FORMAT.pack(wrong)
    with pytest.raises(MessageError, match="payload of"):
        FORMAT.unpack(bytes(FORMAT.payload_bytes + 1))
    with pytest.raises(MessageError, match="numbers below"):
        FORMAT.unpack(b"\xff" * FORMAT.payload_bytes)


@given(st.lists(st.integers(-(10**9), 10**9), min_size=1, max_size=400), st.integers(1, 50))
def test_checks_add_up(values: list[int], clients: int) -> None:
    """The check of a sum is the sum of the checks, modulo the prime: all that masks need."""
    one = np.array(values)
    assert len(checks(one)) == count_checks(len(one)) == -(-len(one) // BLOCK)
    assert (checks(clients * one) == clients * checks(one) % PRIME).all()


def test_any_single_change_changes_a_check() -> None:
    for at in range(len(LIMITS)):
        changed = np.zeros(len(LIMITS), np.int64)
        changed[at] = 2 * LIMITS[at] + 1
        assert np.count_nonzero(checks(changed)) == 1


@given(seed=st.integers(0, 10**6), left=st.integers(0, 3))
def test_sums_that_left_their_window_are_put_right(seed: int, left: int) -> None:
    """Up to three of a block: those a little outside, which come back near the other end."""
    rng, sums = np.random.default_rng(seed), sums_within(seed)
    blocks = count_checks(len(sums))
    wide = np.flatnonzero((np.arange(len(sums)) % blocks == 0) & (LIMITS >= 7))
    gone = rng.choice(wide, left, replace=False)
    sums[gone] = rng.choice([-1, 1], left) * (LIMITS[gone] + 1 + LIMITS[gone] // 10)
    found = mend(fold(sums), LIMITS, checks(sums))
    assert (found.sums == sums).all() and found.wrapped == left and found.lost == 0


@given(seed=st.integers(0, 10**6))
def test_a_block_of_too_many_is_told_and_left_out(seed: int) -> None:
    """The other blocks are as they were; what is lost is 0, so that the error is at most the energy of what was sent there."""
    sums = sums_within(seed)
    block = np.arange(len(sums)) % count_checks(len(sums)) == 1
    sums[block] += np.random.default_rng(seed).integers(1, 4, block.sum()) * (2 * LIMITS[block] + 1)
    found = mend(fold(sums), LIMITS, checks(sums))
    assert (found.sums[~block] == sums[~block]).all()
    if found.wrapped == 0:  # one in a hundred times up to three moves fit by chance
        assert found.lost == pytest.approx(1 / 3) and not found.sums[block].any()


def test_too_many_are_nearly_always_told_from_few() -> None:
    told = 0
    for seed in range(200):
        sums = sums_within(seed)
        sums[::3] += np.random.default_rng(seed).integers(1, 4, 100) * (2 * LIMITS[::3] + 1)
        told += mend(fold(sums), LIMITS, checks(sums)).lost > 0
    assert told >= 190
