from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlight.codecs.blocks import Blocks, Group, cohort_rows, cut_flat, cut_rows, plan_blocks, principal, share_code
from fedlight.core.bank import UpdateBank
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import Layout

shapes = st.lists(st.lists(st.integers(1, 5), max_size=4).map(tuple), min_size=1, max_size=5).map(tuple)


def layout_of(shapes: tuple[tuple[int, ...], ...]) -> Layout:
    return Layout(tuple(f"p{i}" for i in range(len(shapes))), shapes)


@given(shapes, st.integers(1, 40), st.booleans(), st.lists(st.integers(1, 3), max_size=2))
def test_join_undoes_cut(shapes: tuple[tuple[int, ...], ...], block_size: int, rows: bool, lead: list[int]) -> None:
    layout = layout_of(shapes)
    blocks = Blocks(layout, tuple((cut_rows if rows else cut_flat)(layout, block_size)))
    update = torch.randn(*lead, layout.dim)
    cut = blocks.cut(update)
    assert [tuple(part.shape) for part in cut] == [(*lead, group.count, group.length) for group in blocks.groups]
    assert torch.equal(blocks.join(cut), update)


@given(shapes, st.integers(1, 40))
def test_blocks_respect_the_size_and_cover_every_tensor_once(shapes: tuple[tuple[int, ...], ...], block_size: int) -> None:
    layout = layout_of(shapes)
    for cut in (cut_rows, cut_flat):
        groups = cut(layout, block_size)
        assert sorted(i for group in groups for i in group.tensors) == list(range(len(shapes)))
        for group in groups:
            size = sum(layout.sizes[i] for i in group.tensors)
            assert group.length <= block_size and size <= group.count * group.length < size + group.count * group.length
            assert (group.count - 1) * group.length < size and group.length <= size  # no block is padding alone


def test_row_blocks_hold_whole_rows_where_they_fit() -> None:
    layout = Layout(("w", "long", "b", "c"), ((7, 5), (2, 40), (3,), (4,)))
    assert cut_rows(layout, 16) == [Group((0,), 15, 3), Group((1,), 10, 8), Group((2, 3), 7, 1)]


@given(shapes, st.integers(1, 12), st.data())
def test_split_code_undoes_the_encoders_order(shapes: tuple[tuple[int, ...], ...], block_size: int, data: st.DataObject) -> None:
    layout = layout_of(shapes)
    cut = cut_rows(layout, block_size)
    groups = tuple(Group(g.tensors, g.length, g.count, data.draw(st.integers(1, g.length))) for g in cut)
    blocks = Blocks(layout, groups)
    parts = [torch.randn(2, g.count, g.code) for g in groups]
    code = torch.cat([part.flatten(1) for part in parts], dim=-1)
    assert code.shape == (2, blocks.code_dim)
    assert all(torch.equal(a, b) for a, b in zip(blocks.split_code(code), parts, strict=True))


@given(shapes, st.integers(1, 12))
def test_a_plan_is_plain_data_that_comes_back(shapes: tuple[tuple[int, ...], ...], block_size: int) -> None:
    layout = layout_of(shapes)
    blocks = Blocks(layout, tuple(replace(group, code=min(group.length, 1)) for group in cut_rows(layout, block_size)))
    assert Blocks.from_plan(layout, blocks.to_plan()) == blocks


def energies_of(groups: list[Group], data: st.DataObject) -> list[torch.Tensor]:
    return [torch.tensor(sorted(data.draw(st.lists(st.floats(0, 9), min_size=g.length, max_size=g.length)), reverse=True)) for g in groups]


single = st.lists(st.integers(1, 6).map(lambda length: Group((0,), length, 1)), min_size=1, max_size=5)


@given(single, st.data())
def test_share_code_spends_the_exact_budget_on_single_blocks(groups: list[Group], data: st.DataObject) -> None:
    budget = data.draw(st.integers(len(groups), sum(g.length for g in groups)))
    shared = share_code(groups, energies_of(groups, data), budget)
    assert sum(g.code for g in shared) == budget and all(1 <= g.code <= g.length for g in shared)


