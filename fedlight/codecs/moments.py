"""What a two-sided codec learns from a bank, one round at a time: bases of the two sides and the energy of every coefficient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlight.codecs.matrices import Matrices, contract, project
from fedlight.core.bank import UpdateBank
from fedlight.core.linalg import eigen, orthonormal
from fedlight.core.random import torch_generator

LONGEST_DENSE_SIDE = 1024
"""Sides up to this length get their full Gram matrix; longer ones a randomized range finder with a few extra columns."""


@dataclass
class TwoSidedMoments:
    """Bases and energies, for each matrix of a layout.

    Attributes:
        bases: orthonormal columns ``[n, r]``, most energy first, of every side; none for a vector.
        grids: numbers of columns (r1, r2, ..), (1, columns) for a vector.
        mean: second moment of the round means' coefficients, ``[rounds, sum of r1 * r2 ..]``.
        spread: variance of the clients' coefficients around their round's mean, likewise.
        total: energy of the round means and of the spread in all directions, ``[rounds, 2]``.
        clients: mean energy of a client's matrix in all directions, ``[rounds, matrices]``.
    """

    bases: list[tuple[Tensor, ...]]
    grids: list[tuple[int, ...]]
    mean: Tensor
    spread: Tensor
    total: Tensor
    clients: Tensor


def round_rows(bank: UpdateBank, cohort: int, relative: bool) -> Iterator[Tensor]:
    """Yield for each round the rows ``[clients, dim]`` whose Gram matrix is the second moment of a mean of ``cohort`` clients.

    That is ``m m^T`` plus the clients' scatter around their mean ``m`` over ``cohort``: the rows are the clients moved toward it,
    ``(m + (u_i - m) / sqrt(cohort)) / sqrt(clients)``, because deviations sum to zero. If ``cohort`` is 0 the mean is the only row: the
    recorded cohorts as they are. ``relative`` divides a round by its size, so that late, small updates matter as much as early ones.
    It reads one round of the bank at a time, which may be in a file.
    """
    for updates in bank:
        mean = updates.mean(0, keepdim=True)
        rows = torch.lerp(mean, updates, cohort**-0.5) if cohort else mean
        yield rows.mul_(1 / rows.norm().clamp(min=1e-30) if relative else len(rows) ** -0.5)


def measure(bank: UpdateBank, matrices: Matrices, cohort: int, rank: int, relative: bool, alternations: int = 1) -> TwoSidedMoments:
    """Return bases of at most ``rank`` columns per side and the energies of the coefficients ``left.T @ G @ right``.

    Starts from the leading eigenvectors of ``sum G G^T`` and ``sum G^T G`` and then alternates: one side's again with the others
    projected (De Lathauwer et al. 2000, SIAM J. Matrix Anal. 21(4), "higher-order orthogonal iteration"). Every step is one pass over
    the bank.
    """
    bases: list[tuple[Tensor, ...]] = [() for _ in matrices.items]
    grams: dict[int, list[_Gram]] = {}
    for k, item in enumerate(matrices.items):
        if not item.plain:
            grams[k] = [_Gram(n, rank, len(item.sides) * k + side) for side, n in enumerate(item.sides)]
    for _ in range(1 + alternations):
        for rows in round_rows(bank, cohort, relative):
            for row in rows:  # one at a time: several would need a copy to be contiguous
                views = matrices.view(row)
                for k, gram in grams.items():
                    tensor = views[k].reshape(matrices.items[k].shape)
                    for side, each in enumerate(gram):
                        each.add(_unfold(tensor, bases[k], side))
        for k, gram in grams.items():
            bases[k] = tuple(each.basis() for each in gram)
    return _energies(bank, matrices, bases)


def _unfold(tensor: Tensor, bases: tuple[Tensor, ...], side: int) -> Tensor:
    """Return a tensor as a matrix ``[n, others]`` of one side, with the other sides projected on their bases, if known."""
    for other, basis in enumerate(bases):
        # A basis of all directions is a rotation, which keeps Gram matrices of the other side.
        if other != side and basis.shape[0] != basis.shape[1]:
            tensor = contract(tensor, basis, other - len(bases))
    return tensor.movedim(side, 0).flatten(1)


def _energies(bank: UpdateBank, matrices: Matrices, bases: list[tuple[Tensor, ...]]) -> TwoSidedMoments:
    means, spreads, totals, sizes = [], [], [], []
    grids = [tuple(basis.shape[1] for basis in each) or item.shape for each, item in zip(bases, matrices.items, strict=True)]
    for updates in bank:
        coefficients = torch.stack([project(matrices, update, bases) for update in updates])
        sizes.append(torch.stack([view.square().sum((-2, -1)).mean() for view in matrices.view(updates)]))
        mean = coefficients.mean(0)
        means.append(mean.square())
        spreads.append((coefficients - mean).square().mean(0))
        energy, between = updates.norm().square() / len(updates), updates.mean(0).norm().square()
        totals.append(torch.stack([between, (energy - between).clamp(min=0)]))
    return TwoSidedMoments(bases, grids, torch.stack(means), torch.stack(spreads), torch.stack(totals), torch.stack(sizes))


class _Gram:
    """Leading eigenvectors of ``sum_s H_s H_s^T`` for matrices ``H_s`` ``[n, m]`` that arrive one by one."""

    def __init__(self, n: int, rank: int, stream: int) -> None:
        self.n = n
        self.rank = min(n, rank)
        self.dense = n <= max(LONGEST_DENSE_SIDE, rank)
        width = self.rank if self.dense else min(n, self.rank + 8)
        self.probe = orthonormal(torch.randn(n, width, generator=torch_generator("two-sided probe", stream)))
        self.total = torch.zeros(0)

    def add(self, matrix: Tensor) -> None:
        """Add a matrix ``[n, m]``."""
        other = matrix.T if self.dense else matrix.T @ self.probe
        self.total = self.total.addmm_(matrix, other) if len(self.total) else matrix @ other

    def basis(self) -> Tensor:
        """Return the basis ``[n, rank]`` of the added matrices and reset (a long side to the subspace found so far)."""
        total, self.total = self.total, torch.zeros(0)
        if self.dense:
            return eigen(total)[1][:, : self.rank].contiguous()
        inner = self.probe.T @ total  # the sum within the subspace of the probe: its eigenvectors order the new columns
        _, turn = eigen((inner + inner.T) / 2)
        self.probe = orthonormal(total @ turn)
        return self.probe[:, : self.rank].contiguous()
