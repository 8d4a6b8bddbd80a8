"""The coefficients that a code keeps, computed without most of the others where a matrix has three sides.

Coefficients of large energy lie in the first rows of a grid ``[r1, r2, r3]``. The last product, over the rows, makes for every column
``(r2, r3)`` hardly more rows than hold kept coefficients, in groups of columns that need about as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedlight.codecs.matrices import Matrices, turn
from fedlight.codecs.selection import Selection, split_grids

GROUPS = 16
"""More groups would have products too small to be quick."""


@dataclass(frozen=True)
class KeptRows:
    """How many rows of a grid are computed in each group of its columns, which lie from one of ``starts`` to the next."""

    rows: tuple[int, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, kept: Tensor) -> tuple[KeptRows, Tensor, Tensor]:
        """Return them for a grid (bool ``[r1, r2, r3]``), the order of its columns, and where what is computed lies in the grid."""
        flat = kept.flatten(1)
        most = (flat * torch.arange(1, len(flat) + 1).unsqueeze(1)).amax(0)
        columns = most.argsort(descending=True, stable=True)[: int((most > 0).sum())]
        starts = tuple(len(columns) * group // GROUPS for group in range(GROUPS + 1))
        groups = [columns[start:stop] for start, stop in pairwise(starts)]
        rows = tuple(int(most[group[0]]) if len(group) else 0 for group in groups)
        places = torch.arange(flat.numel()).view(flat.shape)
        return cls(rows, starts), columns, torch.cat([places[:count, group].flatten() for count, group in zip(rows, groups, strict=True)])

    def turn(self, tensor: Tensor, bases: Sequence[Tensor], columns: Tensor) -> Tensor:
        """Return the computed coefficients ``[..., n]`` of a tensor ``[..., n1, n2, n3]`` in bases ``[n, r]``."""
        left, middle = bases[0].T, turn(tensor, bases[1:]).flatten(-2).index_select(-1, columns)
        groups = zip(self.rows, pairwise(self.starts), strict=True)
        return torch.cat([(left[:count] @ middle[..., start:stop]).flatten(-2) for count, (start, stop) in groups], dim=-1)


class KeptProjection(nn.Module):
    """Maps updates to the coefficients that a selection keeps, in its order: those of ``project``, but for rounding."""

    places: Tensor
    columns: Tensor

    def __init__(self, matrices: Matrices, selection: Selection) -> None:
        super().__init__()
        self.matrices = matrices
        self.rows: list[KeptRows | None] = []
        columns, computed, start = [torch.zeros(0, dtype=torch.long)], [], 0
        for item, kept in zip(matrices.items, split_grids(selection.bits > 0, selection.grids), strict=True):
            rows, places = None, torch.arange(kept.numel())
            if len(item.sides) == 3 and kept.any():
                rows, order, places = KeptRows.of(kept)
                columns.append(order)
            self.rows.append(rows)
            computed.append(start + places)
            start += kept.numel()
        found = torch.zeros(start, dtype=torch.long)
        whole = torch.cat(computed)
        found[whole] = torch.arange(len(whole))
        self.register_buffer("places", found[selection.order], persistent=False)
        self.register_buffer("columns", torch.cat(columns), persistent=False)

    def forward(self, update: Tensor, bases: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """Return the coefficients ``[..., code_dim]`` of updates ``[..., dim]`` in bases ``[n, r]`` of every matrix."""
        parts, columns = [], self.columns
        for view, item, rows, each in zip(self.matrices.view(update), self.matrices.items, self.rows, bases, strict=True):
            tensor = view.reshape(*view.shape[:-2], *item.shape)
            if rows is None:
                parts.append((turn(tensor, each) if each else tensor).flatten(-len(item.shape)))
            else:
                parts.append(rows.turn(tensor, each, columns[: rows.starts[-1]]))
                columns = columns[rows.starts[-1] :]
        return torch.cat(parts, dim=-1).index_select(-1, self.places)
