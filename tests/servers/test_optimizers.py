"""Server optimizers are the formulas of their papers. A new one is one more row."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from fedlight.core.errors import ConfigurationError
from fedlight.servers import FedAdagrad, FedAdam, FedYogi

SECOND_MOMENTS = {
    FedAdagrad: lambda v, s: v + s,
    FedAdam: lambda v, s: 0.99 * v + 0.01 * s,
    FedYogi: lambda v, s: v - 0.01 * s * torch.sign(v - s),
}
FED_AVG_M = partial(torch.optim.SGD, lr=1.0, momentum=0.9)  # Hsu et al. 2019, arXiv 1909.06335, section 4.3
OPTIMIZERS = [*SECOND_MOMENTS, FED_AVG_M]
AGGREGATES = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def walk(optimizer, parameter, aggregates):
    for aggregate in aggregates:
        parameter.grad = aggregate.clone()
        optimizer.step()
    return parameter.detach().clone()


@pytest.mark.parametrize("kind", SECOND_MOMENTS)
def test_steps_are_those_of_algorithm_2(kind):
    parameter = torch.nn.Parameter(torch.ones(5))
    end = walk(kind([parameter], lr=0.1), parameter, AGGREGATES)
    beta1 = 0.0 if kind is FedAdagrad else 0.9
    w, m, v = torch.ones(5), torch.zeros(5), torch.full((5,), 1e-6)
    for aggregate in AGGREGATES:
        m = beta1 * m + (1 - beta1) * aggregate
        v = SECOND_MOMENTS[kind](v, aggregate**2)
        w = w - 0.1 * m / (v.sqrt() + 1e-3)
    torch.testing.assert_close(end, w)


def test_momentum_adds_up_past_aggregates():
    parameter = torch.nn.Parameter(torch.zeros(5))
    end = walk(FED_AVG_M([parameter]), parameter, AGGREGATES[:2])
    torch.testing.assert_close(end, -(1.9 * AGGREGATES[0] + AGGREGATES[1]))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_restored_optimizer_goes_on_bit_for_bit(kind):
    straight, first = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    end = walk(kind([straight]), straight, AGGREGATES)
    half = kind([first])
    walk(half, first, AGGREGATES[:3])
    second = torch.nn.Parameter(first.detach().clone())
    rest = kind([second])
    rest.load_state_dict(copy.deepcopy(half.state_dict()))
    assert torch.equal(walk(rest, second, AGGREGATES[3:]), end)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_parameter_without_an_aggregate_stays(kind):
    moved, still = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    walk(kind([moved, still]), moved, AGGREGATES)
    assert torch.equal(still, torch.ones(5)) and not torch.equal(moved, torch.ones(5))


@pytest.mark.parametrize("changes", [{"lr": 0}, {"beta1": 1}, {"beta2": 1}, {"tau": 0}], ids=str)
def test_numbers_out_of_range_are_named(changes):
    with pytest.raises(ConfigurationError, match=rf"^Expected `{next(iter(changes))}` [^`]*$"):
        FedAdam([torch.nn.Parameter(torch.ones(1))], **changes)
