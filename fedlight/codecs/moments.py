"""What a two-sided codec learns from a bank, one round at a time: bases of the two sides and the energy of every coefficient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlight.codecs.factors import orthonormal
from fedlight.codecs.matrices import Matrices
from fedlight.core.bank import UpdateBank
from fedlight.core.random import torch_generator

LONGEST_DENSE_SIDE = 1024
"""Sides up to this length get their full Gram matrix; longer ones a randomised range finder of a few more columns than wanted."""


@dataclass
class TwoSidedMoments:
    """Bases and energies, for each matrix of a layout.

    Attributes:
        left: orthonormal columns ``[rows, r1]``, most energy first; None for a vector.
        right: orthonormal columns ``[columns, r2]``; None for a vector.
        mean: second moment of the round means' coefficients, ``[rounds, sum r1 * r2]``.
        spread: variance of the clients' coefficients around their round's mean, likewise.
        total: energy of the round means and of the spread in all directions, ``[rounds, 2]``.
    """

    left: list[Tensor | None]
    right: list[Tensor | None]
    grids: list[tuple[int, int]]
    mean: Tensor
    spread: Tensor
    total: Tensor


def round_rows(bank: UpdateBank, cohort: int, relative: bool) -> Iterator[Tensor]:
    """Yield for each round the rows ``[1 + clients, dim]`` whose Gram matrix is the second moment of a mean of ``cohort`` clients.

    The round's mean is the first; the rest are deviations from it over ``sqrt(cohort * clients)``. There are none if ``cohort`` is 0:
    the recorded cohorts' means as they are. ``relative`` divides a round by its size, so that late, small updates matter as much as
    early ones. The bank is read one round after another: it may lie in a file.
    """
    for updates in bank.updates:
        mean = updates.mean(0, keepdim=True)
        rows = torch.cat([mean, (updates - mean) / math.sqrt(cohort * len(updates))]) if cohort else mean
        yield rows / rows.norm().clamp(min=1e-30) if relative else rows


def measure(bank: UpdateBank, matrices: Matrices, cohort: int, rank: int, relative: bool, alternations: int = 1) -> TwoSidedMoments:
    """Return bases of at most ``rank`` columns a side and the energies of the coefficients ``left.T @ G @ right``.

    Starts from the leading eigenvectors of ``sum G G^T`` and ``sum G^T G`` and then alternates: one side's again with the other side
    projected (De Lathauwer et al. 2000, SIAM J. Matrix Anal. 21(4), "higher-order orthogonal iteration", for two modes). Every
    step is one pass over the bank.
    """
    left: list[Tensor | None] = [None] * len(matrices.items)
    right: list[Tensor | None] = [None] * len(matrices.items)
    sides = [k for k, item in enumerate(matrices.items) if not item.plain]
    grams = {k: (_Gram(matrices.items[k].rows, rank, 2 * k), _Gram(matrices.items[k].columns, rank, 2 * k + 1)) for k in sides}
    for _ in range(1 + alternations):
        for rows in round_rows(bank, cohort, relative):
            views = matrices.view(rows)
            for k in sides:
                g, (a, b) = views[k], (left[k], right[k])
                grams[k][0].add(g if b is None else g @ b)
                grams[k][1].add((g if a is None else a.T @ g).transpose(-2, -1))
        for k in sides:
            left[k], right[k] = grams[k][0].basis(), grams[k][1].basis()
    return _energies(bank, matrices, left, right)


def _energies(bank: UpdateBank, matrices: Matrices, left: list[Tensor | None], right: list[Tensor | None]) -> TwoSidedMoments:
    means, spreads, totals = [], [], []
    grids: list[tuple[int, int]] = []
    for updates in bank.updates:
        mean = updates.mean(0, keepdim=True)
        both = [project(matrices, part, left, right) for part in (mean, updates - mean)]
        grids = [(view.shape[-2], view.shape[-1]) for view in both[0]]
        coefficients = [torch.cat([view.flatten(-2) for view in part], dim=-1) for part in both]
        means.append(coefficients[0].square().mean(0))
        spreads.append(coefficients[1].square().mean(0))
        totals.append(torch.stack([mean.square().sum(), (updates - mean).square().sum() / len(updates)]))
    return TwoSidedMoments(left, right, grids, torch.stack(means), torch.stack(spreads), torch.stack(totals))


def project(matrices: Matrices, update: Tensor, left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor]:
    """Return ``left.T @ G @ right`` ``[..., r1, r2]`` a matrix of updates ``[..., dim]``; vectors come back as they are."""
    return [g if a is None or b is None else a.T @ g @ b for g, a, b in zip(matrices.view(update), left, right, strict=True)]


class _Gram:
    """Leading eigenvectors of ``sum_s H_s H_s^T`` for matrices ``H_s`` ``[n, m]`` that come in batches."""

    def __init__(self, n: int, rank: int, stream: int) -> None:
        self.n = n
        self.rank = min(n, rank)
        self.dense = n <= max(LONGEST_DENSE_SIDE, rank)
        width = self.rank if self.dense else min(n, self.rank + 8)
        self.probe = orthonormal(torch.randn(n, width, generator=torch_generator("two-sided probe", stream)))
        self.total = torch.zeros(0)

    def add(self, batch: Tensor) -> None:
        """Add the matrices ``[count, n, m]``."""
        wide = batch.transpose(0, 1).reshape(self.n, -1)
        part = wide @ wide.T if self.dense else wide @ (wide.T @ self.probe)
        self.total = part if not len(self.total) else self.total.add_(part)

    def basis(self) -> Tensor:
        """Return the basis ``[n, rank]`` of what was added and begin anew (a long side from the subspace found so far)."""
        total, self.total = self.total, torch.zeros(0)
        if self.dense:
            leading: Tensor = torch.linalg.eigh(total).eigenvectors.flip(1)[:, : self.rank].contiguous()
            return leading
        inner = self.probe.T @ total  # the sum within the subspace of the probe: its eigenvectors order the new columns
        turn = torch.linalg.eigh((inner + inner.T) / 2).eigenvectors.flip(1)
        self.probe = orthonormal(total @ turn)
        return self.probe[:, : self.rank].contiguous()
