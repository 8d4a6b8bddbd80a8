"""An update seen as matrices, one a weight tensor: what two-sided codecs project from the left and from the right."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlight.core.layout import Layout


@dataclass(frozen=True)
class Matrix:
    """One matrix ``[rows, columns]``: a weight tensor, its bias as a last column; or a ``plain`` vector ``[1, columns]`` as it is."""

    tensors: tuple[int, ...]
    rows: int
    columns: int

    @property
    def plain(self) -> bool:
        """Whether this is a vector, which is left in its own coordinates."""
        return self.rows == 1


@dataclass(frozen=True)
class Matrices:
    """All matrices of a layout, in its order; convolutions ``[out, in, kh, kw]`` are ``[out, in * kh * kw]``."""

    layout: Layout
    items: tuple[Matrix, ...]

    @classmethod
    def of(cls, layout: Layout) -> Matrices:
        """Return the matrices of a layout; a bias follows its weight and has one entry for each of its rows."""
        items: list[Matrix] = []
        index, count = 0, len(layout.shapes)
        while index < count:
            shape = layout.shapes[index]
            rows = shape[0] if len(shape) > 1 else 1
            columns = math.prod(shape) // rows if rows else 0
            owner = layout.names[index].rpartition(".")[0]
            follows = index + 1 < count and layout.names[index + 1].rpartition(".")[0] == owner
            if rows > 1 and follows and layout.shapes[index + 1] == (rows,):
                items.append(Matrix((index, index + 1), rows, columns + 1))
                index += 2
            else:
                items.append(Matrix((index,), rows, columns))
                index += 1
        return cls(layout, tuple(items))

    def view(self, update: Tensor) -> list[Tensor]:
        """Return one tensor ``[..., rows, columns]`` a matrix of updates ``[..., dim]``."""
        tensors = torch.split(update, list(self.layout.sizes), dim=-1)
        lead = update.shape[:-1]
        views = []
        for item in self.items:
            weight, *bias = (tensors[index] for index in item.tensors)
            weight = weight.reshape(*lead, item.rows, item.columns - len(bias))
            views.append(torch.cat([weight, bias[0].unsqueeze(-1)], dim=-1) if bias else weight)
        return views

    def join(self, views: list[Tensor]) -> Tensor:
        """Return the updates ``[..., dim]`` that ``view`` took apart."""
        flat: list[Tensor] = []
        for item, view in zip(self.items, views, strict=True):
            if len(item.tensors) == 1:
                flat.append(view.flatten(-2))
            else:
                flat += [view[..., :-1].flatten(-2), view[..., -1]]
        return torch.cat(flat, dim=-1)


def product(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ middle @ right`` of matrices ``[p, q]``, ``[..., q, r]`` and ``[r, s]`` in the order of fewer multiplications."""
    (p, q), (r, s) = left.shape, right.shape
    if q * s * (r + p) <= p * r * (q + s):
        return left @ (middle @ right)
    return (left @ middle) @ right
