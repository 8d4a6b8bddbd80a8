"""An update as matrices, one per weight tensor: two-sided codecs project them from the left and from the right.

Long rows that read a feature map have two sides, its channels and its positions, which makes the matrix a tensor of three sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedlight.core.layout import Layout

LONGEST_SIDE = 1024
"""Longer rows are split if the layout shows how: their own basis would take many bytes and overfit the recorded rows."""

GROUPS = 16
"""More groups would have products too small to be quick."""


@dataclass(frozen=True)
class Matrix:
    """One matrix ``[rows, columns]``: a weight tensor with its bias as last column, or a ``plain`` vector ``[1, columns]``.

    Long rows have ``parts``, whose product is ``columns``: (channels, positions) of the feature map that the weight reads.
    """

    tensors: tuple[int, ...]
    rows: int
    columns: int
    parts: tuple[int, ...] = ()

    @cached_property
    def plain(self) -> bool:
        """Whether this is a vector, which keeps its own coordinates."""
        return self.rows == 1

    @cached_property
    def sides(self) -> tuple[int, ...]:
        """The sides to project, in order: rows and columns, or rows and the parts of the columns."""
        return () if self.plain else (self.rows, *(self.parts or (self.columns,)))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape as a tensor of these sides."""
        return self.sides or (1, self.columns)


@dataclass(frozen=True)
class Matrices:
    """All matrices of a layout, in its order; convolutions ``[out, in, kh, kw]`` are ``[out, in * kh * kw]``."""

    layout: Layout
    items: tuple[Matrix, ...]

    @classmethod
    def of(cls, layout: Layout) -> Matrices:
        """Return the matrices of a layout; a bias follows its weight and has one entry for each of its rows."""
        items: list[Matrix] = []
        index, count, channels = 0, len(layout.shapes), 1
        while index < count:
            shape = layout.shapes[index]
            rows = shape[0] if len(shape) > 1 else 1
            columns = math.prod(shape) // rows if rows else 0
            owner = layout.names[index].rpartition(".")[0]
            follows = index + 1 < count and layout.names[index + 1].rpartition(".")[0] == owner
            parts = _parts(shape, columns, channels) if rows > 1 else ()
            channels = rows if rows > 1 else channels
            if rows > 1 and not parts and follows and layout.shapes[index + 1] == (rows,):
                items.append(Matrix((index, index + 1), rows, columns + 1))
                index += 2
            else:
                items.append(Matrix((index,), rows, columns, parts))
                index += 1
        return cls(layout, tuple(items))

    def view(self, update: Tensor) -> list[Tensor]:
        """Return one tensor ``[..., rows, columns]`` per matrix, from updates ``[..., dim]``."""
        tensors = torch.split(update, list(self.layout.sizes), dim=-1)
        lead = update.shape[:-1]
        views = []
        for item in self.items:
            weight, *bias = (tensors[index] for index in item.tensors)
            weight = weight.reshape(*lead, item.rows, item.columns - len(bias))
            views.append(torch.cat([weight, bias[0].unsqueeze(-1)], dim=-1) if bias else weight)
        return views

    def tensors(self, update: Tensor) -> list[Tensor]:
        """Return one tensor ``[..., n1, n2, ..]`` per matrix, with all of its sides, from updates ``[..., dim]``."""
        return [view.reshape(*view.shape[:-2], *item.shape) for view, item in zip(self.view(update), self.items, strict=True)]

    def join(self, views: list[Tensor]) -> Tensor:
        """Return the updates ``[..., dim]``: the inverse of ``view``."""
        flat: list[Tensor] = []
        for item, view in zip(self.items, views, strict=True):
            if len(item.tensors) == 1:
                flat.append(view.flatten(-2))
            else:
                flat += [view[..., :-1].flatten(-2), view[..., -1]]
        return torch.cat(flat, dim=-1)


