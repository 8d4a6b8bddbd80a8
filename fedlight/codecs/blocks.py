"""Cuts an update into blocks that share one small encoder, and distributes a code budget over groups of blocks."""

from __future__ import annotations

import heapq
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedlight.core.bank import UpdateBank
from fedlight.core.errors import CodecMismatchError, ConfigurationError
from fedlight.core.layout import Layout
from fedlight.core.linalg import eigen, svd


@dataclass(frozen=True)
class Group:
    """Blocks that share one encoder: ``count`` blocks of ``length`` numbers from some tensors, each with a code of ``code`` numbers."""

    tensors: tuple[int, ...]
    length: int
    count: int
    code: int = 0


@dataclass(frozen=True)
class Blocks:
    """A partition of a layout's updates into groups of equal blocks ``[..., count, length]``, zero-padded at the end."""

    layout: Layout
    groups: tuple[Group, ...]

    @property
    def code_dim(self) -> int:
        """Total length of all blocks' codes."""
        return sum(group.count * group.code for group in self.groups)

    def cut(self, update: Tensor) -> list[Tensor]:
        """Return one tensor ``[..., count, length]`` per group, from updates ``[..., dim]``."""
        tensors = torch.split(update, list(self.layout.sizes), dim=-1)
        cut = []
        for group in self.groups:
            flat = torch.cat([tensors[i] for i in group.tensors], dim=-1)
            padded = F.pad(flat, (0, group.count * group.length - flat.shape[-1]))
            cut.append(padded.reshape(*padded.shape[:-1], group.count, group.length))
        return cut

    def join(self, blocks: list[Tensor]) -> Tensor:
        """Return the updates ``[..., dim]``: the inverse of ``cut``."""
        tensors: dict[int, Tensor] = {}
        for group, block in zip(self.groups, blocks, strict=True):
            sizes = [self.layout.sizes[i] for i in group.tensors]
            flat = block.flatten(-2)[..., : sum(sizes)]
            tensors.update(zip(group.tensors, torch.split(flat, sizes, dim=-1), strict=True))
        return torch.cat([tensors[i] for i in range(len(tensors))], dim=-1)

    def split_code(self, code: Tensor) -> list[Tensor]:
        """View codes ``[..., code_dim]`` as one tensor ``[..., count, code]`` per group."""
        parts = torch.split(code, [group.count * group.code for group in self.groups], dim=-1)
        return [part.reshape(*code.shape[:-1], g.count, g.code) for part, g in zip(parts, self.groups, strict=True)]

    def to_plan(self) -> dict[str, Any]:
        """Return the groups as plain data."""
        return {"groups": [asdict(group) | {"tensors": list(group.tensors)} for group in self.groups]}

    @classmethod
    def from_plan(cls, layout: Layout, plan: dict[str, Any]) -> Blocks:
        """Return the blocks that ``to_plan`` described.

        Raises:
            CodecMismatchError: if they do not cut up this layout, every tensor once.
        """
        groups = tuple(Group(**(item | {"tensors": tuple(item["tensors"])})) for item in plan["groups"])
        if sorted(index for group in groups for index in group.tensors) != list(range(len(layout.sizes))):
            raise CodecMismatchError(f"Expected groups that take each of {len(layout.sizes)} tensors once but they take others")
        for group in groups:
            size = sum(layout.sizes[index] for index in group.tensors)
            if not (0 <= group.count * group.length - size < max(group.length, 1) and min(group.length, 1) <= group.code <= group.length):
                raise CodecMismatchError(
                    f"Expected blocks that hold {size:,} numbers, each with a code of one number or more and no longer than it is, but got "
                    f"{group.count:,} of {group.length:,} numbers and codes of {group.code:,}"
                )
        return cls(layout, groups)


