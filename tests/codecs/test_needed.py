from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.codecs.matrices import Matrices
from fedlight.codecs.moments import project
from fedlight.codecs.needed import BLOCK, Corner, Needed
from fedlight.core.layout import Layout

# A convolution, and a linear layer that reads its feature map: 4 channels of 300 positions, a matrix of three sides.
LAYOUT = Layout(("conv.weight", "conv.bias", "fc.weight", "fc.bias"), ((4, 3, 3, 3), (4,), (16, 1200), (16,)))
MATRICES = Matrices.of(LAYOUT)
GRIDS = ((4, 20), (14, 4, 70), (1, 16))


def orthonormal(n: int, r: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, r, generator=torch.Generator().manual_seed(n + r))).Q


BASES = [tuple(orthonormal(n, r) for n, r in zip(item.sides, grid, strict=False)) for item, grid in zip(MATRICES.items, GRIDS, strict=True)]
SIZE = sum(map(math.prod, GRIDS))


@given(seed=st.integers(0, 10**6), count=st.integers(1, SIZE), crowd=st.sampled_from([1.0, 4.0, 16.0]))
def test_needed_coefficients_are_those_of_the_whole_grids(seed: int, count: int, crowd: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(SIZE, generator=generator)[:count]
    order = (order.double() / SIZE).pow(crowd).mul(SIZE).long().unique()  # towards small indices, as real codes do
    order = order[torch.randperm(len(order), generator=generator)]
    updates = torch.randn(2, LAYOUT.dim, generator=generator)
    needed = Needed(MATRICES, GRIDS, order)
    whole = project(MATRICES, updates, BASES).index_select(-1, order)
    torch.testing.assert_close(needed.coefficients(updates, BASES).index_select(-1, needed.places), whole, rtol=1e-4, atol=1e-5)


def test_what_no_coefficient_needs_is_not_computed() -> None:
    kept = torch.zeros(GRIDS[1], dtype=torch.bool)
    kept[:3, 1, :BLOCK] = True
    kept[0, 3, BLOCK + 1] = True  # and nothing in the third block
    order = torch.nonzero(kept.flatten()).flatten() + math.prod(GRIDS[0])
    needed = Needed(MATRICES, GRIDS, order)
    assert needed.corners[1] == [Corner(0, (3, 2, BLOCK)), Corner(BLOCK, (1, 4, BLOCK))]
    assert needed.corners[0] == [Corner(0, GRIDS[0])] and needed.corners[2] == [Corner(0, GRIDS[2])]


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_updates_of_any_number_of_leading_sides(lead: tuple[int, ...]) -> None:
    needed = Needed(MATRICES, GRIDS, torch.tensor([0, 100, 500, SIZE - 1]))
    found = needed.coefficients(torch.ones(*lead, LAYOUT.dim), BASES)
    assert found.shape[:-1] == lead and int(needed.places.max()) < found.shape[-1]