def _parts(shape: tuple[int, ...], columns: int, channels: int) -> tuple[int, ...]:
    """Return the (channels, positions) of a linear layer's long rows, () if they are short or the layout does not show them.

    After a flattened feature map they read its ``channels``, the rows of the previous matrix, in order. (A convolution's rows could
    be split as well, but its windows are so small that projecting them separately costs several times more.)
    """
    splits = len(shape) == 2 and columns > LONGEST_SIDE and 1 < channels < columns and columns % channels == 0
    return (channels, columns // channels) if splits else ()


def turn(tensor: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """Return the coefficients ``[..., r1, r2, ..]`` of a tensor ``[..., n1, n2, ..]`` in bases ``[n, r]``, one per side (Tucker 1966).

    Without bases they are the tensor.
    """
    if len(bases) == 2:
        return product(bases[0].T, tensor, bases[1])
    for side in reversed(range(len(bases))):
        tensor = contract(tensor, bases[side], side - len(bases))
    return tensor


def turn_back(tensor: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """Return the tensor ``[..., n1, n2, ..]`` of coefficients ``[..., r1, r2, ..]``."""
    if len(bases) == 2:
        return product(bases[0], tensor, bases[1].T)
    for side in range(len(bases)):
        tensor = contract(tensor, bases[side].T, side - len(bases))
    return tensor


def contract(tensor: Tensor, basis: Tensor, axis: int) -> Tensor:
    """Return a tensor with its side ``axis`` (negative) of length ``n`` multiplied by a basis ``[n, r]``."""
    if axis == -1:
        return tensor @ basis
    turned = basis.T @ tensor.flatten(axis + 1)
    return turned.reshape(*turned.shape[:-1], *tensor.shape[axis + 1 :])


def product(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ middle @ right`` of matrices ``[p, q]``, ``[..., q, r]`` and ``[r, s]`` in the order of fewer multiplications."""
    (p, q), (r, s) = left.shape, right.shape
    if q * s * (r + p) <= p * r * (q + s):
        return left @ (middle @ right)
    return (left @ middle) @ right


def project(matrices: Matrices, update: Tensor, bases: list[tuple[Tensor, ...]]) -> Tensor:
    """Return the coefficients ``[..., sum of r1 * r2 ..]`` of updates ``[..., dim]`` in all matrices; vectors are returned unchanged."""
    parts = zip(matrices.tensors(update), matrices.items, bases, strict=True)
    return torch.cat([turn(tensor, each).flatten(-len(item.shape)) for tensor, item, each in parts], dim=-1)


@dataclass(frozen=True)
class KeptRows:
    """How many rows of a grid of three sides are computed in each group of its columns, which lie from one of ``starts`` to the next.

    Coefficients of large energy lie in the first rows of a grid ``[r1, r2, r3]``. The last product, over the rows, makes for every column
    ``(r2, r3)`` hardly more rows than hold kept coefficients, in groups of columns that need about as many.
    """

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

    def __init__(self, matrices: Matrices, grids: list[Tensor], order: Tensor) -> None:
        """Keep what is true in the matrices' ``grids`` (bool ``[r1, r2, ..]``), as coefficients in an ``order`` ``[code_dim]`` of all."""
        super().__init__()
        self.matrices = matrices
        self.rows: list[KeptRows | None] = []
        columns, computed, start = [torch.zeros(0, dtype=torch.long)], [], 0
        for item, kept in zip(matrices.items, grids, strict=True):
            rows, places = None, torch.arange(kept.numel())
            if len(item.sides) == 3 and kept.any():
                rows, used, places = KeptRows.of(kept)
                columns.append(used)
            self.rows.append(rows)
            computed.append(start + places)
            start += kept.numel()
        found = torch.zeros(start, dtype=torch.long)
        whole = torch.cat(computed)
        found[whole] = torch.arange(len(whole))
        self.register_buffer("places", found[order], persistent=False)
        self.register_buffer("columns", torch.cat(columns), persistent=False)

    def forward(self, update: Tensor, bases: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """Return the coefficients ``[..., code_dim]`` of updates ``[..., dim]`` in bases ``[n, r]`` of every matrix."""
        parts, columns = [], self.columns
        for tensor, item, rows, each in zip(self.matrices.tensors(update), self.matrices.items, self.rows, bases, strict=True):
            if rows is None:
                parts.append(turn(tensor, each).flatten(-len(item.shape)))
            else:
                parts.append(rows.turn(tensor, each, columns[: rows.starts[-1]]))
                columns = columns[rows.starts[-1] :]
        return torch.cat(parts, dim=-1).index_select(-1, self.places)
