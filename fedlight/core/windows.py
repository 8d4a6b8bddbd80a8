"""Integers whose sums lie in a window, nearly always: they are counted modulo the window, and checks find the sums that left it.

What a sum of clients' codes needs is room for the sum that comes about, not for the largest that could (Nazer & Gastpar 2011, IEEE Trans.
Inf. Theory 57(10), on sums modulo a lattice). A sum outside its window comes back at the other end, off by exactly one window. So each
block of 128 coordinates has a check beside it: a weighted sum of its integers modulo a prime, which the masks' sum keeps exactly. Of one to
three such sums in a block the check tells which they are, and they are put right. A block with more of them is left out as a whole; one
such block in 94 fits a wrong repair by chance, and nothing shows it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedlight.core.digits import digit_bytes, pack_digits, unpack_digits
from fedlight.core.errors import MessageError

PRIME = 65521
BLOCK = 128
LIKELY, MOST = 16, 3
"""Sums of a block that are tried, those nearest to their window's ends, and how many of them at once: 696 guesses, one in 94 of them
fits by chance where more than three have left."""

_WEIGHTS = np.array([pow(17, place, PRIME) for place in range(BLOCK)], np.int64)


class Run(NamedTuple):
    """Coordinates one behind the other whose sums lie within ``+-limit``."""

    limit: int
    length: int


@dataclass(frozen=True)
class WindowFormat:
    """How a code lies on the wire whose runs have windows of their own: in the base of each, 4.5 bits for 23 values.

    Args:
        parts: the runs.
        clients: how many clients' codes have sums that lie within the limits, nearly always; so does each code, always.
    """

    parts: tuple[Run, ...]
    clients: int
    kind: ClassVar[int] = 253
    fixed_width: ClassVar[bool] = True

    @cached_property
    def length(self) -> int:
        """Number of entries."""
        return sum(run.length for run in self.parts)

    @cached_property
    def limit(self) -> int:
        """Largest magnitude of an entry."""
        return max(run.limit for run in self.parts)

    @property
    def bits(self) -> int:
        """Bits of the largest integer."""
        return self.limit.bit_length() + 1

    @cached_property
    def payload_bytes(self) -> int:
        """Predicted length of ``pack``'s result."""
        return sum(digit_bytes(2 * run.limit + 1, run.length) for run in self.parts)

    @property
    def masked_bytes(self) -> int:
        """Length of a masked payload: that of a plain one and of the checks."""
        return self.payload_bytes + digit_bytes(PRIME, count_checks(self.length))

    def pack(self, code: Tensor) -> bytes:
        """Return the ``payload_bytes`` bytes of an integer code ``[length]``.

        Raises:
            MessageError: if the code has another length, or an entry is no integer within its limit.
        """
        if code.shape != (self.length,) or code.is_floating_point():
            raise MessageError(f"Expected a code of {self.length} integers but got {code.dtype} {list(code.shape)}")
        values, parts, start = code.detach().cpu().numpy().astype(np.int64), [], 0
        for limit, length in self.parts:
            run = values[start : start + length]
            if (beyond := (run > limit) | (run < -limit)).any():
                raise MessageError(f"Expected integers within +-{limit} but the one at coordinate {start + int(beyond.argmax())} is larger")
            parts.append(pack_digits(run + limit, 2 * limit + 1))
            start += length
        return b"".join(parts)

    def unpack(self, payload: bytes | memoryview) -> Tensor:
        """Return the code ``[length]`` (int32) that ``pack`` wrote.

        Raises:
            MessageError: if the payload has another number of bytes, or holds what is larger than its limit.
        """
        if len(payload) != self.payload_bytes:
            raise MessageError(f"Expected a payload of {self.payload_bytes} bytes but got {len(payload)}")
        parts, at = [np.zeros(0, np.int32)], 0
        for limit, length in self.parts:
            size = digit_bytes(2 * limit + 1, length)
            parts.append(unpack_digits(payload[at : at + size], 2 * limit + 1, length).astype(np.int32) - np.int32(limit))
            at += size
        return torch.from_numpy(np.concatenate(parts))


def count_checks(length: int) -> int:
    """Return how many checks a code of so many coordinates has."""
    return -(-length // BLOCK)


def checks(values: np.ndarray) -> np.ndarray:
    """Return the checks (int64 ``[count_checks(n)]``) of integers ``[n]``; neighbours, whose windows are alike, lie in different blocks."""
    blocks = count_checks(len(values))
    padded = np.zeros(-(-len(values) // blocks) * blocks, np.int64)
    padded[: len(values)] = values % PRIME
    rows = padded.reshape(-1, blocks)
    found: np.ndarray = (rows * _WEIGHTS[: len(rows), None]).sum(0) % PRIME
    return found


class Mended(NamedTuple):
    """Sums with those put right that had left their windows: how many these were, and the share of blocks that had to be left out."""

    sums: np.ndarray
    wrapped: int
    lost: float


def mend(sums: np.ndarray, limits: np.ndarray, expected: np.ndarray) -> Mended:
    """Return the sums (int64 ``[n]``) that remainders within ``+-limits`` and the checks of the true sums tell of; 0 in lost blocks."""
    mended, wrapped, lost = sums.copy(), 0, 0
    missing = (expected - checks(sums)) % PRIME
    for block in np.flatnonzero(missing).tolist():
        places = np.arange(block, len(sums), len(missing))
        likely = places[np.argsort(-np.abs(sums[places]) / limits[places], kind="stable")[:LIKELY]]
        moves = -np.sign(sums[likely]) * (2 * limits[likely] + 1)
        shifts = (moves * _WEIGHTS[likely // len(missing)]).tolist()
        guesses = itertools.chain.from_iterable(itertools.combinations(range(len(likely)), size) for size in range(1, MOST + 1))
        fits = (guess for guess in guesses if sum(shifts[i] for i in guess) % PRIME == missing[block])
        if guess := list(next(fits, ())):
            mended[likely[guess]] += moves[guess]
            wrapped += len(guess)
        else:
            mended[places] = 0
            lost += 1
    return Mended(mended, wrapped, lost / len(missing))
