from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedlight.core.errors import CodecMismatchError
from fedlight.core.layout import FlatModel, Layout, flatten, float_buffers

shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=5).map(tuple)


def layout_of(shapes: tuple[tuple[int, ...], ...]) -> Layout:
    return Layout(tuple(f"p{i}" for i in range(len(shapes))), shapes)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


@given(shapes, st.lists(st.integers(1, 3), max_size=2))
def test_flatten_undoes_split(shapes: tuple[tuple[int, ...], ...], lead: list[int]) -> None:
    layout = layout_of(shapes)
    flat = torch.arange(float(torch.Size([*lead, layout.dim]).numel())).reshape(*lead, layout.dim)
    parts = layout.split(flat)
    assert [part.shape for part in parts] == [(*lead, *shape) for shape in shapes]
    assert torch.equal(torch.cat([part.reshape(*lead, -1) for part in parts], dim=-1), flat)
    if not lead:
        assert torch.equal(flatten(parts), flat)


@given(shapes)
def test_offsets_are_where_split_cuts(shapes: tuple[tuple[int, ...], ...]) -> None:
    layout = layout_of(shapes)
    flat = torch.arange(layout.dim)
    for part, offset, size in zip(layout.split(flat), layout.offsets, layout.sizes, strict=True):
        assert part.flatten().tolist() == list(range(offset, offset + size))


@given(shapes)
def test_json_round_trip_keeps_layout_and_fingerprint(shapes: tuple[tuple[int, ...], ...]) -> None:
    layout = layout_of(shapes)
    again = Layout.from_json(layout.to_json())
    assert again == layout and again.fingerprint == layout.fingerprint


def test_fingerprint_tells_names_shapes_and_order_apart() -> None:
    variants = [
        Layout(("a", "b"), ((2, 3), (6,))),
        Layout(("a", "c"), ((2, 3), (6,))),
        Layout(("a", "b"), ((3, 2), (6,))),
        Layout(("a", "b"), ((6,), (2, 3))),
        Layout(("b", "a"), ((6,), (2, 3))),
        Layout(("a",), ((12,),)),
    ]
    assert len({layout.fingerprint for layout in variants}) == len(variants)


def test_layout_of_a_model_leaves_frozen_parameters_out(network: nn.Module) -> None:
    network[0].weight.requires_grad_(False)
    layout = Layout.of(network)
    assert layout.names == ("0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
    assert layout.shapes == ((3,), (3,), (3,), (2, 12), (2,))


def test_require_same_accepts_an_equal_layout() -> None:
    Layout(("a",), ((2,),)).require_same(Layout(("a",), ((2,),)), "the codec")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Layout(("a", "b"), ((2, 3), (5,))), "the codec was made for another model. Expected a model of dimension 12 but got 11"),
        (Layout(("a", "b"), ((3, 2), (6,))), "Expected parameter a [2, 3] but got a [3, 2]"),
        (Layout(("a", "c"), ((2, 3), (6,))), "Expected parameter b [6] but got c [6]"),
        (Layout(("a", "b", "d"), ((2, 3), (6,), (0,))), "Expected parameter nothing more [] but got d [0]"),
    ],
)
def test_require_same_names_the_first_difference(other: Layout, message: str) -> None:
    with pytest.raises(CodecMismatchError) as raised:
        Layout(("a", "b"), ((2, 3), (6,))).require_same(other, "the codec")
    assert message in str(raised.value) and "fedlight pretrain" in str(raised.value)


def test_flat_model_computes_what_the_model_did(network: nn.Module) -> None:
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    before = network.eval()(x)
    assert torch.equal(FlatModel(network).module(x), before)


def test_flat_model_shares_memory_both_ways(network: nn.Module) -> None:
    flat = FlatModel(network)
    assert len(flat.weights) == flat.layout.dim == sum(p.numel() for p in network.parameters())
    flat.weights.fill_(2.0)
    assert all((p == 2).all() for p in network.parameters())
    with torch.no_grad():
        network[3].bias.fill_(5.0)
    assert (flat.layout.split(flat.weights)[-1] == 5).all()
    start, stop = flat.weights.data_ptr(), flat.weights.data_ptr() + 4 * len(flat.weights)
    assert all(start <= p.data_ptr() < stop for p in network.parameters())


def test_flat_model_buffers_follow_batch_norm(network: nn.Module) -> None:
    flat = FlatModel(network)
    assert len(flat.buffers) == 6  # running mean and variance; the counter is an integer
    network.train()(3 + torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(flat.buffers, flatten(float_buffers(network))) and not torch.equal(flat.buffers[:3], torch.zeros(3))
    flat.buffers.copy_(torch.arange(6.0))
    assert network[1].running_mean.tolist() == [0, 1, 2] and network[1].running_var.tolist() == [3, 4, 5]
    assert network.state_dict()["1.running_var"].tolist() == [3, 4, 5]
    assert int(network[1].num_batches_tracked) == 1


def test_flat_model_gradients_reach_the_views(network: nn.Module) -> None:
    flat = FlatModel(network)
    grads = torch.autograd.grad(network(torch.ones(2, 1, 4, 4)).square().sum(), flat.parameters)
    before = flat.weights.clone()
    with torch.no_grad():
        torch._foreach_add_(flat.parameters, grads, alpha=-0.5)
    torch.testing.assert_close(flat.weights, before - 0.5 * flatten(grads))


def test_flat_model_without_buffers_has_an_empty_vector() -> None:
    assert FlatModel(nn.Linear(2, 2)).buffers.shape == (0,)


def test_flat_model_refuses_mixed_dtypes() -> None:
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(CodecMismatchError, match="one dtype but got.*float32.*float64"):
        FlatModel(mixed)


def test_flatten_copies_and_casts() -> None:
    tensor = torch.ones(2)
    flat = flatten([tensor], torch.float64)
    flat.zero_()
    assert flat.dtype == torch.float64 and tensor.tolist() == [1, 1]
