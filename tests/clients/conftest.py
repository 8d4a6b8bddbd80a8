from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlight.clients import LocalModel

NETWORKS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)),
    "cumulative batch norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 3)),
}


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@pytest.fixture(params=NETWORKS)
def any_network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[request.param]()


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS["mlp"]()


@pytest.fixture
def model(network: nn.Module) -> LocalModel:
    local = LocalModel(network, cross_entropy)
    local.load(local.weights.clone(), local.buffers.clone())
    return local


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """Ten samples of three classes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(10, 4, generator=generator), torch.randint(3, (10,), generator=generator)
