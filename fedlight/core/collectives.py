"""Inputs of collective sums: codes in the narrowest type that holds their sum, or as bytes on request."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedlight.core.wire import Format

Reduce = Callable[[Tensor], object]
"""Sums a tensor over all processes, in place."""

LARGEST_BYTE = 127
"""Largest sum of codes in one byte, and therefore the largest number of processes."""

NORM = 8
"""Power of the peaks: this root of the sum of powers is at least the largest peak and little more (a third for twelve processes)."""


def agree_on_units(codes: list[Tensor], world: int, reduce: Reduce) -> tuple[list[Tensor | None], int]:
    """Return the unit (0-d) of each float code's integers, the same on every process and not finite if a code is not, plus bytes sent."""
    known = [k for k, code in enumerate(codes) if code.is_floating_point() and code.numel()]
    units: list[Tensor | None] = [None] * len(codes)
    if not known:
        return units, 0
    peaks = torch.stack([codes[k].double().abs().amax() for k in known])
    powers = peaks.pow(NORM)  # float64 holds these powers of any float32
    sent = add_up([powers], world, reduce)
    reach = (powers * world).pow(1 / NORM).float()
    for k, largest in zip(known, reach, strict=True):
        units[k] = (largest / (LARGEST_BYTE // world)).clamp(min=torch.finfo(torch.float32).tiny)
    return units, sent


def outgoing(code: Tensor, format: Format, world: int, unit: Tensor | None) -> Tensor:
    """Return the code in the narrowest type that holds its sum over processes, as integers if there is a ``unit``."""
    if format.bits:
        return code.to(torch.int8 if world * ((1 << (format.bits - 1)) - 1) <= LARGEST_BYTE else torch.int32)
    if unit is not None:
        limit = LARGEST_BYTE // world
        return (code.float() / unit).round_().clamp_(-limit, limit).nan_to_num_(0.0).to(torch.int8)
    return code.to(getattr(format, "dtype", torch.float32), copy=True)


def in_units(code: Tensor, unit: Tensor | None) -> Tensor:
    """Return an outgoing code, or a sum of them, in the units of the codec's code."""
    return code.float() if unit is None else code.float() * unit


def add_up(tensors: list[Tensor], world: int, reduce: Reduce) -> int:
    """Replace the tensors by their mean over processes (integers by their sum), in one message per type; return the messages' bytes."""
    sent = 0
    for dtype in {tensor.dtype: None for tensor in tensors}:
        mine = [tensor for tensor in tensors if tensor.dtype == dtype]
        message = torch.cat([tensor.reshape(-1) for tensor in mine])
        if dtype.is_floating_point:
            message.div_(world)
        reduce(message)
        for tensor, piece in zip(mine, torch.split(message, [t.numel() for t in mine]), strict=True):
            tensor.copy_(piece.view(tensor.shape))
        sent += message.numel() * message.element_size()
    return sent
