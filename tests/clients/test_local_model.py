from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlight.clients import LocalModel
from fedlight.clients.local_model import Objective, epoch_orders
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import flatten
from tests.clients.conftest import cross_entropy

sizes = st.integers(1, 40)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(n=sizes, batch_size=sizes, epochs=st.integers(1, 4))
def test_every_epoch_visits_every_sample_once(n: int, batch_size: int, epochs: int) -> None:
    orders = list(epoch_orders(n, batch_size, epochs, None, generator()))
    assert len(orders) == epochs
    for order, size in orders:
        assert sorted(order.tolist()) == list(range(n)) and size == batch_size


@given(n=sizes, batch_size=sizes, steps=st.integers(1, 60))
def test_counting_steps_there_are_exactly_so_many_full_batches(n: int, batch_size: int, steps: int) -> None:
    batches = [batch for order, size in epoch_orders(n, batch_size, None, steps, generator()) for batch in order.split(size)]
    assert len(batches) == steps
    assert {len(batch) for batch in batches} == {min(n, batch_size)}
    for order, size in epoch_orders(n, batch_size, None, steps, generator()):
        assert len(order.unique()) == len(order) and len(order) % size == 0


def test_every_pass_is_shuffled_anew_and_by_the_generator_alone() -> None:
    for arguments in ((10, 5, 3, None), (10, 5, None, 6)):
        first, again = ([order.tolist() for order, _ in epoch_orders(*arguments, generator())] for _ in range(2))
        other = [order.tolist() for order, _ in epoch_orders(*arguments, generator(1))]
        assert first == again != other and first[0] != first[1]


@given(n=sizes, batch_size=sizes, epochs=st.none() | st.integers(1, 3))
def test_batches_pair_inputs_with_their_targets(n: int, batch_size: int, epochs: int | None) -> None:
    model = LocalModel(nn.Linear(1, 1), lambda model, x, y: model(x).sum())
    steps = None if epochs else 5
    for x, y in model.batches(torch.arange(float(n))[:, None], torch.arange(n), batch_size, epochs, steps, generator()):
        assert x[:, 0].tolist() == y.tolist() and 1 <= len(y) <= batch_size


def test_augmentation_is_given_each_epoch_and_the_clients_generator() -> None:
    seen: list[int] = []

    def augment(x: Tensor, own: torch.Generator) -> Tensor:
        seen.append(len(x))
        return x + torch.rand(x.shape, generator=own)

    model = LocalModel(nn.Linear(1, 1), lambda model, x, y: model(x).sum(), augment=augment)

    def inputs(seed: int) -> list[float]:
        batches = model.batches(torch.zeros(10, 1), torch.zeros(10), 4, 2, None, generator(seed))
        return torch.cat([x for x, _ in batches]).flatten().tolist()

    assert inputs(0) == inputs(0) != inputs(1)
    assert seen == [10] * 6 and len(set(inputs(0))) == 20


def test_the_network_given_is_not_touched(network: nn.Module) -> None:
    before = flatten(network.parameters()).clone()
    local = LocalModel(network.eval(), lambda model, x, y: model(x).sum())
    local.weights.zero_()
    assert torch.equal(flatten(network.parameters()), before) and local.module.training and not network.training


def test_loading_copies_the_weights_in_and_keeps_the_start(model: LocalModel) -> None:
    weights = torch.arange(float(len(model.weights)))
    model.load(weights, model.buffers)
    assert torch.equal(flatten(model.module.parameters()), weights) and not model.update().any()
    model.weights.sub_(2.0)
    assert torch.equal(model.update(), torch.full_like(weights, 2.0)) and torch.equal(weights, torch.arange(float(len(weights))))


def test_loading_brings_back_buffers_and_counters() -> None:
    local = LocalModel(nn.BatchNorm1d(2), lambda model, x, y: model(x).sum())
    local.module(torch.randn(4, 2))
    assert int(local.module.num_batches_tracked) == 1
    local.load(local.weights.clone(), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert local.module.running_mean.tolist() == [1, 2] and local.module.running_var.tolist() == [3, 4]
    assert int(local.module.num_batches_tracked) == 0


def test_gradients_are_autograds_and_zero_where_the_loss_does_not_reach() -> None:
    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))

    local = LocalModel(Partial(), lambda model, x, y: (model.used * x).sum())
    loss, grads = local.gradients(torch.tensor([2.0, 3.0]), torch.zeros(1))
    assert [grad.tolist() for grad in grads] == [[2, 3], [0, 0, 0]] and float(loss) == 5 and not loss.requires_grad
    assert [parameter.grad is None for parameter in local.module.parameters()] == [False, True]
    local.start = local.weights.clone()
    local.update()
    assert all(parameter.grad is None for parameter in local.module.parameters())  # no memory between clients


def test_gradients_are_those_of_autograd_to_the_bit(any_network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    _, grads = LocalModel(any_network, cross_entropy).gradients(x, y)
    expected = torch.autograd.grad(cross_entropy(any_network.train(), x, y), list(any_network.parameters()))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(grads, expected, strict=True))


@pytest.mark.parametrize("objective", [lambda model, x, y: model(x)[:, 0], lambda model, x, y: x.sum()], ids=["no scalar", "no gradient"])
def test_a_loss_that_cannot_be_differentiated_is_refused(objective: Objective, network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises((RuntimeError, ConfigurationError), match=r"grad|one number"):
        LocalModel(network, objective).gradients(*data)


def test_in_mixed_precision_every_gradient_is_at_the_current_weights(network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        local, fresh = LocalModel(network, cross_entropy), LocalModel(network, cross_entropy)
        local.load(local.weights.clone(), local.buffers)
        local.descend(local.gradients(*data)[1], lr=1.0)
        fresh.load(local.weights.clone(), local.buffers)
        again, expected = local.gradients(*data)[1], fresh.gradients(*data)[1]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, expected, strict=True))


@pytest.mark.parametrize("lr", [0.5, 2.0])
def test_descend_moves_the_flat_weights(lr: float, model: LocalModel) -> None:
    grads = tuple(torch.full_like(parameter, 3.0) for parameter in model.flat.parameters)
    model.descend(grads, lr)
    torch.testing.assert_close(model.update(), torch.full_like(model.weights, 3 * lr))