def cut_rows(layout: Layout, block_size: int) -> list[Group]:
    """Return groups aligned with the rows of weight matrices ``[out, in]``, one group per tensor; all vectors form one group.

    A block is as many whole rows as fit ``block_size``, or an equal part of a row that is longer. Rows of one tensor share their
    input features, so one encoder can compress them. Smaller blocks, down to half the size, avoid padding if they divide the tensor:
    principal directions treat padding as data, so that a trained linear code could beat them.
    """
    groups, vectors = [], []
    for index, shape in enumerate(layout.shapes):
        if len(shape) < 2:
            vectors.append(index)
            continue
        rows, row = shape[0], layout.sizes[index] // shape[0]
        if row <= block_size:
            per_block = _divisor(rows, min(rows, max(1, block_size // row)))
            groups.append(Group((index,), per_block * row, math.ceil(rows / per_block)))
        else:
            length = _divisor(row, math.ceil(row / math.ceil(row / block_size)))
            groups.append(Group((index,), length, math.ceil(rows * row / length)))
    if vectors:
        groups.append(_even(tuple(vectors), sum(layout.sizes[i] for i in vectors), block_size))
    return groups


def cut_flat(layout: Layout, block_size: int) -> list[Group]:
    """Return the single group of equal blocks of the flat update; blocks may cross tensors."""
    return [_even(tuple(range(len(layout.shapes))), layout.dim, block_size)]


def _divisor(number: int, most: int) -> int:
    """Return the largest divisor of ``number`` in ``[most / 2, most]``, or ``most`` if there is none."""
    return next((d for d in range(most, (most - 1) // 2, -1) if number % d == 0), most)


def _even(tensors: tuple[int, ...], size: int, block_size: int) -> Group:
    count = math.ceil(size / block_size)
    return Group(tensors, math.ceil(size / count), count)


def share_code(groups: list[Group], energies: list[Tensor], budget: int) -> tuple[Group, ...]:
    """Return the groups with code lengths that spend ``budget`` numbers on the most energy.

    ``energies`` holds, per group, the non-increasing energy ``[length]`` that each further number of a block's code adds over
    all blocks (the principal values). Greedy, therefore optimal for sorted energies and equal costs. Every group keeps at
    least one number, so that every tensor is trained.

    Raises:
        ConfigurationError: if the budget is smaller than one number per block.
    """
    codes = [1] * len(groups)
    left = budget - sum(group.count for group in groups)
    if left < 0:
        raise ConfigurationError(
            f"Expected a code of at least {sum(g.count for g in groups):,} numbers (one per block) but the budget is {budget:,}: "
            "choose a smaller `ratio` or a larger `block_size`"
        )
    heap = [(-float(energy[1]) / g.count, i) for i, (g, energy) in enumerate(zip(groups, energies, strict=True)) if g.length > 1]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        group = groups[i]
        if group.count > left:
            continue
        codes[i] += 1
        left -= group.count
        if codes[i] < group.length:
            heapq.heappush(heap, (-float(energies[i][codes[i]]) / group.count, i))
    return tuple(Group(g.tensors, g.length, g.count, code) for g, code in zip(groups, codes, strict=True))


def cohort_rows(bank: UpdateBank, cohort: int) -> Tensor:
    """Return rows ``[rounds * (1 + clients), dim]`` with the Gram matrix of the means of ``cohort`` random clients of a round.

    The second moment of such a mean is that of the round mean plus 1/cohort of the spread within the round; ``cohort`` 0 leaves the
    spread out (the recorded cohorts themselves).
    """
    updates = bank.updates
    means = updates.mean(1)
    if not cohort:
        return means
    deviations = (updates - means[:, None]) / math.sqrt(cohort * bank.clients)
    return torch.cat([means, deviations.flatten(0, 1)])


def principal(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return (energies ``[length]``, basis ``[length, length]``) of blocks ``[rows, count, length]``, largest energy first.

    With fewer rows than numbers it uses a thin SVD instead, and the basis has fewer columns.
    """
    rows = blocks.flatten(0, -2)
    if len(rows) < rows.shape[1]:
        _, values, vectors = svd(rows)
        return values.square(), vectors.T
    values, vectors = eigen(rows.T @ rows)
    return values.clamp(min=0), vectors


def plan_blocks(
    layout: Layout, bank: UpdateBank | None, ratio: float, blocks: Literal["rows", "flat"], block_size: int, cohort: int
) -> dict[str, Any]:
    """Return the plan of blocks whose code is ``ratio`` times shorter than the update, distributed by energy, or evenly without a bank.

    Raises:
        ConfigurationError: if the code would be shorter than one number per block.
    """
    size = block_size or layout.dim
    groups = cut_rows(layout, size) if blocks == "rows" else cut_flat(layout, size)
    if bank is None:
        # Each further number of a block's code counts a little less, which fills all groups to the same share.
        energies = [group.count * (1 - torch.arange(group.length) / group.length) for group in groups]
    else:
        cut = Blocks(layout, tuple(groups)).cut(cohort_rows(bank, cohort))
        energies = [F.pad(e, (0, max(0, g.length - len(e)))) for g, (e, _) in zip(groups, map(principal, cut), strict=True)]
    return Blocks(layout, share_code(groups, energies, int(layout.dim / ratio))).to_plan()


def principal_bases(bank: UpdateBank, blocks: Blocks, cohort: int) -> list[Tensor]:
    """Return one basis ``[length, code]`` per group: the principal directions of the bank's cohort means.

    If the bank has fewer independent blocks than the code has numbers, the remaining columns are zero.
    """
    bases = [principal(block)[1] for block in blocks.cut(cohort_rows(bank, cohort))]
    return [F.pad(basis[:, : g.code], (0, max(0, g.code - basis.shape[1]))) for basis, g in zip(bases, blocks.groups, strict=True)]