several = st.lists(
    st.builds(lambda length, count: Group((0,), length, count), st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=5
)


@given(several, st.data())
def test_share_code_leaves_over_less_than_any_group_could_use(groups: list[Group], data: st.DataObject) -> None:
    budget = data.draw(st.integers(sum(g.count for g in groups), sum(g.count * g.length for g in groups) + 3))
    shared = share_code(groups, energies_of(groups, data), budget)
    left = budget - sum(g.count * g.code for g in shared)
    assert left >= 0 and all(1 <= g.code <= g.length for g in shared)
    assert all(left < g.count for g in shared if g.code < g.length)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3), st.data())
def test_share_code_keeps_the_most_energy_for_equal_counts(lengths: list[int], count: int, data: st.DataObject) -> None:
    groups = [Group((0,), length, count) for length in lengths]
    energies = energies_of(groups, data)
    budget = data.draw(st.integers(len(groups) * count, sum(lengths) * count))
    kept = sum(float(e[: g.code].double().sum()) for g, e in zip(share_code(groups, energies, budget), energies, strict=True))
    choices = [codes for codes in product(*(range(1, length + 1) for length in lengths)) if sum(codes) * count <= budget]
    best = max(sum(float(e[:code].double().sum()) for code, e in zip(codes, energies, strict=True)) for codes in choices)
    assert kept == pytest.approx(best)


def test_share_code_passes_over_a_group_that_the_rest_does_not_pay_for() -> None:
    loud, quiet = Group((0,), 4, 3), Group((1,), 4, 1)
    assert [g.code for g in share_code([loud, quiet], [torch.full((4,), 9.0), torch.full((4,), 0.1)], 9)] == [2, 3]


def test_share_code_refuses_less_than_one_a_block() -> None:
    with pytest.raises(ConfigurationError, match="at least 5 numbers .* budget is 4"):
        share_code([Group((0,), 6, 2), Group((1,), 6, 3)], [torch.ones(6)] * 2, 4)


def test_cohort_rows_have_the_second_moment_of_random_cohorts_means() -> None:
    generator = torch.Generator().manual_seed(0)
    bank = UpdateBank(1 + torch.randn(3, 6, 4, generator=generator), Layout.vector(4))
    rows = cohort_rows(bank, 5).double()
    picks = torch.randint(6, (3, 100_000, 5), generator=generator)
    means = torch.stack([updates[pick].double().mean(1) for updates, pick in zip(bank.updates, picks, strict=True)])
    expected = torch.einsum("rni,rnj->ij", means, means) / 100_000
    torch.testing.assert_close(rows.T @ rows, expected, atol=0.02, rtol=0.01)


def test_cohort_rows_of_cohort_0_are_the_recorded_means() -> None:
    bank = UpdateBank(torch.randn(3, 6, 4), Layout.vector(4))
    assert torch.equal(cohort_rows(bank, 0), bank.updates.mean(1))


@pytest.mark.parametrize("rows", [5, 9, 40])
def test_principal_values_are_sorted_squared_singular_values_with_orthonormal_directions(rows: int) -> None:
    blocks = torch.randn(rows, 1, 9, generator=torch.Generator().manual_seed(0))
    energy, basis = principal(blocks)
    torch.testing.assert_close(energy, torch.linalg.svdvals(blocks[:, 0]).square(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(min(rows, 9)), atol=1e-5, rtol=0)
    torch.testing.assert_close((blocks[:, 0] @ basis).square().sum(0), energy, rtol=1e-3, atol=1e-3)


def test_the_plan_gives_more_code_where_there_is_more_energy() -> None:
    layout = Layout(("loud", "quiet"), ((4, 8), (4, 8)))
    updates = torch.randn(10, 3, 64, generator=torch.Generator().manual_seed(0))
    updates[..., 32:] *= 1e-3
    groups = Blocks.from_plan(layout, plan_blocks(layout, UpdateBank(updates, layout), 4, "rows", 8, 0)).groups
    assert [(g.count, g.code) for g in groups] == [(4, 3), (4, 1)]
    even = Blocks.from_plan(layout, plan_blocks(layout, None, 4, "rows", 8, 0)).groups
    assert [g.code for g in even] == [2, 2]


@given(st.floats(1, 8))
def test_the_plans_budget_is_the_update_over_the_ratio(ratio: float) -> None:
    layout = Layout(("b",), ((64,),))
    groups = Blocks.from_plan(layout, plan_blocks(layout, None, ratio, "flat", 64, 0)).groups
    assert groups[0].code == math.floor(64 / ratio)
