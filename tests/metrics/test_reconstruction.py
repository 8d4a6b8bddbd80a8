from __future__ import annotations

import math

import pytest
import torch

from fedlight.core.errors import ConfigurationError
from fedlight.metrics import ReconstructionError, relative_error


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(count, 20, generator=generator)
    return true + 0.3 * torch.randn(count, 20, generator=generator), true


def test_many_updates_are_one_long_update() -> None:
    decoded, true = pairs(8)
    metric = ReconstructionError()
    for d, t in zip(decoded, true, strict=True):
        metric.update(d, t)
    torch.testing.assert_close(metric.compute(), relative_error(decoded.flatten(), true.flatten()))


def test_merge_of_two_halves_is_the_whole() -> None:
    decoded, true = pairs(8)
    whole, first, second = ReconstructionError(), ReconstructionError(), ReconstructionError()
    whole.update(decoded, true)
    first.update(decoded[:3], true[:3])
    second.update(decoded[3:], true[3:])
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), whole.compute())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_edges() -> None:
    metric = ReconstructionError()
    assert metric.compute() == 0
    metric.update(torch.ones(3), torch.zeros(3))
    assert metric.compute() == math.inf
    metric.reset()
    metric.update(torch.zeros(3), torch.ones(3))
    assert metric.compute() == 1
    with pytest.raises(ConfigurationError, match="one shape"):
        metric.update(torch.zeros(3), torch.ones(4))
