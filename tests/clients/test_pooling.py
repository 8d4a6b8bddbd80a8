"""Quick pooling gives torch's numbers, bit for bit, and is in the models that clients train one after another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedlight.clients import ClientTask, FedAvg, LocalModel, Sequential
from fedlight.clients.layers import MaxPool2d, quicken_pooling
from fedlight.modules import BenchmarkCNN
from tests.clients.conftest import cross_entropy

OPTIONS = {
    "halves": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 2},
    "padded": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 2, "dilation": 2, "stride": 1},
    "oblong": {"kernel_size": (2, 3), "stride": (1, 2), "ceil_mode": True},
}


@pytest.fixture
def images() -> torch.Tensor:
    """Return rectified images: as behind a ReLU, most windows hold ties between zeros."""
    return torch.randn(3, 20, 11, 14, generator=torch.Generator().manual_seed(0)).relu()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_maxima_and_gradients_are_torchs(options: dict[str, object], images: torch.Tensor) -> None:
    quick, plain = nn.MaxPool2d(**options), nn.MaxPool2d(**options)  # type: ignore[arg-type]
    quicken_pooling(quick)
    results = []
    for layer in (quick, plain):
        x = images.clone().requires_grad_()
        pooled = layer(x)
        weights = torch.arange(pooled.numel(), dtype=torch.float32).view_as(pooled)
        results.append((pooled.detach(), torch.autograd.grad((pooled * weights).sum(), x)[0]))
    assert type(quick) is MaxPool2d
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0].stride() == results[1][0].stride()


def test_numbers_that_are_not_finite_stay_so(images: torch.Tensor) -> None:
    images[0, 0, 0, 0], images[1, 2, 3, 4] = torch.nan, torch.inf
    assert torch.equal(MaxPool2d(2)(images).nan_to_num(7.0), nn.MaxPool2d(2)(images).nan_to_num(7.0))


def test_it_can_be_differentiated_twice(images: torch.Tensor) -> None:
    x = images[:1, :, :4, :4].double().contiguous() + torch.randperm(320).view(1, 20, 4, 4)  # no ties
    assert torch.autograd.gradgradcheck(MaxPool2d(2), (x.requires_grad_(),))


def test_other_inputs_and_layers_take_torchs_way(images: torch.Tensor) -> None:
    last, few, single = images.contiguous(memory_format=torch.channels_last), images[:, :3].contiguous(), images[0]
    for x in (last, few, single):
        assert torch.equal(MaxPool2d(2)(x), nn.MaxPool2d(2)(x))
    pooled, indices = MaxPool2d(2, return_indices=True)(images)
    assert torch.equal(pooled.flatten(), images.flatten(2).gather(2, indices.flatten(2)).flatten())

    class Own(nn.MaxPool2d):
        """A pooling of the user's."""

    network = nn.Sequential(Own(2), nn.AvgPool2d(2))
    quicken_pooling(network)
    assert [type(layer) for layer in network] == [Own, nn.AvgPool2d]


def test_gradients_of_any_layout_and_of_torch_func_are_torchs(images: torch.Tensor) -> None:
    quick, plain = MaxPool2d(2), nn.MaxPool2d(2)
    x = images.clone().requires_grad_()
    ones = [torch.autograd.grad(layer(x).sum(), x)[0] for layer in (quick, plain)]  # an expanded gradient
    turned = [torch.autograd.grad((layer(x).transpose(2, 3) * layer(x).transpose(2, 3)).sum(), x)[0] for layer in (quick, plain)]
    assert torch.equal(*ones) and torch.equal(*turned)
    each = [torch.func.vmap(torch.func.grad(lambda image, pool=pool: pool(image[None]).square().sum()))(images) for pool in (quick, plain)]
    assert torch.equal(*each)


def test_clients_train_with_it_to_the_same_weights() -> None:
    network = BenchmarkCNN(image_size=12)
    x, y = torch.randn(8, 3, 12, 12), torch.arange(8)
    weights = []
    for quick in (True, False):
        model = LocalModel(copy.deepcopy(network), cross_entropy)
        start, algorithm = model.weights.clone(), FedAvg(lr=0.1, batch_size=4, epochs=2)
        task = ClientTask(0, x, y, start, model.buffers, torch.Generator().manual_seed(1), noise=5)
        with torch.random.fork_rng():
            if quick:
                ((_, result, _),) = Sequential().train(model, algorithm, [task], round=0)
                assert any(type(layer) is MaxPool2d for layer in model.module.modules())
            else:
                model.seed_noise(task.noise)
                model.load(start, model.buffers)
                result = algorithm.run(model, x, y, 0, task.generator, task.memory)
        weights.append(result.update)
    assert torch.equal(*weights)
    assert not any(type(layer) is MaxPool2d for layer in network.modules())
