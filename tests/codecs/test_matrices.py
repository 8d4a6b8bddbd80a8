from __future__ import annotations

import math
from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedlight.codecs import matrices
from fedlight.codecs.matrices import Matrices, Matrix, turn, turn_back
from fedlight.core.layout import Layout, flatten
from fedlight.modules import LeNet5

shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(1, 6)),
    st.tuples(st.integers(1, 6), st.integers(1, 5)),
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)
layouts = st.lists(st.tuples(st.sampled_from("ab"), shapes), min_size=1, max_size=7).map(
    lambda items: Layout(tuple(f"{owner}.{i}" for i, (owner, _) in enumerate(items)), tuple(shape for _, shape in items))
)


@given(layout=layouts, lead=st.sampled_from([(), (3,), (2, 3)]))
def test_join_is_the_inverse_of_view_and_both_keep_every_entry(layout: Layout, lead: tuple[int, ...]) -> None:
    found = Matrices.of(layout)
    update = torch.arange(math.prod(lead) * layout.dim, dtype=torch.float32).reshape(*lead, layout.dim)
    views = found.view(update)
    assert [view.shape for view in views] == [(*lead, item.rows, item.columns) for item in found.items]
    assert sum(item.rows * item.columns for item in found.items) == layout.dim
    assert torch.equal(found.join(views), update)
    assert [index for item in found.items for index in item.tensors] == list(range(len(layout.shapes)))


@given(layout=layouts)
def test_only_a_vector_of_the_same_owner_with_an_entry_a_row_becomes_a_column(layout: Layout) -> None:
    for item in Matrices.of(layout).items:
        first, *rest = item.tensors
        assert len(rest) <= 1
        for bias in rest:
            assert layout.names[bias].split(".")[0] == layout.names[first].split(".")[0] and layout.shapes[bias] == (item.rows,)


def test_a_row_of_a_matrix_is_what_makes_one_output() -> None:
    """[weights into the unit, its bias] for a linear layer; the same for a channel of a convolution."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Conv2d(1, 2, 2))
    dense, convolution = Matrices.of(Layout.of(model)).view(flatten(model.parameters()))
    linear, conv = model[0], model[1]
    assert torch.equal(dense, torch.cat([linear.weight, linear.bias[:, None]], 1))
    assert torch.equal(convolution, torch.cat([conv.weight.flatten(1), conv.bias[:, None]], 1))


@pytest.mark.parametrize(
    ("names", "shapes", "tensors"),
    [
        (("a.weight", "a.bias"), ((4, 3), (4,)), [(0, 1)]),
        (("a.weight", "b.bias"), ((4, 3), (4,)), [(0,), (1,)]),  # another layer's
        (("a.weight", "a.bias"), ((4, 3), (3,)), [(0,), (1,)]),  # an entry a column
        (("a.bias", "a.weight"), ((4,), (4, 3)), [(0,), (1,)]),  # before it
        (("a.weight", "a.bias"), ((1, 3), (1,)), [(0,), (1,)]),  # one row: a vector
        (("a.weight", "a.bias", "a.more"), ((4, 3), (4,), (4,)), [(0, 1), (2,)]),
        (("0", "1"), ((4, 3), (4,)), [(0, 1)]),
    ],
)
def test_which_tensors_lie_together(names, shapes, tensors) -> None:
    assert [item.tensors for item in Matrices.of(Layout(names, shapes)).items] == tensors


def test_norm_layers_and_scalars_stay_plain_vectors() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.LayerNorm(2), nn.PReLU())
    items = Matrices.of(Layout.of(model)).items
    assert [item.plain for item in items] == [False, True, True, False, True, True, True]
    assert items[1] == Matrix((1,), 1, 4) and items[-1] == Matrix((7,), 1, 1)


def test_lenet_is_five_matrices() -> None:
    items = Matrices.of(Layout.of(LeNet5())).items
    assert len(items) == 5 and all(len(item.tensors) == 2 and not item.plain for item in items)


@pytest.mark.parametrize(
    ("names", "shapes", "parts"),
    [
        (("conv", "fc.weight", "fc.bias"), ((4, 1, 3, 3), (5, 24), (5,)), [(), (4, 6), ()]),  # channels of a flattened map
        (("conv", "fc.weight"), ((5, 1, 3, 3), (5, 24)), [(), ()]),  # not so many channels
        (("fc.weight",), ((5, 24),), [()]),  # the first layer
        (("a.weight", "b.weight"), ((24, 3), (5, 24)), [(), ()]),  # a row reads the outputs before, nothing is flattened
        (("one", "conv"), ((6, 1, 3, 3), (4, 6, 2, 2)), [(), ()]),  # a convolution's rows stay as they are
        (("conv", "fc.weight"), ((4, 1, 3, 3), (1, 24)), [(), ()]),  # one row: a vector
        (("conv", "fc.weight"), ((4, 1, 3, 3), (5, 20)), [(), ()]),  # short enough
    ],
)
def test_long_rows_are_taken_apart_where_the_layout_tells_how(names, shapes, parts, monkeypatch) -> None:
    monkeypatch.setattr(matrices, "LONGEST_SIDE", 20)
    items = Matrices.of(Layout(names, shapes)).items
    assert [item.parts for item in items] == parts
    assert all(math.prod(item.shape) == item.rows * item.columns for item in items)


@given(sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4), lead=st.sampled_from([(), (2,), (2, 3)]))
def test_turning_is_what_the_kronecker_product_of_all_bases_does(sizes, lead) -> None:
    generator = torch.Generator().manual_seed(0)
    bases = [torch.randn(n, r, generator=generator, dtype=torch.float64) for n, r in sizes]
    tensor = torch.randn(*lead, *(n for n, _ in sizes), generator=generator, dtype=torch.float64)
    whole = reduce(torch.kron, bases)
    turned = turn(tensor, bases)
    assert turned.shape == (*lead, *(r for _, r in sizes))
    torch.testing.assert_close(turned.flatten(len(lead)), tensor.flatten(len(lead)) @ whole)
    torch.testing.assert_close(turn_back(turned, bases).flatten(len(lead)), turned.flatten(len(lead)) @ whole.T)
