"""Client messages as bytes: a strict 16-byte header, then the code packed as tightly as its format allows."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from fedlight.core.errors import MessageError

MAGIC = b"FL"
WIRE_VERSION = 1
HEADER = struct.Struct("<2sBBIII")

Message = bytes | bytearray
"""What a client sends: header and packed code."""

_FLOATS = {torch.float32: "<f4", torch.float16: "<f2", torch.float64: "<f8"}
_FLOAT_KINDS = {torch.float32: 64, torch.float16: 65, torch.float64: 66}


class Run(Protocol):
    """Integers of a code, one behind the other, that have one range."""

    @property
    def length(self) -> int:
        """How many there are."""

    @property
    def limit(self) -> int:
        """Largest magnitude of one."""


class Format(Protocol):
    """How a code lies on the wire: `CodeFormat` and `JointFormat`, and the formats of ``core.entropy`` and ``core.windows``."""

    @property
    def kind(self) -> int:
        """One byte that says which format this is."""

    @property
    def length(self) -> int:
        """Number of entries."""

    @property
    def bits(self) -> int:
        """Bits of the largest integer, 0 for floats."""

    @property
    def parts(self) -> tuple[Run, ...]:
        """The runs of integers that have a range of their own."""

    @property
    def fixed_width(self) -> bool:
        """Whether all payloads have the same length."""

    @property
    def payload_bytes(self) -> int:
        """Length of ``pack``'s result, the most where it varies."""

    def pack(self, code: Tensor) -> bytes | memoryview:
        """Return the payload of a code ``[length]``; raises ``MessageError`` for what is none."""

    def unpack(self, payload: bytes | memoryview) -> Tensor:
        """Return the code ``[length]`` of a payload; raises ``MessageError`` for what ``pack`` would not write."""


@dataclass(frozen=True)
class CodeFormat:
    """How a code ``[length]`` lies on the wire: signed integers of ``bits`` bits, or floats of ``dtype``.

    ``bits`` is 0 for floats. Integers lie in ``[-(2**(bits-1)-1), 2**(bits-1)-1]`` and take exactly ``bits`` bits.
    """

    length: int
    bits: int = 0
    dtype: torch.dtype = torch.float32
    fixed_width: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.bits <= 32 or self.bits == 1:
            raise MessageError(f"Expected `bits` to be 0 (floats) or 2 to 32 but got {self.bits}")
        if self.dtype not in _FLOATS:
            raise MessageError(f"Expected `dtype` to be one of {[str(dtype) for dtype in _FLOATS]} but got {self.dtype}")

    @property
    def kind(self) -> int:
        """One byte that says which format this is: the number of bits, or a float's tag."""
        return self.bits or _FLOAT_KINDS[self.dtype]

    @property
    def limit(self) -> int:
        """Largest magnitude of an integer entry."""
        return (1 << (self.bits - 1)) - 1

    @property
    def parts(self) -> tuple[CodeFormat]:
        """All of it has one range."""
        return (self,)

    @cached_property
    def payload_bytes(self) -> int:
        """Predicted length of ``pack``'s result."""
        bits = self.bits or self.dtype.itemsize * 8
        return (self.length * bits + 7) // 8

    def pack(self, code: Tensor) -> bytes | memoryview:
        """Return the ``payload_bytes`` bytes of a code ``[length]``; those of floats may be the code's own memory, not a copy.

        Raises:
            MessageError: if the code has another length, or an entry is no integer that fits its bits.
        """
        if code.shape != (self.length,):
            raise MessageError(f"Expected a code of shape [{self.length}] but got {list(code.shape)}")
        if not self.bits:
            numbers = code.detach().to("cpu", self.dtype).contiguous().numpy().astype(_FLOATS[self.dtype], copy=False)
            return numbers.view(np.uint8).data
        if code.is_floating_point():
            raise MessageError(f"Expected an integer code for a format of {self.bits} bits but got {code.dtype}: round it first")
        return pack_integers(code.detach().cpu().numpy(), self.bits)

    def unpack(self, payload: bytes | memoryview) -> Tensor:
        """Return the code ``[length]`` (int32, or the format's float dtype) that ``pack`` wrote.

        Floats are the payload's own memory, not a copy, where it is aligned and can be written to.

        Raises:
            MessageError: if the payload has the wrong number of bytes, or holds a number that is not finite or out of range.
        """
        if len(payload) != self.payload_bytes:
            raise MessageError(f"Expected a payload of {self.payload_bytes} bytes but got {len(payload)}")
        if not self.bits:
            numbers = np.frombuffer(payload, dtype=_FLOATS[self.dtype])
            code = torch.from_numpy(numbers if numbers.flags.behaved else numbers.copy())
            if not math.isfinite(code.sum()) and not torch.isfinite(code).all():  # the sum is cheap, and rarely infinite alone
                raise MessageError("Expected finite numbers but the payload holds NaN or Inf")
            return code
        return torch.from_numpy(unpack_integers(payload, self.bits, self.length))


