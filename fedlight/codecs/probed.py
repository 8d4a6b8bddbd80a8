"""Two-sided encoder and decoder whose codes also contain probes of what they leave out."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlight.codecs.probes import add_probes, draw_signs, probe, probe_length
from fedlight.codecs.selection import Selection
from fedlight.codecs.two_sided import TwoSidedDecoder, TwoSidedEncoder
from fedlight.core.codec import Context, Private, State
from fedlight.core.layout import Layout
from fedlight.core.wire import CodeFormat


class ProbedEncoder(TwoSidedEncoder):
    """Sends, after the coefficients, probes of every matrix in units of ``unit`` ``[matrices]``."""

    unit: Tensor

    def __init__(self, layout: Layout, selection: Selection, factor_bits: float, count: int, coded: int = 0) -> None:
        super().__init__(layout, selection, factor_bits, coded)
        self.count = count
        self.register_buffer("unit", torch.ones(sum(not item.plain for item in self.matrices.items)))
        self.format = CodeFormat(self.format.length + probe_length(self.matrices, count))

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


class ProbedDecoder(TwoSidedDecoder):
    """Decodes the coefficients, and gives the directions in the probes to the fit of the next codec."""

    unit: Tensor

    def __init__(self, layout: Layout, selection: Selection, factor_bits: float, count: int, coded: int = 0) -> None:
        super().__init__(layout, selection, factor_bits, coded)
        self.count = count
        self.coefficients = self.format.length
        self.register_buffer("unit", torch.ones(sum(not item.plain for item in self.matrices.items)))
        self.format = CodeFormat(self.coefficients + probe_length(self.matrices, count))

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
