"""Which coefficients of the two-sided bases make up the code, under a budget of code and a budget of factors to download."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlight.codecs.factors import factor_bytes
from fedlight.codecs.matrices import Matrices
from fedlight.codecs.moments import TwoSidedMoments
from fedlight.core.codec import Plan
from fedlight.core.errors import ConfigurationError

Choose = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps the coefficients that may be taken, bool ``[n]``, to (bits ``[n]``, 0 for those left out; what each saves ``[n]``)."""


@dataclass(frozen=True)
class Selection:
    """The bits of every coefficient of every matrix's grid ``[r1, r2]``; 0 leaves it out. Plain data, the same at both halves."""

    grids: tuple[tuple[int, int], ...]
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
        """Return the shapes ``[n, r]`` of the factors: left and right of every matrix that is not a plain vector."""
        shapes = []
        for item, (r1, r2) in zip(matrices.items, self.grids, strict=True):
            if not item.plain:
                shapes += [(item.rows, r1), (item.columns, r2)]
        return shapes

    def to_plan(self) -> Plan:
        """Return the selection as plain data; the bits are packed, for they are part of what a client downloads."""
        packed = zlib.compress(self.bits.to(torch.uint8).numpy().tobytes(), 9)
        return {"grids": [list(grid) for grid in self.grids], "bits": base64.b85encode(packed).decode()}

    @classmethod
    def from_plan(cls, plan: Plan) -> Selection:
        """Return the selection that ``to_plan`` described."""
        grids = tuple((r1, r2) for r1, r2 in plan["grids"])
        size = sum(r1 * r2 for r1, r2 in grids)
        raw = zlib.decompressobj().decompress(base64.b85decode(plan["bits"]), size)
        return cls(grids, torch.frombuffer(bytearray(raw), dtype=torch.uint8).long())

    @classmethod
    def unfitted(cls, matrices: Matrices, count: int, bits: int) -> Selection:
        """Return a selection of the first ``count`` coefficients of each matrix's share, for a codec that has not seen a bank yet."""
        grids, parts, left = [], [], count
        for item in matrices.items:
            size = item.rows * item.columns
            take = max(1, min(size, round(count * size / matrices.layout.dim), left))
            left = max(left - take, 0)
            r2 = min(item.columns, take)
            r1 = 1 if item.plain else min(item.rows, -(-take // r2))
            grids.append((r1, r2))
            part = torch.zeros(r1 * r2, dtype=torch.long)
            part[:take] = bits
            parts.append(part)
        return cls(tuple(grids), torch.cat(parts))


def select(
    moments: TwoSidedMoments, matrices: Matrices, choose: Choose, factor_bits: int, most_bytes: int
) -> tuple[Selection, list[Tensor]]:
    """Return the selection that saves most, with factors of at most ``most_bytes``, and the factors it uses (left, right, left, ...).

    Starts from what ``choose`` takes freely; while the factors weigh too much, the basis columns that save least for their bytes
    go and ``choose`` spends what they leave on the others.

    Raises:
        ConfigurationError: if not even one column a side fits the bytes, or there is nothing to choose from.
    """
    rows = [torch.ones(r1, dtype=torch.bool) for r1, _ in moments.grids]
    columns = [torch.ones(r2, dtype=torch.bool) for _, r2 in moments.grids]
    while True:
        allowed = torch.cat([(a[:, None] & b).flatten() for a, b in zip(rows, columns, strict=True)])
        bits, saved = choose(allowed)
        grids = [part.view(grid) for part, grid in zip(_split(bits, moments.grids), moments.grids, strict=True)]
        savings = [part.view(grid) for part, grid in zip(_split(saved, moments.grids), moments.grids, strict=True)]
        used = [((grid > 0).any(1), (grid > 0).any(0)) for grid in grids]
        shapes = [
            (n, int(mask.sum()))
            for item, masks in zip(matrices.items, used, strict=True)
            if not item.plain
            for n, mask in zip((item.rows, item.columns), masks, strict=True)
        ]
        excess = factor_bytes(shapes, factor_bits) - most_bytes
        if excess <= 0:
            if not allowed.all() and not any(count for _, count in shapes):
                raise ConfigurationError(
                    f"Expected an encoder of at least one column a side but its budget is {most_bytes} bytes: raise `encoder_share`"
                )
            if not bits.any():
                raise ConfigurationError("Expected recorded updates to choose a code for but all are zero: raise the client learning rate")
            return _keep(moments, grids, used)
        worth: list[tuple[float, float, Tensor, int]] = []  # saving for its bytes, bytes, mask, position
        for item, masks, saving, a, b in zip(matrices.items, used, savings, rows, columns, strict=True):
            if item.plain:
                continue
            for axis, n, mask, alive in ((1, item.rows, masks[0], a), (0, item.columns, masks[1], b)):
                size = n * factor_bits / 8
                savings_of = saving.sum(axis).tolist()
                worth += [(savings_of[i] / size, size, alive, i) for i in torch.nonzero(mask).flatten().tolist()]
        worth.sort(key=lambda entry: entry[0])
        goal = min(excess, max(excess / 3, most_bytes / 25))
        for _, size, alive, position in worth:
            alive[position] = False
            goal -= size
            if goal <= 0:
                break


def _split(flat: Tensor, grids: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    return torch.split(flat, [r1 * r2 for r1, r2 in grids])


def _keep(moments: TwoSidedMoments, grids: list[Tensor], used: list[tuple[Tensor, Tensor]]) -> tuple[Selection, list[Tensor]]:
    """Cut grids and factors down to the columns in use."""
    factors: list[Tensor] = []
    kept: list[Tensor] = []
    for k, (grid, (a, b)) in enumerate(zip(grids, used, strict=True)):
        left, right = moments.left[k], moments.right[k]
        if left is None or right is None:
            kept.append(grid)
        else:
            kept.append(grid[a][:, b])
            factors += [left[:, a], right[:, b]]
    return Selection(tuple((g.shape[0], g.shape[1]) for g in kept), torch.cat([g.flatten() for g in kept])), factors
