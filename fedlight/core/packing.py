"""Plain values and tensors as bytes (msgpack): what crosses the wire beside codes."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import torch
from torch import Tensor

from fedlight.core.errors import ConfigurationError, MessageError

_TENSOR = 1
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)}
DTYPES |= {str(dtype): dtype for dtype in (torch.int16, torch.int8, torch.uint8, torch.bool)}
DTYPES |= {str(dtype): dtype for dtype in (torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64)}
DTYPES |= {str(dtype): dtype for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}


def pack(value: Any) -> bytes:
    """Return the bytes of a value: None, numbers, texts, bytes, tensors, and lists and mappings (of text keys) of these.

    Raises:
        ConfigurationError: if the value holds something else.
    """
    try:
        packed: bytes = msgpack.packb(value, default=_pack_tensor)
    except (TypeError, OverflowError) as error:
        raise ConfigurationError(
            f"Expected numbers, texts, bytes, tensors, lists or mappings to send but got another type: {error}"
        ) from error
    return packed


def unpack(data: bytes | memoryview) -> Any:
    """Return the value that ``pack`` packed; tensors lie on the CPU, in memory of their own.

    Raises:
        MessageError: if the bytes are damaged, or there are more of them than one value has.
    """
    try:
        return msgpack.unpackb(data, ext_hook=_unpack_tensor)
    except MessageError:
        raise
    except Exception as error:  # msgpack has no common class for what damaged bytes raise
        raise MessageError(f"Expected a packed value but could not read it: {type(error).__name__}: {error}") from error


def _pack_tensor(value: object) -> msgpack.ExtType:
    if not isinstance(value, Tensor) or str(value.dtype) not in DTYPES:
        raise TypeError(f"{type(value).__name__}{f' of {value.dtype}' if isinstance(value, Tensor) else ''}")
    flat = value.detach().cpu().contiguous().view(-1)
    raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return msgpack.ExtType(_TENSOR, msgpack.packb([str(value.dtype), list(value.shape), raw]))


def _unpack_tensor(code: int, data: bytes) -> Tensor:
    if code != _TENSOR:
        raise MessageError(f"Expected a packed tensor but got an extension of kind {code}")
    name, shape, raw = msgpack.unpackb(data)
    dtype = DTYPES.get(name)
    sound = dtype is not None and isinstance(raw, bytes) and all(isinstance(n, int) and n >= 0 for n in shape)
    if not sound or math.prod(shape) * dtype.itemsize != len(raw):  # type: ignore[union-attr]  # checked before memory is taken
        raise MessageError(f"Expected the numbers of a tensor of {name} {shape} but got {len(raw)} bytes")
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).view(shape)  # type: ignore[arg-type]


def as_tensor(data: bytes) -> Tensor:
    """Return bytes as a tensor (uint8), which a checkpoint can hold."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def as_bytes(data: Tensor) -> bytes:
    """Return the bytes of what ``as_tensor`` returned."""
    return data.numpy().tobytes()
