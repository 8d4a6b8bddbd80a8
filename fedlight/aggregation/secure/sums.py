"""How sums of integer codes are kept exact: a modulus for every coordinate that the declared cohort cannot overflow."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedlight.aggregation.secure.primitives import keystream
from fedlight.core.errors import ConfigurationError, MessageError, ProtocolError
from fedlight.core.wire import Format, JointFormat, pack_unsigned, unpack_unsigned

MOST_BITS = 32


@dataclass(frozen=True)
class SumFormat:
    """How a cohort's masked codes lie on the wire and how their sum is read.

    A coordinate whose integers lie within ``+-L`` is counted modulo ``2**m``, ``m = ceil(log2(2 * clients * max_weight * L + 1))``: what
    the declared cohort adds up to always fits. Where weights differ the weight itself is one more coordinate at the end, so that
    the server learns their sum alone.

    Args:
        limits: (largest magnitude, number of coordinates) of the code's parts, one behind the other.
        clients: the declared cohort: no more clients may take part.
        max_weight: the largest integer weight; 1 if all count equally.

    Raises:
        ConfigurationError: if a number is out of range, or a coordinate would need more than 32 bits.
    """

    limits: tuple[tuple[int, int], ...]
    clients: int
    max_weight: int = 1

    def __post_init__(self) -> None:
        if self.clients < 1 or self.max_weight < 1 or any(limit < 1 or count < 1 for limit, count in self.limits) or not self.limits:
            raise ConfigurationError(
                f"Expected a code of at least one coordinate, `clients` >= 1 and `max_weight` >= 1 but got {self.limits}, "
                f"{self.clients} and {self.max_weight}"
            )
        if (widest := max(bits for bits, _ in self.widths)) > MOST_BITS:
            raise ConfigurationError(
                f"Expected sums of at most {MOST_BITS} bits but {self.clients} clients of weight up to {self.max_weight} need {widest}: "
                "declare a smaller cohort or `max_weight`, or choose a codec of fewer bits"
            )

    @classmethod
    def of(cls, format: Format, clients: int, max_weight: int = 1) -> SumFormat:
        """Return the format of sums of codes of this format.

        Raises:
            ConfigurationError: if codes are not integers, or sums would need more than 32 bits.
        """
        if not format.bits:
            raise ConfigurationError(
                "Expected codes of integers, which secure aggregation needs, but these are floats: put a QuantizeCodec behind the codec"
            )
        parts = format.parts if isinstance(format, JointFormat) else (format,)
        return cls(tuple((part.limit, part.length) for part in parts if part.length), clients, max_weight)

    @property
    def weighted(self) -> bool:
        """Whether the weight travels as one more coordinate."""
        return self.max_weight > 1

    @cached_property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """(bits of the modulus, number of coordinates) of the parts, the weight's included; each part begins with a byte of its own."""
        most = self.clients * self.max_weight
        code = [((2 * most * limit).bit_length(), count) for limit, count in self.limits]
        return (*code, *([(most.bit_length(), 1)] if self.weighted else []))

    @property
    def code_length(self) -> int:
        """Number of coordinates of a code."""
        return sum(count for _, count in self.limits)

    @property
    def length(self) -> int:
        """Number of coordinates that are masked."""
        return self.code_length + self.weighted

    @property
    def kind(self) -> int:
        """One byte that says it in a header: the bits of the modulus, or 255 where they differ."""
        different = {bits for bits, _ in self.widths}
        return different.pop() if len(different) == 1 else JointFormat.kind

    @property
    def payload_bytes(self) -> int:
        """Predicted length of ``pack``'s result."""
        return sum((bits * count + 7) // 8 for bits, count in self.widths)

    @cached_property
    def _low(self) -> np.ndarray:
        """The largest word of every coordinate: all its bits set, uint32 ``[length]``."""
        return np.repeat(np.array([(1 << bits) - 1 for bits, _ in self.widths], np.uint32), [count for _, count in self.widths])

    @cached_property
    def _limit(self) -> np.ndarray:
        return np.repeat(np.array([limit for limit, _ in self.limits], np.int64), [count for _, count in self.limits])

    def words(self, code: np.ndarray, weight: int) -> np.ndarray:
        """Return ``weight * code`` (and the weight, where weights differ) modulo 2^32, uint32 ``[length]``, ready to be masked.

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
        return (np.append(values, weight) if self.weighted else values).astype(np.uint32)

    def pack(self, words: np.ndarray) -> bytes:
        """Return the ``payload_bytes`` bytes of the low bits of words ``[length]``."""
        kept = words & self._low
        return b"".join(pack_unsigned(kept[start : start + count], bits) for start, bits, count in self._places())

    def unpack(self, payload: bytes | memoryview) -> np.ndarray:
        """Return the words that ``pack`` packed, uint32 ``[length]``.

        Raises:
            MessageError: if the payload has another number of bytes.
        """
        if len(payload) != self.payload_bytes:
            raise MessageError(f"Expected a payload of {self.payload_bytes} bytes but got {len(payload)}")
        words, at = np.empty(self.length, np.uint32), 0
        for start, bits, count in self._places():
            size = (bits * count + 7) // 8
            words[start : start + count] = unpack_unsigned(payload[at : at + size], bits, count)
            at += size
        return words

    def integers(self, words: np.ndarray) -> np.ndarray:
        """Return the integers around zero that words stand for modulo their coordinate's ``2**m``, int64 ``[code_length]``."""
        low = self._low[: self.code_length].astype(np.int64)
        code = words[: self.code_length] & low
        return np.where(code > low >> 1, code - low - 1, code)

    def read_sum(self, words: np.ndarray, clients: int) -> tuple[np.ndarray, int]:
        """Return (sum of ``weight * code`` int64 ``[code_length]``, sum of the weights) of unmasked words of ``clients`` clients.

        Raises:
            ProtocolError: if so many clients within the declared limits cannot make that sum: one of them masked something else.
        """
        code = self.integers(words)
        weight = int(words[-1] & self._low[-1]) if self.weighted else clients
        if not clients <= weight <= clients * self.max_weight or (np.abs(code) > weight * self._limit).any():
            raise ProtocolError(
                f"Expected a sum that {clients} clients within the declared limits can make but got another: one sent nonsense"
            )
        return code, weight

    def _places(self) -> list[tuple[int, int, int]]:
        """(first coordinate, bits, number of coordinates) of the parts."""
        starts = itertools.accumulate((count for _, count in self.widths), initial=0)
        return [(start, bits, count) for start, (bits, count) in zip(starts, self.widths, strict=False)]


def add_mask(words: np.ndarray, key: bytes, negative: bool = False) -> None:
    """Add a key's mask to words ``[length]`` (uint32) in place, modulo 2^32, or take it away."""
    mask = np.frombuffer(keystream(key, 4 * len(words)), "<u4")
    if negative:
        words -= mask
    else:
        words += mask
