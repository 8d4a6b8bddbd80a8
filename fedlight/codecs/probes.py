"""Random probes of what a two-sided code leaves out: they let a server learn new directions from sums alone.

Decoded aggregates lie in the codec's own directions, so a codec fitted to them would never find new ones. A probe is one
combination of a matrix's rows and one of its columns, with random signs from the round's public seed:
``a^T R`` and ``R b`` for the part ``R`` of the update that the code leaves out. Over the signs, the mean of ``(a^T R)^T (a^T R)`` is
``R^T R``: probes of many rounds point to the missing directions of both sides (randomized range finding; Halko, Martinsson & Tropp 2011,
SIAM Review 53(2), section 4). They are linear, so they add up with the rest of the code, and the seed takes no bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedlight.codecs.matrices import Matrices
from fedlight.codecs.selection import Selection
from fedlight.codecs.two_sided import TwoSidedDecoder, TwoSidedEncoder, _TwoSidedHalf
from fedlight.core.codec import Context, Private, State
from fedlight.core.layout import Layout
from fedlight.core.random import torch_generator
from fedlight.core.wire import CodeFormat

BITS = 3
"""Bits of a probe's entries: their standard deviation is about one step, the range three."""

Signs = tuple[Tensor, Tensor]


def probe_length(matrices: Matrices, count: int) -> int:
    """Return the total length of ``count`` probes of every matrix; plain vectors have none."""
    return count * sum(item.rows + item.columns for item in matrices.items if not item.plain)


def draw_signs(matrices: Matrices, count: int, context: Context, device: torch.device) -> list[Signs]:
    """Return unit vectors ``[count, rows]`` and ``[columns, count]`` from the round's public seed, for each matrix that is not plain."""
    generator = torch_generator(context.seed, context.round, context.attempt, "probe")
    signs = []
    for item in matrices.items:
        if not item.plain:
            shapes = ((count, item.rows), (item.columns, count))
            drawn = [torch.randint(0, 2, shape, generator=generator) for shape in shapes]
            left, right = ((2.0 * each - 1).to(device) for each in drawn)
            signs.append((left / item.rows**0.5, right / item.columns**0.5))
    return signs


def probe(left_out: Tensor, signs: Signs) -> tuple[Tensor, Tensor]:
    """Return ``a^T R`` ``[..., count, columns]`` and ``R b`` ``[..., rows, count]`` of a code's residual ``R`` ``[.., rows, columns]``."""
    across, along = signs
    return across @ left_out, left_out @ along


def add_probes(decoded: Tensor, across: Tensor, along: Tensor) -> Tensor:
    """Return a matrix ``[rows, columns]`` with the directions of the decoded one and of the probes.

    Of the probes ``across`` ``[count, columns]`` and ``along`` ``[rows, count]``, the first contribute, on average, as much energy as the
    code leaves out: a probe of unit signs has the share of one row.
    """
    direction = along / along.norm(dim=0).clamp(min=1e-30)
    scale: float = (len(decoded) / len(across)) ** 0.5
    return torch.addmm(decoded, direction, across, alpha=scale)


class _ProbedHalf(_TwoSidedHalf):
    """What both halves share: ``count`` probes of every matrix after the coefficients, in units of ``unit`` ``[matrices]``."""

    def __init__(self, layout: Layout, selection: Selection, factor_bits: float, count: int, coded: int = 0) -> None:
        super().__init__(layout, selection, factor_bits, coded)
        self.count = count
        self.coefficients = self.format.length
        self.unit = nn.Buffer(torch.ones(sum(not item.plain for item in self.matrices.items)))
        self.format = CodeFormat(self.coefficients + probe_length(self.matrices, count))


class ProbedEncoder(_ProbedHalf, TwoSidedEncoder):
    """Sends, after the coefficients, probes of every matrix."""

    def encode(self, update: Tensor, context: Context, private: Private) -> Tensor:
        """Return coefficients and probes ``[..., code_dim]`` of updates ``[..., dim]``."""
        code = super().encode(update, context, private)
        signs = iter(draw_signs(self.matrices, self.count, context, update.device))
        units = iter(self.unit)
        parts = [code]
        for item, true, coded in zip(self.matrices.items, self.matrices.view(update), self.expand(code), strict=True):
            if not item.plain:
                unit = next(units)
                parts += [each.flatten(-2) / unit for each in probe(true - coded, next(signs))]
        return torch.cat(parts, dim=-1)


class ProbedDecoder(_ProbedHalf, TwoSidedDecoder):
    """Decodes the coefficients, and gives the directions in the probes to the fit of the next codec."""

    def decode(self, mean_code: Tensor, context: Context, state: State) -> Tensor:
        """Return the update ``[..., dim]`` of the coefficients of mean codes ``[..., code_dim]``."""
        return super().decode(mean_code[..., : self.coefficients], context, state)

    def coordinates(self, update: Tensor) -> Tensor:
        """Return the coefficients ``[..., code_dim]`` of updates ``[..., dim]`` and no probes: 0."""
        code = super().coordinates(update)
        return torch.cat([code, code.new_zeros(*code.shape[:-1], self.code_dim - self.coefficients)], dim=-1)

    def norm_bound(self, mean_code: Tensor, context: Context) -> float:
        """Return what the coefficients explain."""
        return super().norm_bound(mean_code[..., : self.coefficients], context)

    def observe(self, mean_code: Tensor, context: Context, aggregate: Tensor) -> Tensor:
        """Return the aggregate ``[dim]`` with, in every matrix, the probes' directions added to the decoded ones."""
        units = iter(self.unit)
        rest = mean_code[self.coefficients :]
        views = []
        for item, view in zip(self.matrices.items, self.matrices.view(aggregate), strict=True):
            if not item.plain:
                sizes = [self.count * item.columns, item.rows * self.count]
                across, along, rest = torch.split(rest, [*sizes, len(rest) - sum(sizes)])
                unit = next(units)
                view = add_probes(view, unit * across.view(self.count, -1), unit * along.view(-1, self.count))
            views.append(view)
        return self.matrices.join(views)
