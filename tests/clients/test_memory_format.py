from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedlight.clients import FedAvg, LocalModel
from fedlight.clients.memory_format import pays_channels_last
from tests.clients.conftest import cross_entropy

CHANNELS_LAST = torch.channels_last


class Viewing(nn.Module):
    """As in many a tutorial: feature maps are flattened by ``view``, which needs them channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).view(len(x), -1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def images(channels: int = 3) -> Tensor:
    return torch.randn(20, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def test_convolutions_on_coloured_images_get_them_channels_last() -> None:
    model, y = LocalModel(network(), cross_entropy), torch.arange(20) % 5
    batches = list(model.batches(images(), y, 8, 1, None, torch.Generator().manual_seed(0)))
    assert all(x.is_contiguous(memory_format=CHANNELS_LAST) and not x.is_contiguous() for x, _ in batches)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat([x for x, _ in batches]), images()[order])


def test_the_update_is_the_same_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    updates, y = [], torch.arange(20) % 5
    for last in (True, False):
        model = LocalModel(network(), cross_entropy)
        monkeypatch.setattr(model, "_channels_last", None if last else False)
        model.load(model.weights.clone(), model.buffers)
        updates.append(FedAvg(lr=0.1, batch_size=5, epochs=2).run(model, images(), y, 0, torch.Generator().manual_seed(0)).update)
        assert model._channels_last is last
    torch.testing.assert_close(*updates, rtol=1e-4, atol=1e-6)


def test_what_cannot_take_it_or_gains_nothing_keeps_images_as_they_are() -> None:
    viewing = Viewing().train()
    assert not pays_channels_last(viewing, images())
    assert viewing.training
    x, y = next(LocalModel(viewing, cross_entropy).batches(images(), torch.arange(20) % 5, 8, 1, None, torch.Generator()))
    assert x.is_contiguous() and torch.isfinite(cross_entropy(viewing, x, y))
    assert pays_channels_last(network(), images())
    for other in (images(1), images().flatten(1), images().to(torch.uint8), [images()]):
        assert not pays_channels_last(network(), other)
    assert not pays_channels_last(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), images())
