"""Unsigned numbers packed into bytes together, in the base of a modulus."""

from __future__ import annotations

from functools import cache

import numpy as np

from fedlight.core.errors import MessageError
from fedlight.core.wire import pack_unsigned, unpack_unsigned


@cache
def digit_group(modulus: int) -> tuple[int, int]:
    """Return (digits, bits): how many numbers of 0 to ``modulus - 1`` lie together in how many bits, at least bits for each.

    Numbers in the base of their modulus take less than whole bits each: five of 21 values lie in 22 bits. Groups have at most 63 bits.

    >>> digit_group(21), digit_group(256)
    ((5, 22), (1, 8))
    """
    groups: list[tuple[int, int]] = []
    power = 1
    while (power := power * modulus) <= 1 << 63:
        groups.append((len(groups) + 1, (power - 1).bit_length()))
    return min(groups, key=lambda group: group[1] / group[0])


def digit_bytes(modulus: int, length: int) -> int:
    """Return the bytes of ``length`` digits of a modulus: whole groups, then what is left over."""
    return sum((count * bits + 7) // 8 for _, count, bits in _digit_runs(modulus, length))


def pack_digits(values: np.ndarray, modulus: int) -> bytes:
    """Pack integers ``[n]`` of 0 to ``modulus - 1`` (not checked) into ``digit_bytes`` bytes, the first of a group in its lowest place."""
    parts, start = [], 0
    for digits, count, bits in _digit_runs(modulus, values.size):
        places = values[start : start + digits * count].astype(np.uint64).reshape(count, digits)
        start += digits * count
        numbers = np.zeros(count, np.uint64)
        for place in reversed(range(digits)):
            numbers = numbers * np.uint64(modulus) + places[:, place]
        parts.append(pack_unsigned(numbers, bits))
    return b"".join(parts)


def unpack_digits(payload: bytes | memoryview, modulus: int, length: int) -> np.ndarray:
    """Return the uint64 integers ``[length]`` that ``pack_digits`` packed into a payload of as many bytes.

    Raises:
        MessageError: if the payload holds more than the modulus allows.
    """
    parts, at = [np.zeros(0, np.uint64)], 0
    for digits, count, bits in _digit_runs(modulus, length):
        size = (count * bits + 7) // 8
        numbers = unpack_unsigned(payload[at : at + size], bits, count).astype(np.uint64)
        at += size
        places = np.empty((count, digits), np.uint64)
        for place in range(digits):
            numbers, places[:, place] = np.divmod(numbers, np.uint64(modulus))
        if numbers.any():
            raise MessageError(f"Expected numbers below {modulus} but the payload holds larger ones")
        parts.append(places.reshape(-1))
    return np.concatenate(parts)


def _digit_runs(modulus: int, length: int) -> list[tuple[int, int, int]]:
    """Return (digits, groups, bits) of the whole groups and of the rest, where there are any."""
    digits, bits = digit_group(modulus)
    count, rest = divmod(length, digits)
    runs = [(digits, count, bits), (rest, 1, (modulus**rest - 1).bit_length())]
    return [run for run in runs if run[0] and run[1]]
