"""The sum of a cohort's codes as bytes: a client that missed a round can download it instead of the model.

A client with the model before a round, the codec and this message can take the server's step itself: decode the mean code, and
move along it by the server's learning rate. Whoever may see the global model may see the sum, so entropy coding reveals nothing.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlight.core.codec import Context, Decoder, exactly
from fedlight.core.errors import MessageError
from fedlight.core.running_sum import RunningSum
from fedlight.core.wire import require_fields

MAGIC = b"FS"
VERSION = 1
HEADER = struct.Struct("<2sBBIIIH")  # magic, version, whether integers, round, codec fingerprint, total weight, length of the notes
_ESCAPE = 127  # stands for an integer that does not fit one byte; those follow as int32


def write_sum(codes: RunningSum, context: Context, fingerprint: int, lr: float) -> bytes:
    """Return the message of one finished round: header, notes (the broadcast and the server's learning rate), packed sum.

    Integer sums take about their entropy (Huffman-coded bytes); float codes are sent as their mean, in float32.

    Raises:
        MessageError: if the broadcast contains something other than numbers, or an integer sum or the total weight does not fit 32 bits.
    """
    assert codes.total is not None, "nothing was added"
    try:
        notes = json.dumps({"broadcast": context.broadcast, "lr": lr}).encode()
    except TypeError as error:
        raise MessageError(f"Expected a broadcast of numbers but got {context.broadcast!r}") from error
    if codes.weight >= 1 << 32:
        raise MessageError(f"Expected weights that add up to less than 2**32 but got {codes.weight}")
    integers = not codes.total.is_floating_point()
    payload = _pack(codes.total.cpu().numpy()) if integers else codes.mean().cpu().numpy().astype("<f4").tobytes()
    return HEADER.pack(MAGIC, VERSION, integers, context.round, fingerprint, codes.weight, len(notes)) + notes + payload


def read_sum(message: bytes, length: int, round: int, fingerprint: int) -> tuple[Tensor, Mapping[str, Any], float]:
    """Return (mean code ``[length]`` float32, the broadcast, the server's learning rate) from the output of ``write_sum``.

    Raises:
        MessageError: if the message is damaged, or belongs to another round, codec or code length.
    """
    if len(message) < HEADER.size:
        raise MessageError(f"Expected a sum of at least {HEADER.size} bytes but got {len(message)}")
    magic, version, integers, for_round, for_codec, weight, noted = HEADER.unpack_from(message)
    expected = ("magic", MAGIC, magic), ("version", VERSION, version), ("round", round, for_round), ("codec", fingerprint, for_codec)
    require_fields("the header of a sum", *expected)
    if not weight or integers > 1:
        raise MessageError(f"Expected a sum of positive weight, of integers (1) or not (0), but got {weight} and {integers}")
    body = memoryview(message)[HEADER.size :]
    broadcast, lr = _read_notes(bytes(body[:noted]))
    payload = body[noted:]
    if integers:
        return (torch.from_numpy(_unpack(payload, length)).double() / weight).float(), broadcast, lr
    if len(payload) != 4 * length:
        raise MessageError(f"Expected a mean of {4 * length} bytes but got {len(payload)}")
    mean = np.frombuffer(payload, "<f4").astype(np.float32)
    if not np.isfinite(mean).all():
        raise MessageError("Expected a finite mean but the payload holds NaN or Inf")
    return torch.from_numpy(mean), broadcast, lr


def _read_notes(text: bytes) -> tuple[Mapping[str, Any], float]:
    """Return (the broadcast, the server's learning rate): finite numbers, and mappings of them."""
    try:
        notes = json.loads(text)
        broadcast, lr = notes["broadcast"], notes["lr"]
        finite = isinstance(broadcast, dict) and not isinstance(lr, dict) and _is_finite(broadcast) and _is_finite(lr)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MessageError(f"Expected notes with the broadcast but could not read them: {error}") from error
    if not finite:
        raise MessageError(f"Expected notes of finite numbers but got {str(notes)[:80]}")
    return broadcast, float(lr)


def _is_finite(note: Any) -> bool:
    """Whether a note is a number that fits a float, or a mapping of such."""
    if isinstance(note, dict):
        return all(map(_is_finite, note.values()))
    return type(note) in (int, float) and abs(note) <= sys.float_info.max


def apply_sum(weights: Tensor, message: bytes, decoder: Decoder, round: int) -> None:
    """Take a round's step on ``weights`` ``[dim]`` in place, as the server did with plain SGD: the same bits on the same machine.

    Raises:
        MessageError: if the message is damaged or belongs to another round or codec.
    """
    mean, broadcast, lr = read_sum(message, decoder.code_dim, round, decoder.fingerprint)
    with exactly(weights.device):
        aggregate = decoder.decode(mean.to(weights.device), Context(round=round, broadcast=broadcast), {})
        weights.add_(aggregate.to(weights), alpha=-lr)


def _pack(values: np.ndarray) -> bytes:
    if values.size and max(int(values.max()), -int(values.min())) > 2**31 - 1:
        raise MessageError(f"Expected sums that fit 32 bits but got {int(values.min())} to {int(values.max())}")
    large = np.abs(values) >= _ESCAPE
    small = np.where(large, _ESCAPE, values).astype(np.int8).tobytes()
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(small + values[large].astype("<i4").tobytes()) + coder.flush()


def _unpack(payload: memoryview, length: int) -> np.ndarray:
    decoder = zlib.decompressobj(-15)
    try:
        raw = decoder.decompress(bytes(payload), 5 * length + 1)  # at most every value escaped: stops a decompression bomb
    except zlib.error as error:
        raise MessageError(f"Expected a packed sum but could not unpack it: {error}") from error
    values = np.frombuffer(raw[:length], np.int8).astype(np.int64)
    large = values == _ESCAPE
    rest = raw[length:]
    if len(values) != length or len(rest) != 4 * int(large.sum()) or not decoder.eof or decoder.unused_data:
        raise MessageError(f"Expected a packed sum of {length} integers but got {len(raw)} bytes")
    values[large] = np.frombuffer(rest, "<i4")
    return values
