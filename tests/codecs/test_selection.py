from __future__ import annotations

import json
import math
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlight.codecs.factors import factor_bytes
from fedlight.codecs.matrices import Matrices
from fedlight.codecs.moments import TwoSidedMoments, measure
from fedlight.codecs.selection import Selection, select
from fedlight.core.bank import UpdateBank
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout

LAYOUT = Layout(("a.weight", "a.bias", "b.weight", "n"), ((10, 6), (10,), (7, 9), (4,)))
MATRICES = Matrices.of(LAYOUT)
BANK = UpdateBank(torch.randn(8, 4, LAYOUT.dim, generator=torch.Generator().manual_seed(0)), LAYOUT)


@pytest.fixture(scope="module")
def moments() -> TwoSidedMoments:
    return measure(BANK, MATRICES, 10, 6, True)


ranks = st.integers(1, 6)
grids = st.lists(st.one_of(st.tuples(ranks, ranks), st.tuples(ranks, ranks, ranks)), min_size=1, max_size=5)


@given(data=st.data(), grids=grids)
def test_the_code_lists_kept_coefficients_once_and_equal_widths_together(data: st.DataObject, grids: list[tuple[int, ...]]) -> None:
    count = sum(map(math.prod, grids))
    bits = torch.tensor(data.draw(st.lists(st.sampled_from([0, 2, 3, 8]), min_size=count, max_size=count)))
    selection = Selection(tuple(grids), bits)
    assert sorted(selection.order.tolist()) == torch.nonzero(bits).flatten().tolist()
    widths = [width for width, n in selection.runs for _ in range(n)]
    assert bits[selection.order].tolist() == widths == sorted(widths, reverse=True)
    assert len({width for width, _ in selection.runs}) == len(selection.runs)


@given(data=st.data(), grids=grids)
def test_a_plan_is_plain_data_and_comes_back(data: st.DataObject, grids: list[tuple[int, ...]]) -> None:
    count = sum(map(math.prod, grids))
    bits = torch.tensor(data.draw(st.lists(st.integers(0, 8), min_size=count, max_size=count)))
    again = Selection.from_plan(json.loads(json.dumps(Selection(tuple(grids), bits).to_plan())))
    assert again.grids == tuple(grids) and torch.equal(again.bits, bits)


def test_a_sparse_plan_is_small() -> None:
    bits = torch.zeros(128 * 128, dtype=torch.long)
    bits[:300] = 2
    assert len(json.dumps(Selection(((128, 128),), bits).to_plan())) < 150


@given(count=st.integers(1, LAYOUT.dim), bits=st.integers(1, 8))
def test_before_there_is_a_bank_every_matrix_gets_its_share(count: int, bits: int) -> None:
    selection = Selection.unfitted(MATRICES, count, bits)
    parts = torch.split(selection.bits, [a * b for a, b in selection.grids])
    for part, item, (r1, r2) in zip(parts, MATRICES.items, selection.grids, strict=True):
        assert r1 <= item.rows and r2 <= item.columns
        share = count * item.rows * item.columns / LAYOUT.dim
        assert abs(int((part > 0).sum()) - share) <= len(MATRICES.items) + 1
    assert set(selection.bits.tolist()) <= {0, bits}
    assert int((selection.bits > 0).sum()) <= count + len(MATRICES.items)  # one a matrix there is at least


def most_energy(moments: TwoSidedMoments, count: int):
    energy = moments.mean.mean(0)

    def choose(allowed: Tensor) -> tuple[Tensor, Tensor]:
        offered = torch.where(allowed, energy, torch.zeros(()))
        bits = torch.zeros(len(energy), dtype=torch.long)
        bits[offered.topk(min(count, len(offered))).indices] = 2
        bits[offered == 0] = 0
        return bits, offered * (bits > 0)

    return choose


def test_with_room_for_all_factors_it_is_what_would_be_chosen_freely(moments: TwoSidedMoments) -> None:
    choose = most_energy(moments, 40)
    selection, factors, worth = select(moments, MATRICES, choose, 8, 10**6)
    assert [len(saved) for saved in worth] == [factor.shape[1] for factor in factors]
    assert sum(float(saved.sum()) for saved in worth[::2]) == pytest.approx(sum(float(saved.sum()) for saved in worth[1::2]))
    bits, _ = choose(torch.ones(moments.mean.shape[1], dtype=torch.bool))
    assert int((selection.bits > 0).sum()) == int((bits > 0).sum()) == 40
    assert [tuple(factor.shape) for factor in factors] == selection.factor_shapes(MATRICES)
    for half, basis in zip(factors, chain(*moments.bases), strict=True):
        torch.testing.assert_close(half.T @ half, torch.eye(half.shape[1]), rtol=0, atol=1e-5)
        assert all((column[:, None] == basis).all(0).any() for column in half.T)


@given(most=st.integers(30, 300), count=st.integers(1, 100))
def test_factors_never_weigh_more_than_they_may(most: int, count: int) -> None:
    moments = measure(BANK, MATRICES, 10, 6, True)
    selection, factors, _ = select(moments, MATRICES, most_energy(moments, count), 8, most)
    assert factor_bytes(selection.factor_shapes(MATRICES), 8) <= most
    assert [tuple(factor.shape) for factor in factors] == selection.factor_shapes(MATRICES)
    # Every row and column that is downloaded is used.
    for part, grid, item in zip(
        torch.split(selection.bits, [a * b for a, b in selection.grids]), selection.grids, MATRICES.items, strict=True
    ):
        if not item.plain and len(part):
            assert (part.view(grid) > 0).any(0).all() and (part.view(grid) > 0).any(1).all()


def test_what_is_cut_from_factors_is_spent_on_other_coefficients(moments: TwoSidedMoments) -> None:
    free, *_ = select(moments, MATRICES, most_energy(moments, 15), 8, 10**6)
    tight, *_ = select(moments, MATRICES, most_energy(moments, 15), 8, 100)
    assert int((free.bits > 0).sum()) == int((tight.bits > 0).sum()) == 15
    assert factor_bytes(free.factor_shapes(MATRICES), 8) > 100


def test_an_encoder_too_small_for_a_column_a_side_is_refused(moments: TwoSidedMoments) -> None:
    with pytest.raises(ConfigurationError, match="at least one column a side but its budget is 5 bytes: raise `encoder_share`"):
        select(moments, MATRICES, most_energy(moments, 30), 8, 5)


def test_a_bank_without_energy_is_refused() -> None:
    moments = measure(UpdateBank(torch.zeros(3, 2, LAYOUT.dim), LAYOUT), MATRICES, 10, 6, True)
    with pytest.raises(ConfigurationError, match="all are zero: raise the client learning rate"):
        select(moments, MATRICES, most_energy(moments, 30), 8, 10**6)


def test_vectors_alone_need_no_factors() -> None:
    layout = Layout(("n",), ((6,),))
    matrices = Matrices.of(layout)
    moments = measure(UpdateBank(torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0)), layout), matrices, 10, 4, True)
    selection, factors, _ = select(moments, matrices, most_energy(moments, 3), 8, 1)
    assert factors == [] and int((selection.bits > 0).sum()) == 3
