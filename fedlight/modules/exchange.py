"""What processes exchange in a round: sums of codes and a few numbers; buffers and client state only where there are any."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, distributed

from fedlight.core.codec import Codec, State
from fedlight.core.rounds import Round
from fedlight.core.running_sum import RunningSum, sum_dtype

T = TypeVar("T")

SHORT = 1 << 16
"""Length up to which a float sum travels with the counts: for a small model, how many messages there are costs more than their length."""


def several_processes() -> bool:
    """Whether this is one of several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of the tensor over all processes."""
    if several_processes():
        distributed.all_reduce(tensor)
    return tensor


def gather(parts: list[T]) -> list[T]:
    """Return the parts of all processes."""
    if not several_processes():
        return parts
    everyone: list[list[T]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everyone, parts)
    return [part for one in everyone for part in one]


def gather_states(states: dict[int, State]) -> dict[int, State]:
    """Return the client states that any process changed."""
    return dict(gather(list(states.items())))


def weighted_mean(parts: list[tuple[int, int, Tensor]]) -> Tensor:
    """Return the weighted mean of clients' buffers ``[buffer_dim]``, added up in client order, whatever process ran them."""
    ordered = sorted(parts, key=lambda part: part[0])
    total = torch.stack([buffers.double() * weight for _, weight, buffers in ordered]).sum(0)
    return (total / sum(weight for _, weight, _ in ordered)).float()


def merge(round: Round, codec: Codec, device: torch.device, dropped: int) -> None:
    """Add up what all processes have of a pass, in place: codes, not updates, travel between processes.

    ``dropped`` is how many clients this process dropped in it.
    """
    if not several_processes():
        round.dropped_count += dropped
        return
    format, decoder, codes = codec.encoder.format_at(round.context.step), codec.decoder, round.codes
    integers = codec.additive and bool(format.bits)
    kind = torch.int64 if integers else torch.float64
    length = decoder.sum_length(round.context.step)
    reach = _largest(codes.total) if integers else 0
    numbers = [codes.weight, codes.count, codes.squares, round.uplink, round.sent, round.inside, dropped, reach, round.loss, round.trained]
    message = torch.tensor([float(n) for n in numbers], dtype=torch.float64, device=device)
    joined = not integers and length <= SHORT
    if joined:
        message = torch.cat([message, torch.zeros(length, dtype=kind, device=device) if codes.total is None else codes.total])
    merged = reduce_sum(message)
    *counts, loss, trained = merged[: len(numbers)].tolist()
    codes.weight, codes.count, codes.squares, round.uplink, round.sent, round.inside, dropped, reach = map(int, counts)
    round.dropped_count += dropped
    if joined:
        codes.total = merged[len(numbers) :]
    else:
        _reduce_total(codes, length, kind, device, narrowest(reach) if integers else kind)
    if round.context.step:
        return
    round.loss, round.trained = loss, int(trained)
    if round.true is not None:
        _reduce_total(round.true, codec.encoder.dim, sum_dtype(torch.float32), device, sum_dtype(torch.float32))
        round.true.weight = codes.weight


def narrowest(reach: int) -> torch.dtype:
    """Return the narrowest type that processes can add up in which holds every sum up to ``reach``: no sum is changed by it."""
    return next(dtype for dtype in (torch.int8, torch.int32, torch.int64) if reach <= torch.iinfo(dtype).max)


def _largest(total: Tensor | None) -> int:
    """Return the largest magnitude in a sum of integers; those of all processes, added up, bound the sum of their sums."""
    return int(total.abs().max()) if total is not None and len(total) else 0


def _reduce_total(running: RunningSum, length: int, dtype: torch.dtype, device: torch.device, wire: torch.dtype) -> None:
    """Sum over processes, as ``wire`` between them; one whose clients were all dropped adds zeros."""
    total = running.total if running.total is not None else torch.zeros(length, dtype=dtype, device=device)
    running.total = reduce_sum(total.to(wire)).to(dtype)
