"""Sums over the processes of a run: each answers for its share of a cohort, and what they have is added up."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, distributed

from fedlight.core.errors import ProcessLostError
from fedlight.core.running_sum import RunningSum

T = TypeVar("T")

SHORT = 1 << 16
"""Length up to which a float sum travels with the counts: for a small model, how many messages there are costs more than their length."""


def lost_process(error: BaseException) -> ProcessLostError | None:
    """Return what a failed collective operation says about the other processes, None if the error is something else.

    Gloo raises mere RuntimeErrors: what tells them from others is that torch.distributed raised them.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, RuntimeError) or not frames or "torch/distributed/" not in Path(frames[-1].filename).as_posix():
        return None
    why = "stands still" if "timeout" in str(error).lower() or "timed out" in str(error).lower() else "has ended"
    return ProcessLostError(
        f"Expected all processes of the run to take part but another one {why}: see what it printed last, and go on from the last "
        "checkpoint. How long processes wait for each other is the `timeout` of `trainer.strategy` DDPStrategy, 5 minutes if not given"
    )


@contextmanager
def together() -> Iterator[None]:
    """Turn what a collective operation raises when another process is lost into ``ProcessLostError``."""
    try:
        yield
    except RuntimeError as error:
        if lost := lost_process(error):
            raise lost from error
        raise


def several_processes() -> bool:
    """Whether this is one of several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of the tensor over all processes, in its own memory."""
    if several_processes():
        with together():
            distributed.all_reduce(tensor)
    return tensor


def from_first(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the first process's tensor, on the CPU; it travels through ``device``."""
    if not several_processes():
        return tensor
    mine = tensor if distributed.get_rank() == 0 else torch.zeros_like(tensor)
    return reduce_sum(mine.to(device)).cpu()


def gather(parts: list[T]) -> list[T]:
    """Return the parts of all processes."""
    if not several_processes():
        return parts
    everyone: list[list[T]] = [[] for _ in range(distributed.get_world_size())]
    with together():
        distributed.all_gather_object(everyone, parts)
    return [part for one in everyone for part in one]


def weighted_mean(parts: list[tuple[int, int, Tensor]]) -> Tensor:
    """Return the weighted mean of clients' buffers ``[buffer_dim]``, added up in client order, whatever process ran them."""
    ordered = sorted(parts, key=lambda part: part[0])
    total = torch.stack([buffers.double() * weight for _, weight, buffers in ordered]).sum(0)
    return (total / sum(weight for _, weight, _ in ordered)).to(ordered[0][2].dtype)


def merge(counts: list[float], codes: RunningSum, length: int, integers: bool, device: torch.device) -> list[float]:
    """Return the sums of ``counts`` over all processes, and add up their running sums of ``length`` numbers in place.

    Codes travel between processes, not updates; a short float sum in one message with the counts.
    """
    if not several_processes():
        return counts
    kind = torch.int64 if integers else torch.float64
    # The largest magnitudes of all processes, added up, bound the sum of their sums.
    reach = int(codes.total.abs().max()) if integers and codes.total is not None and len(codes.total) else 0
    numbers = [codes.weight, codes.count, codes.squares, reach, *counts]
    message = torch.tensor([float(n) for n in numbers], dtype=torch.float64, device=device)
    joined = not integers and length <= SHORT
    if joined:
        message = torch.cat([message, torch.zeros(length, dtype=kind, device=device) if codes.total is None else codes.total])
    merged = reduce_sum(message)
    codes.weight, codes.count, codes.squares, reach = map(int, merged[:4].tolist())
    if joined:
        codes.total = merged[len(numbers) :]
    else:
        reduce_total(codes, length, kind, device, narrowest(reach) if integers else kind)
    return merged[4 : len(numbers)].tolist()


def narrowest(reach: int) -> torch.dtype:
    """Return the narrowest type that processes can add up in which holds every sum up to ``reach``: no sum is changed by it."""
    return next(dtype for dtype in (torch.int8, torch.int32, torch.int64) if reach <= torch.iinfo(dtype).max)


def reduce_total(running: RunningSum, length: int, dtype: torch.dtype, device: torch.device, wire: torch.dtype) -> None:
    """Add up running sums over processes, as ``wire`` between them; a process whose clients were all dropped adds zeros."""
    total = running.total if running.total is not None else torch.zeros(length, dtype=dtype, device=device)
    running.total = reduce_sum(total.to(wire)).to(dtype)
