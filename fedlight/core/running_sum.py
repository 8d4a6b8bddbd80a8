"""The running sum: all that the server stores, for a cohort of any size."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 18
"""Size of a block of weighted numbers."""

_FLOATS = (torch.float16, torch.float32, torch.float64)  # that NumPy has as well


class RunningSum:
    """Adds weighted terms as they arrive: exactly (int64) for integers, in float64 for floats.

    Attributes:
        total: the sum of ``weight * term``, or None before the first.
        weight: the sum of the weights.
        count: how many terms were added.
        squares: the sum of the squared weights, or an equivalent for the effective count if the weights are hidden.
        wrapped: how many numbers of the sum had left the window that they are counted in and were put right.
        lost: the share of the sum that left its window, could not be put right and is 0.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.weight = 0
        self.count = 0
        self.squares: int | Fraction = 0
        self.wrapped = 0
        self.lost = 0.0

    def add(self, term: Tensor, weight: int = 1) -> None:
        """Add ``weight * term``, a term ``[n]``; raises RuntimeError if its length is not that of the others."""
        if self.total is None:
            self.total = torch.zeros(term.shape, dtype=sum_dtype(term.dtype), device=term.device)
        if term.shape != self.total.shape:
            raise RuntimeError(f"Expected a term of shape {list(self.total.shape)}, as those before, but got {list(term.shape)}")
        if term.is_cpu and term.dtype in _FLOATS:
            _add_floats(self.total, term, weight)
        else:
            self.total.add_(term.detach(), alpha=weight)
        self.weight += weight
        self.count += 1
        self.squares += weight * weight

    @property
    def effective_count(self) -> float:
        """Number of equally weighted terms that would average out the same noise: ``weight**2 / squares``."""
        return float(self.weight**2 / self.squares) if self.squares else 0.0

    def mean(self) -> Tensor:
        """Return the weighted mean ``[n]``, float32."""
        assert self.total is not None, "nothing was added"
        assert self.weight, "the weights add up to 0"
        return (self.total.double() / self.weight).float()


def _add_floats(total: Tensor, term: Tensor, weight: int) -> None:
    """Add floats on the CPU, cast in cache: torch's sum of mixed types makes a copy of the whole term first.

    It makes few calls (one if the weight is 1), because each needs the interpreter lock, which training threads may hold.
    """
    held, new = total.numpy().reshape(-1), term.detach().numpy().reshape(-1)
    with np.errstate(invalid="ignore", over="ignore"):  # as in torch: callers refuse values that are not finite
        if weight == 1:
            np.add(held, new, out=held)
            return
        for start in range(0, len(new), BLOCK):
            block = slice(start, start + BLOCK)
            held[block] += np.multiply(new[block], weight, dtype=np.float64)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of a sum of terms of ``dtype``."""
    return torch.float64 if dtype.is_floating_point else torch.int64
