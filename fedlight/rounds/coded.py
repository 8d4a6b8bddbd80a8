"""Global models that are codes: a base minus what a sum decodes to, and changes of such a sum as bytes.

The entries of a sum are whole multiples of a power of two. So they add up without rounding, in float64 and in any order, and whoever holds
the base, the decoder and the sum computes the same weights as everybody else, on the same machine to the last bit.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fedlight.core.codec import Context, Decoder, exactly
from fedlight.core.entropy import TOP, EntropyFormat
from fedlight.core.errors import ConfigurationError, MessageError
from fedlight.core.wire import CodeFormat, Format, require_fields

MAGIC = b"FC"
VERSION = 1
HEADER = struct.Struct("<2sBhIIII")  # magic, version, exponent of the unit, first round, round after the last, codec, large integers
LARGEST = 2**52
"""Multiples of a unit that float64 holds exactly, with a bit to spare."""

_FURTHEST = 1000  # exponents that float64 has room for on both sides


def coded_weights(base: Tensor, total: Tensor, decoder: Decoder) -> Tensor:
    """Return ``base - decode(total)`` ``[dim]``: the one way in which server and clients make weights of a sum ``[code_dim]``."""
    with exactly(base.device):
        return base - decoder.decode(total.to(base.device, torch.float32), Context(), {}).to(base)


@dataclass(frozen=True)
class Change:
    """What rounds ``since`` to ``until - 1`` added to a sum: integers ``values`` ``[code_dim]`` (int64) times ``2**exponent``."""

    since: int
    until: int
    values: Tensor
    exponent: int

    @property
    def amount(self) -> Tensor:
        """The change itself, float64 ``[code_dim]``."""
        return self.values.double() * 2.0**self.exponent


def change_of(amount: Tensor, exponent: int, since: int, until: int) -> Change:
    """Return a change ``[code_dim]``, whose entries are multiples of ``2**exponent``, in the largest unit that it has.

    Raises:
        MessageError: if there are more multiples than float64 holds exactly.
    """
    multiples = amount.double() * 2.0**-exponent
    most = float(multiples.abs().max()) if len(multiples) else 0.0
    if not most < LARGEST:
        raise MessageError(f"Expected a sum of codes within 2**52 units but got {most:.3g}: its unit is too small")
    values = multiples.to(torch.int64)
    low = int(np.bitwise_or.reduce(values.abs().cpu().numpy(), initial=0))
    spare = (low & -low).bit_length() - 1 if low else 0
    return Change(since, until, values >> spare, exponent + spare)


def unit_exponent(step: Tensor, error: float) -> int | None:
    """Return the exponent of the largest power of two to round a step ``[code_dim]`` to without losing more than ``error`` of its energy.

    None if nothing moved.

    Raises:
        ConfigurationError: if the step is not finite.
    """
    energy = float(step.double().square().mean()) if len(step) else 0.0
    if not math.isfinite(energy):
        raise ConfigurationError("Expected a finite step of `model.server_optimizer` but got NaN or Inf: lower its learning rate")
    if not energy:
        return None
    return max(-_FURTHEST, math.floor(math.log2(12 * error * energy) / 2))


def levels_of(format: Format) -> bytes:
    """Return what is public of how far a code's entries spread, a level an entry (`EntropyFormat`): wider ones have more bits."""
    if isinstance(format, EntropyFormat):
        return format.levels
    limits = [(1 << part.bits if isinstance(part, CodeFormat) else part.limit, part.length) for part in format.parts]
    return b"".join(bytes([min(TOP, round(2 * math.log2(limit)))]) * length for limit, length in limits)


@lru_cache(maxsize=4)
def _coder(levels: bytes) -> EntropyFormat:
    """Return the coder of entries of these levels: what it computes of them, it computes once."""
    return EntropyFormat(levels)


def write_change(change: Change, levels: bytes, fingerprint: int) -> bytes:
    """Return a change as bytes: header, integers beyond the entropy coder's reach (8 bytes each), entropy-coded integers."""
    coder = _coder(levels)
    values = change.values.cpu()
    large = values[values.abs() >= coder.limit]
    payload = coder.pack(values.clamp(-coder.limit, coder.limit).to(torch.int32))
    header = HEADER.pack(MAGIC, VERSION, change.exponent, change.since, change.until, fingerprint, len(large))
    return header + large.numpy().astype("<i8").tobytes() + payload


def is_change(message: bytes) -> bool:
    """Whether a message says that it is a change, and not the sum of one round."""
    return message[: len(MAGIC)] == MAGIC


def read_change(message: bytes, levels: bytes, fingerprint: int) -> Change:
    """Return the change that ``write_change`` wrote; raises ``MessageError`` if the message is damaged or belongs to another codec."""
    if len(message) < HEADER.size:
        raise MessageError(f"Expected a change of at least {HEADER.size} bytes but got {len(message)}")
    magic, version, exponent, since, until, codec, count = HEADER.unpack_from(message)
    expected = ("magic", MAGIC, magic), ("version", VERSION, version), ("codec", fingerprint, codec)
    require_fields("the header of a change", *expected)
    if since >= until or abs(exponent) > _FURTHEST:
        raise MessageError(f"Expected rounds in order and an exponent within +-{_FURTHEST} but got {since} to {until} and {exponent}")
    end = HEADER.size + 8 * count
    coder = _coder(levels)
    if count > coder.length or end > len(message):
        raise MessageError(f"Expected {count} large integers of {coder.length} but the message has {len(message)} bytes")
    values = coder.unpack(message[end:]).long()
    beyond = values.abs() == coder.limit
    large = torch.from_numpy(np.frombuffer(message[HEADER.size : end], "<i8").astype(np.int64))
    # of its own magnitude and sign, and one that float64 holds: nothing that was not written so
    signs = values[beyond].sign()
    if len(large) != len(signs) or not bool(((large * signs >= coder.limit) & (large * signs < LARGEST)).all()):
        raise MessageError(f"Expected {int(beyond.sum())} integers of {coder.limit} or more but got {len(large)} or others")
    values[beyond] = large
    return Change(since, until, values, exponent)
