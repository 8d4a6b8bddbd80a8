"""Limits for tensors that are made at somebody else's word: what a file describes costs no more than the file is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedlight.core.errors import CodecMismatchError

_NEW = (Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_zeros)
_SIZED = (torch.empty, torch.full, torch.ones, torch.rand, torch.randn, torch.zeros)
_MAKERS = frozenset((*_SIZED, *_NEW, torch.arange, torch.eye, torch.linspace, torch.randint, torch.randperm))

_WORK_PER_BYTE = 150
"""Multiplications of a QR decomposition that are allowed for each byte of memory: 64 MiB allow 1e10, some seconds of one core."""


class Budget(TorchFunctionMode):
    """Within this context torch makes no tensors of more than ``limit`` bytes in all, and refuses before it takes the memory.

    Tensors that torch makes by themselves count (``torch.zeros``, ``torch.randn``, the parameters of layers), not the results of
    computing with them, and decompositions count by their multiplications. What is freed again counts as well.

    Args:
        limit: bytes.

    Raises:
        CodecMismatchError: within the context, instead of making a tensor that goes beyond the limit.

    >>> with Budget(1000):
    ...     torch.zeros(10**12)
    Traceback (most recent call last):
    fedlight.core.errors.CodecMismatchError: Expected tensors of at most 1,000 bytes in all but one of 4,000,000,000,000 bytes is asked for
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.memory = 0
        self.work = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count what a call takes, then make it."""
        kwargs = dict(kwargs or {})
        if func in _MAKERS and kwargs.get("out") is None:
            self._take(func, args, kwargs)
        elif func is torch.linalg.qr:
            *_, rows, columns = args[0].shape
            self.work += args[0].numel() * min(rows, columns)
            if self.work > _WORK_PER_BYTE * self.limit:
                raise CodecMismatchError(
                    f"Expected decompositions of at most {_WORK_PER_BYTE * self.limit:,} multiplications in all but they take {self.work:,}"
                )
        return func(*args, **kwargs)

    def _take(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the bytes that a call is about to take: those of the same tensor on the device without memory."""
        apart = {name: value for name, value in kwargs.items() if name not in ("generator", "pin_memory")} | {"device": "meta"}
        try:
            size = func(*args, **apart).nbytes
        except (RuntimeError, TypeError) as error:  # more bytes than torch can count
            raise CodecMismatchError(f"Expected tensors of at most {self.limit:,} bytes in all but one cannot be made: {error}") from error
        self.memory += size
        if self.memory > self.limit:
            raise CodecMismatchError(f"Expected tensors of at most {self.limit:,} bytes in all but one of {size:,} bytes is asked for")
