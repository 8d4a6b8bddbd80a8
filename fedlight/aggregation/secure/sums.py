"""How sums of integer codes are kept exact: a modulus for every coordinate, which the cohort cannot overflow or hardly ever does."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fedlight.aggregation.secure.primitives import keystream
from fedlight.core.digits import digit_bytes, pack_digits, unpack_digits
from fedlight.core.errors import ConfigurationError, MessageError, ProtocolError, require, require_counts
from fedlight.core.windows import PRIME, WindowFormat, checks, count_checks, mend
from fedlight.core.wire import Format, JointFormat

MOST_BITS = 32

BLOCK = 64
"""Bytes of a block of the keystream."""


class MaskedSum(NamedTuple):
    """The sum of ``weight * code`` (int64 ``[code_length]``) and that of the weights.

    ``wrapped`` coordinates had left their windows and were put right; ``lost`` is the share that had to be left out (`core.windows`).
    """

    code: np.ndarray
    weight: int
    wrapped: int = 0
    lost: float = 0.0


@dataclass(frozen=True)
class SumFormat:
    """How a cohort's masked codes lie on the wire and how their sum is read.

    A coordinate whose integers lie within ``+-L`` is counted modulo ``2 * clients * max_weight * L + 1``: what the declared cohort adds up
    to always fits, and no number is left over. Numbers lie on the wire in the base of their modulus (``digit_group``): 21 values take 4.4
    bits. Where weights differ the weight itself is one more coordinate at the end, so that the server learns their sum alone.

    With ``windowed`` a coordinate is counted modulo ``2 * L + 1``: sums of the declared cohort lie within ``+-L`` nearly always, and the
    checks that follow the code (``fedlight.core.windows``) tell of those that do not.

    Args:
        limits: (largest magnitude, number of coordinates) of the code's parts, one behind the other.
        clients: the declared cohort: no more clients may take part.
        max_weight: the largest integer weight; 1 if all count equally.
        windowed: whether sums, and not only codes, are expected within the limits.

    Raises:
        ConfigurationError: if a number is out of range, or a coordinate would need more than 32 bits.
    """

    limits: tuple[tuple[int, int], ...]
    clients: int
    max_weight: int = 1
    windowed: bool = False

    def __post_init__(self) -> None:
        require_counts(clients=self.clients, max_weight=self.max_weight)
        some = self.limits and all(limit >= 1 and count >= 1 for limit, count in self.limits)
        require(some, f"Expected `limits` of a code of at least one coordinate but got {self.limits}")
        if (widest := max(modulus - 1 for modulus, _ in self.moduli).bit_length()) > MOST_BITS:
            raise ConfigurationError(
                f"Expected sums of at most {MOST_BITS} bits but {self.clients} clients of weight up to {self.max_weight} need {widest}: "
                "declare a smaller cohort or `max_weight`, or choose a codec of fewer bits"
            )

    @classmethod
    def of(cls, format: Format, clients: int, max_weight: int = 1) -> SumFormat:
        """Return the format of sums of codes of this format.

        Raises:
            ConfigurationError: if codes are not integers, sums would need more than 32 bits, or windows are those of fewer clients.
        """
        if isinstance(format, WindowFormat):
            if clients > format.clients or max_weight > 1:
                raise ConfigurationError(
                    f"Expected sums of at most the {format.clients} codes that their windows are made for, all of weight 1, but got "
                    f"{clients} clients of weight up to {max_weight}"
                )
            return cls(format.parts, clients, windowed=True)
        if not format.bits:
            raise ConfigurationError(
                "Expected codes of integers, which secure aggregation needs, but these are floats: put a QuantizeCodec behind the codec"
            )
        return cls(tuple((part.limit, part.length) for part in format.parts if part.length), clients, max_weight)

    @property
    def weighted(self) -> bool:
        """Whether the weight travels as one more coordinate."""
        return self.max_weight > 1

    @cached_property
    def moduli(self) -> tuple[tuple[int, int], ...]:
        """(modulus, number of coordinates) of the parts, the weight's included; each part begins with a byte of its own."""
        most = self.clients * self.max_weight
        reach = 1 if self.windowed else most
        code = [(2 * reach * limit + 1, count) for limit, count in self.limits]
        return (*code, *([(PRIME, self.checks)] if self.windowed else []), *([(most + 1, 1)] if self.weighted else []))

    @property
    def checks(self) -> int:
        """Number of checks that follow the code."""
        return count_checks(self.code_length) if self.windowed else 0

    @property
    def code_length(self) -> int:
        """Number of coordinates of a code."""
        return sum(count for _, count in self.limits)

    @property
    def length(self) -> int:
        """Number of coordinates that are masked."""
        return self.code_length + self.checks + self.weighted

    @property
    def kind(self) -> int:
        """One byte that says it in a header: the bits of the largest word, or 255 where parts differ."""
        different = {(modulus - 1).bit_length() for modulus, _ in self.moduli}
        return different.pop() if len(different) == 1 else JointFormat.kind

    @cached_property
    def payload_bytes(self) -> int:
        """Predicted length of ``pack``'s result."""
        return sum(digit_bytes(modulus, count) for modulus, count in self.moduli)

    @cached_property
    def modulus(self) -> np.ndarray:
        """The modulus of every coordinate, uint64 ``[length]``."""
        return np.repeat(np.array([modulus for modulus, _ in self.moduli], np.uint64), [count for _, count in self.moduli])

    @cached_property
    def _limit(self) -> np.ndarray:
        return np.repeat(np.array([limit for limit, _ in self.limits], np.int64), [count for _, count in self.limits])

    def words(self, code: np.ndarray, weight: int) -> np.ndarray:
        """Return ``weight * code`` (and the weight, where weights differ) modulo each modulus, uint64 ``[length]``, ready to be masked.

        Raises:
            ProtocolError: if the code or the weight is not what the format was declared for: nothing must be sent then.
        """
        if code.dtype.kind != "i" or code.shape != (self.code_length,):
            raise ProtocolError(f"Expected a code of {self.code_length} signed integers but got {code.dtype} {list(code.shape)}")
        if not 1 <= weight <= self.max_weight:
            raise ProtocolError(f"Expected a weight in 1..{self.max_weight}, as declared, but got {weight}: declare a larger `max_weight`")
        values = code.astype(np.int64)
        if (beyond := (values > self._limit) | (values < -self._limit)).any():
            at = int(beyond.argmax())
            raise ProtocolError(f"Expected integers within +-{self._limit[at]} but the one at coordinate {at} is larger")
        values *= weight
        whole = np.concatenate([values, checks(values) if self.windowed else [], [weight] if self.weighted else []]).astype(np.int64)
        return (whole % self.modulus.astype(np.int64)).astype(np.uint64)

    def pack(self, words: np.ndarray) -> bytes:
        """Return the ``payload_bytes`` bytes of words ``[length]``."""
        return b"".join(pack_digits(words[start : start + count], modulus) for start, modulus, count in self._places())

    def unpack(self, payload: bytes | memoryview) -> np.ndarray:
        """Return the words that ``pack`` packed, uint64 ``[length]``.

        Raises:
            MessageError: if the payload has another number of bytes, or holds a word that is no smaller than its modulus.
        """
        if len(payload) != self.payload_bytes:
            raise MessageError(f"Expected a payload of {self.payload_bytes} bytes but got {len(payload)}")
        words, at = np.empty(self.length, np.uint64), 0
        for start, modulus, count in self._places():
            size = digit_bytes(modulus, count)
            words[start : start + count] = unpack_digits(payload[at : at + size], modulus, count)
            at += size
        return words

    def integers(self, words: np.ndarray) -> np.ndarray:
        """Return the integers around zero that words stand for modulo their coordinate's modulus, int64 ``[code_length]``."""
        modulus = self.modulus[: self.code_length].astype(np.int64)
        code = words[: self.code_length].astype(np.int64)
        return np.where(code > modulus >> 1, code - modulus, code)

    def read_sum(self, words: np.ndarray, clients: int) -> MaskedSum:
        """Return what unmasked words of ``clients`` clients say.

        Raises:
            ProtocolError: if so many clients within the declared limits cannot make that sum: one of them masked something else.
        """
        code = self.integers(words)
        if self.windowed:
            found = mend(code, self._limit, words[self.code_length :].astype(np.int64))
            return MaskedSum(found.sums, clients, found.wrapped, found.lost)
        weight = int(words[-1]) if self.weighted else clients
        if not clients <= weight <= clients * self.max_weight or (np.abs(code) > weight * self._limit).any():
            raise ProtocolError(
                f"Expected a sum that {clients} clients within the declared limits can make but got another: one sent nonsense"
            )
        return MaskedSum(code, weight)

    def _places(self) -> list[tuple[int, int, int]]:
        """(first coordinate, modulus, number of coordinates) of the parts."""
        starts = itertools.accumulate((count for _, count in self.moduli), initial=0)
        return [(start, modulus, count) for start, (modulus, count) in zip(starts, self.moduli, strict=False)]


def add_mask(words: np.ndarray, key: bytes, modulus: np.ndarray, negative: bool = False) -> None:
    """Add a key's mask to words ``[length]`` in place, modulo ``modulus`` (all uint64), or take it away."""
    mask = draw_mask(key, modulus)
    words += modulus - mask if negative else mask
    words %= modulus


def draw_mask(key: bytes, modulus: np.ndarray) -> np.ndarray:
    """Return numbers below each modulus (uint64 ``[length]``), every one as likely as any other if the key's stream is random.

    Each is a 32-bit word of the stream modulo its modulus; words beyond the last whole multiple of that are replaced by later ones.
    """
    beyond = modulus * (np.uint64(1 << 32) // modulus)
    drawn = np.frombuffer(keystream(key, 4 * len(modulus)), "<u4").astype(np.uint64)
    blocks = -(-4 * len(modulus) // BLOCK)
    again = np.flatnonzero(drawn >= beyond)
    while len(again):
        drawn[again] = np.frombuffer(keystream(key, 4 * len(again), counter=blocks), "<u4")
        blocks += -(-4 * len(again) // BLOCK)
        again = again[drawn[again] >= beyond[again]]
    mask: np.ndarray = drawn % modulus
    return mask