@dataclass(frozen=True)
class JointFormat:
    """Parts that lie one behind the other, each from a byte of its own on: coefficients of several widths, values and indices.

    The header says only that a message is joint (``kind``); what the parts are follows from the codec, whose fingerprint it carries.
    """

    parts: tuple[CodeFormat, ...]
    kind: ClassVar[int] = 255
    fixed_width: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.parts:
            raise MessageError("Expected a joint format of at least one part but got none")

    @cached_property
    def length(self) -> int:
        """Number of entries of all parts together."""
        return sum(part.length for part in self.parts)

    @cached_property
    def bits(self) -> int:
        """Bits of the widest part if all hold integers, else 0."""
        return max(part.bits for part in self.parts) if all(part.bits for part in self.parts) else 0

    @cached_property
    def payload_bytes(self) -> int:
        """Predicted length of ``pack``'s result."""
        return sum(part.payload_bytes for part in self.parts)

    def pack(self, code: Tensor) -> bytes:
        """Return the ``payload_bytes`` bytes of a code ``[length]``; a float code's whole numbers become integers where a part has bits.

        Raises:
            MessageError: if the code has another length, or an entry does not fit its part.
        """
        if code.shape != (self.length,):
            raise MessageError(f"Expected a code of shape [{self.length}] but got {list(code.shape)}")
        pieces = zip(self.parts, torch.split(code, [part.length for part in self.parts]), strict=True)
        whole = code.is_floating_point()
        return b"".join([part.pack(piece.long() if whole and part.bits else piece) for part, piece in pieces])

    def unpack(self, payload: bytes | memoryview) -> Tensor:
        """Return the code ``[length]`` that ``pack`` wrote: int32 if all parts hold integers, else float64.

        Raises:
            MessageError: if the payload has the wrong number of bytes, or a part holds what it must not.
        """
        if len(payload) != self.payload_bytes:
            raise MessageError(f"Expected a payload of {self.payload_bytes} bytes but got {len(payload)}")
        view, pieces, start = memoryview(payload), [], 0
        for part in self.parts:
            pieces.append(part.unpack(view[start : start + part.payload_bytes]))
            start += part.payload_bytes
        return torch.cat(pieces if self.bits else [piece.double() for piece in pieces])


def saturation(code: Tensor, format: Format) -> float:
    """Return the share of an integer code's entries ``[length]`` that lie at the end of their range, 0 for float codes."""
    if not format.bits or not format.length:
        return 0.0
    pieces = torch.split(code, [part.length for part in format.parts])
    return sum(int((piece.abs() >= part.limit).sum()) for part, piece in zip(format.parts, pieces, strict=True)) / format.length


def pack_integers(values: np.ndarray, bits: int) -> bytes:
    """Pack signed integers ``[n]`` into ``ceil(n * bits / 8)`` bytes, first value in the lowest bits.

    Raises:
        MessageError: if a value lies outside ``+-(2**(bits-1) - 1)``.
    """
    limit = (1 << (bits - 1)) - 1
    if (beyond := (values > limit) | (values < -limit)).any():
        # Errors are logged: the place tells no more than it must, the value would tell of the client.
        raise MessageError(f"Expected integers within +-{limit} ({bits} bits) but the one at coordinate {int(beyond.argmax())} is larger")
    return pack_unsigned(values.astype(np.int64) + limit, bits)


def unpack_integers(payload: bytes | memoryview, bits: int, length: int) -> np.ndarray:
    """Return the int32 integers ``[length]`` that ``pack_integers`` packed."""
    limit = (1 << (bits - 1)) - 1
    values = unpack_unsigned(payload, bits, length) - limit
    if length and int(values.max()) > limit:
        raise MessageError(f"Expected integers within +-{limit} ({bits} bits) but the payload holds {int(values.max())}")
    return values.astype(np.int32)


def pack_unsigned(values: np.ndarray, bits: int) -> bytes:
    """Pack integers ``[n]`` of 0 to ``2**bits - 1`` (not checked) into ``ceil(n * bits / 8)`` bytes, first value in the lowest bits."""
    if bits in (8, 16, 32):
        return values.astype(f"<u{bits // 8}").tobytes()
    places = np.unpackbits(values.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, count=bits, bitorder="little")
    return np.packbits(places, bitorder="little").tobytes()


def unpack_unsigned(payload: bytes | memoryview, bits: int, length: int) -> np.ndarray:
    """Return the int64 integers ``[length]`` that ``pack_unsigned`` packed."""
    raw = np.frombuffer(payload, dtype=np.uint8)
    if bits in (8, 16, 32):
        return raw.view(f"<u{bits // 8}").astype(np.int64)
    places = np.unpackbits(raw, count=length * bits, bitorder="little").reshape(length, bits)
    values = np.zeros((length, 8), np.uint8)
    values[:, : -(-bits // 8)] = np.packbits(places, axis=1, bitorder="little")
    return values.view("<i8")[:, 0].astype(np.int64)


def write_message(payload: bytes | memoryview, kind: int, length: int, round: int, codec: int) -> bytearray:
    """Return header and payload: magic, wire version, format, round, codec fingerprint and code length, 16 bytes.

    A bytearray, so that whoever reads it in the same process need not copy a float code.
    """
    return bytearray().join((HEADER.pack(MAGIC, WIRE_VERSION, kind, round & 0xFFFFFFFF, codec, length), payload))


def require_fields(header: str, *fields: tuple[str, object, object]) -> None:
    """Raise ``MessageError`` unless the fields of a header, (name, expected, found), are as expected."""
    for name, want, got in fields:
        if want != got:
            raise MessageError(f"Expected {name} {want!r} in {header} but got {got!r}")


def read_message(message: Message, expected: Format, round: int, codec: int) -> memoryview:
    """Return the payload of a message after checking every field of its header.

    Raises:
        MessageError: if the message is truncated or oversized, or was meant for another round, codec or format.
    """
    if len(message) < HEADER.size:
        raise MessageError(f"Expected a message of at least {HEADER.size} bytes but got {len(message)}")
    magic, version, kind, for_round, for_codec, length = HEADER.unpack_from(message)
    require_fields(
        "the message header",
        ("magic", MAGIC, magic),
        ("wire version", WIRE_VERSION, version),
        ("format", expected.kind, kind),
        ("round", round & 0xFFFFFFFF, for_round),
        ("codec fingerprint", codec, for_codec),
        ("code length", expected.length, length),
    )
    return memoryview(message)[HEADER.size :]
