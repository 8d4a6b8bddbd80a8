"""What an encoder computes of its grids: not whole ones, of which a short code keeps a few per cent, but their leading corners.

Columns of a basis are sorted by energy, so that kept coefficients crowd where all indices are small: the further along the last side,
the fewer columns of the others are needed. (A grid of two sides is cheap, and is computed whole.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlight.codecs.matrices import Matrices, contract, turn

BLOCK = 32
"""Columns of the last side that are projected together: fewer would waste less and keep the processor less busy."""


@dataclass(frozen=True)
class Corner:
    """Coefficients ``[: widths[0], : widths[1], .., start : start + widths[-1]]`` of a grid."""

    start: int
    widths: tuple[int, ...]

    def of(self, tensor: Tensor, bases: Sequence[Tensor]) -> Tensor:
        """Return these coefficients ``[..., *widths]`` of a tensor ``[..., n1, n2, ..]``."""
        last = bases[-1][:, self.start : self.start + self.widths[-1]]
        tensor = contract(tensor, last, -1)  # one large product, of a vector as long as the update
        for side, (basis, width) in enumerate(zip(bases[:-1], self.widths, strict=False)):
            tensor = contract(tensor, basis[:, :width], side - len(bases))
        return tensor


class Needed:
    """The corners of every grid that hold the kept coefficients, and where in them, one behind the other, each of those lies.

    Args:
        matrices: the matrices of updates.
        grids: the grid ``[r1, r2, ..]`` of each.
        order: positions ``[code_dim]`` of the kept coefficients in the flattened grids.
    """

    def __init__(self, matrices: Matrices, grids: Sequence[tuple[int, ...]], order: Tensor) -> None:
        self.matrices = matrices
        kept = torch.zeros(sum(map(math.prod, grids)), dtype=torch.bool)
        kept[order] = True
        self.corners: list[list[Corner]] = []
        places = torch.full((len(kept),), -1)
        begin = count = 0
        for item, grid in zip(matrices.items, grids, strict=True):
            size = math.prod(grid)
            found = _corners(kept[begin : begin + size].view(grid)) if item.parts else [Corner(0, grid)]
            self.corners.append(found)
            here = places[begin : begin + size].view(grid)
            for corner in found:
                length = math.prod(corner.widths)
                here[_box(corner)] = torch.arange(count, count + length).view(corner.widths)
                count += length
            begin += size
        self.places = places[order]

    def coefficients(self, update: Tensor, bases: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """Return the coefficients ``[..., n]`` of all corners, of which ``places`` are those of the code, of updates ``[..., dim]``."""
        parts = []
        for view, item, corners, each in zip(self.matrices.view(update), self.matrices.items, self.corners, bases, strict=True):
            tensor = view.reshape(*view.shape[:-2], *item.shape)
            if item.parts:
                parts += [corner.of(tensor, each).flatten(-len(each)) for corner in corners]
            else:
                parts.append((turn(tensor, each) if each else tensor).flatten(-len(item.shape)))
        return torch.cat(parts, dim=-1)


def _corners(kept: Tensor) -> list[Corner]:
    """Return a corner for each block of the last side of a grid ``[r1, r2, ..]`` that keeps anything."""
    corners = []
    for start in range(0, kept.shape[-1], BLOCK):
        block = kept[..., start : start + BLOCK]
        if block.any():
            widths = [int(torch.nonzero(block.movedim(side, 0).flatten(1).any(1)).max()) + 1 for side in range(kept.ndim - 1)]
            corners.append(Corner(start, (*widths, block.shape[-1])))
    return corners


def _box(corner: Corner) -> tuple[slice, ...]:
    return (*(slice(width) for width in corner.widths[:-1]), slice(corner.start, corner.start + corner.widths[-1]))
