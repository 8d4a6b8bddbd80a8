"""Which coefficients of the two-sided bases make up the code, under a budget of code and a budget of factors to download."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlight.codecs.factors import factor_bytes
from fedlight.codecs.matrices import Matrices
from fedlight.codecs.moments import TwoSidedMoments
from fedlight.core.codec import Plan
from fedlight.core.errors import CodecMismatchError, ConfigurationError
from fedlight.core.inflate import deflate_text, inflate_text

Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps the coefficients that may be taken, bool ``[n]``, to (bits ``[n]``, 0 for those left out; what each saves ``[n]``)."""


@dataclass(frozen=True)
class Selection:
    """The bits of every coefficient of every matrix's grid ``[r1, r2, ..]``; 0 leaves it out. Plain data, the same at both halves."""

    grids: tuple[tuple[int, ...], ...]
    bits: Tensor

    @property
    def order(self) -> Tensor:
        """Positions ``[code_dim]`` in the flattened grids of the code's entries: by bits, most first, so that equal widths lie together."""
        kept = torch.nonzero(self.bits).flatten()
        return kept[self.bits[kept].argsort(descending=True, stable=True)]

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(bits, number of entries) of the code's parts, in ``order``."""
        counts = torch.bincount(self.bits).tolist()
        return [(width, count) for width, count in reversed(list(enumerate(counts))) if width and count]

    def factor_shapes(self, matrices: Matrices) -> list[tuple[int, int]]:
        """Return the shapes ``[n, r]`` of the factors: of every side of every matrix that is not a plain vector."""
        return [shape for item, grid in zip(matrices.items, self.grids, strict=True) for shape in zip(item.sides, grid, strict=False)]

    def to_plan(self) -> Plan:
        """Return the selection as plain data; the bits are packed, for they are part of what a client downloads."""
        return {"grids": [list(grid) for grid in self.grids], "bits": deflate_text(self.bits.to(torch.uint8).numpy().tobytes())}

    @classmethod
    def from_plan(cls, plan: Plan) -> Selection:
        """Return the selection that ``to_plan`` described.

        Raises:
            CodecMismatchError: if it has not the bits of as many coefficients as the grids have.
        """
        grids = tuple(tuple(grid) for grid in plan["grids"])
        size = sum(map(math.prod, grids))
        bits = torch.zeros(size, dtype=torch.long)  # before anything is unpacked: few bytes can claim many
        raw = inflate_text(plan["bits"], size, "bits")
        return cls(grids, bits.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8)) if size else bits)

    def check(self, matrices: Matrices) -> None:
        """Raise ``CodecMismatchError`` unless every grid has its matrix's sides, none longer than the matrix is."""
        shapes = [item.shape for item in matrices.items]
        fits = [
            len(grid) == len(shape) and all(0 <= r <= n for r, n in zip(grid, shape, strict=True))
            for grid, shape in zip(self.grids, shapes, strict=False)
        ]
        if len(self.grids) != len(shapes) or not all(fits):
            raise CodecMismatchError(f"Expected grids within matrices of {shapes} but got {[list(grid) for grid in self.grids]}")

    @classmethod
    def unfitted(cls, matrices: Matrices, count: int, bits: int) -> Selection:
        """Return a selection of the first ``count`` coefficients of each matrix's share, for a codec that has not seen a bank yet."""
        grids, parts, left = [], [], count
        for item in matrices.items:
            size = item.rows * item.columns
            take = max(1, min(size, round(count * size / matrices.layout.dim), left))
            left = max(left - take, 0)
            grid: tuple[int, ...] = ()
            for n in reversed(item.shape):
                grid = (min(n, -(-take // math.prod(grid))), *grid)
            grids.append(grid)
            part = torch.zeros(math.prod(grid), dtype=torch.long)
            part[:take] = bits
            parts.append(part)
        return cls(tuple(grids), torch.cat(parts))


def select(
    moments: TwoSidedMoments, matrices: Matrices, choose: Choose, factor_bits: float, most_bytes: int
) -> tuple[Selection, list[Tensor], list[Tensor]]:
    """Return the selection that saves most with factors of at most ``most_bytes``, the factors (left, right, left, ...), what columns save.

    Starts from what ``choose`` takes freely; while the factors weigh too much, the basis columns that save least for their bytes
    go and ``choose`` spends what they leave on the others.

    Raises:
        ConfigurationError: if not even one column a side fits the bytes, or there is nothing to choose from.
    """
    alive = [[torch.ones(r, dtype=torch.bool) for r in grid] for grid in moments.grids]
    while True:
        allowed = torch.cat([_outer(masks).flatten() for masks in alive])
        bits, saved = choose(allowed)
        grids, savings = split_grids(bits, moments.grids), split_grids(saved, moments.grids)
        used = [[(grid > 0).any(others) for others in _others(grid)] for grid in grids]
        shapes = [
            (n, int(mask.sum()))
            for item, masks in zip(matrices.items, used, strict=True)
            for n, mask in zip(item.sides, masks, strict=False)
        ]
        excess = factor_bytes(shapes, factor_bits) - most_bytes
        if excess <= 0:
            if not allowed.all() and not any(count for _, count in shapes):
                raise ConfigurationError(
                    f"Expected an encoder of at least one column a side but its budget is {most_bytes} bytes: raise `encoder_share`"
                )
            if not bits.any():
                raise ConfigurationError("Expected recorded updates to choose a code for but all are zero: raise the client learning rate")
            return _keep(moments, grids, savings, used)
        worth: list[tuple[float, float, Tensor, int]] = []  # saving for its bytes, bytes, mask, position
        for item, masks, saving, living in zip(matrices.items, used, savings, alive, strict=True):
            for n, mask, others, left in zip(item.sides, masks, _others(saving), living, strict=False):
                size = n * factor_bits / 8
                savings_of = saving.sum(others).tolist()
                worth += [(savings_of[i] / size, size, left, i) for i in torch.nonzero(mask).flatten().tolist()]
        worth.sort(key=lambda entry: entry[0])
        goal = min(excess, max(excess / 3, most_bytes / 25))
        for _, size, left, position in worth:
            left[position] = False
            goal -= size
            if goal <= 0:
                break


def split_grids(flat: Tensor, grids: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return one grid ``[..., r1, r2, ..]`` a matrix of coefficients ``[..., n]``."""
    parts = torch.split(flat, [math.prod(grid) for grid in grids], dim=-1)
    return [part.reshape(*part.shape[:-1], *grid) for part, grid in zip(parts, grids, strict=True)]


def _others(grid: Tensor) -> list[tuple[int, ...]]:
    """Return for each side of a grid all the others."""
    return [tuple(other for other in range(grid.ndim) if other != side) for side in range(grid.ndim)]


def _outer(masks: list[Tensor]) -> Tensor:
    """Return where all of the sides' masks hold, ``[r1, r2, ..]``."""
    whole = masks[0]
    for mask in masks[1:]:
        whole = whole.unsqueeze(-1) & mask
    return whole


def _keep(
    moments: TwoSidedMoments, grids: list[Tensor], savings: list[Tensor], used: list[list[Tensor]]
) -> tuple[Selection, list[Tensor], list[Tensor]]:
    """Cut grids and factors down to the columns in use, and add up what each saves."""
    factors: list[Tensor] = []
    worth: list[Tensor] = []
    kept: list[Tensor] = []
    for grid, saving, masks, bases in zip(grids, savings, used, moments.bases, strict=True):
        for side, (mask, basis, others) in enumerate(zip(masks, bases, _others(grid), strict=False)):
            grid = grid.index_select(side, torch.nonzero(mask).flatten())
            factors.append(basis[:, mask])
            worth.append(saving.sum(others)[mask])
        kept.append(grid)
    return Selection(tuple(tuple(g.shape) for g in kept), torch.cat([g.flatten() for g in kept])), factors, worth
