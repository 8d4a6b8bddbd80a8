"""Bits where the energy is: how many bits each coefficient of a code gets under an exact budget.

Reverse water-filling (Cover & Thomas, Elements of Information Theory, section 10.3.3) for integers that are summed over clients: all
coefficients share one step, a coefficient's bits are the range it needs in that step, and a coefficient that is not worth two bits gets
none. Which is decided by what the *mean* of a cohort loses: all of its energy without bits, rounding and clipping errors with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fedlight.core.digits import digit_group

WIDTHS = (0, 2, 3, 4, 5, 6, 7, 8)
"""The numbers of bits that a coefficient can have."""

_FINER = 2.0 ** (-1 / 6)
"""How far apart the steps lie that are tried."""

Cost = Callable[[int], float]
"""Maps the bits of a coefficient to the bits that it takes on the wire."""


@dataclass
class Allocation:
    """Bits ``[n]`` (int64) of every coefficient, the common step, and the expected squared error ``[n]`` of the cohort's mean."""

    bits: Tensor
    step: float
    error: Tensor


def plain_cost(bits: int) -> int:
    """Return the bits on the wire of a code that travels as it is."""
    return bits


def masked_cost(clients: int) -> Cost:
    """Return the cost under secure aggregation of ``clients`` codes (times their largest integer weight).

    That is what a number modulo ``2 * clients * limit + 1`` takes in a group of such (`digit_group`), where ``limit`` is the largest
    integer of so many bits: their sum cannot overflow that modulus.
    """

    def cost(bits: int) -> float:
        if not bits:
            return 0
        digits, together = digit_group(2 * clients * ((1 << (bits - 1)) - 1) + 1)
        return together / digits

    return cost


def allocate(energy: Tensor, deviation: Tensor, cohort: int, budget: int, cost: Cost = plain_cost, near: float | None = None) -> Allocation:
    """Return the allocation of at most ``budget`` bits with the least expected error of the cohort's mean.

    ``energy`` ``[n]``: second moment of the mean's coefficients; ``deviation`` ``[n]``: standard deviation of one client's;
    ``cohort``: clients that are averaged; ``near``: a step from an earlier, like allocation, to begin the search at.
    """

    def at(step: float) -> Allocation:
        return _with_step(energy, deviation, cohort, budget, cost, step)

    if near is None:
        scale = float(deviation.square().mean().sqrt().clamp(min=1e-30))
        near = min((at(scale * 2.0 ** (k / 2)) for k in range(-10, 9)), key=_loss).step
    best = at(near)
    for factor in (_FINER, 1 / _FINER):
        while _loss(found := at(best.step * factor)) < (1 - 1e-4) * _loss(best):
            best = found
    return best


def _loss(allocation: Allocation) -> float:
    return float(allocation.error.sum())


def _with_step(energy: Tensor, deviation: Tensor, cohort: int, budget: int, cost: Cost, step: float) -> Allocation:
    """Return the best allocation at one step: each coefficient takes the width of least ``error + price * bits`` at the right price."""
    errors = torch.stack([energy, *(expected_error(deviation, step, bits, cohort) for bits in WIDTHS[1:])])
    costs = torch.tensor([cost(bits) for bits in WIDTHS], dtype=torch.float64)

    def choose(price: float) -> Tensor:
        least, chosen = errors[0], torch.zeros(errors.shape[1], dtype=torch.long)
        for width in range(1, len(WIDTHS)):  # many times faster than `argmin` along the short side
            loss = errors[width] + price * float(costs[width])
            chosen.masked_fill_(loss < least, width)
            least = torch.minimum(least, loss)
        return chosen

    # Bisection on the price's logarithm: at `high` nothing is bought, at `low` everything that helps at all.
    high = float(energy.max().clamp(min=1e-30))
    low = high * 1e-12
    if float(costs[choose(low)].sum()) <= budget:
        high = low
    while high / low > 1.01:
        price = math.sqrt(low * high)
        low, high = (price, high) if float(costs[choose(price)].sum()) > budget else (low, price)
    chosen = _spend_rest(errors, costs, budget, choose(high), choose(low))
    return Allocation(torch.tensor(WIDTHS)[chosen], step, errors.gather(0, chosen[None])[0])


def _spend_rest(errors: Tensor, costs: Tensor, budget: int, chosen: Tensor, wanted: Tensor) -> Tensor:
    """Return ``chosen`` with as much of ``wanted`` as the budget allows, most saving for its bits first.

    No price tells coefficients of equal energy apart: at any of them all are bought or none.
    """
    extra = costs[wanted] - costs[chosen]
    saving = (errors.gather(0, chosen[None]) - errors.gather(0, wanted[None]))[0]
    order = (saving / extra.clamp(min=1).float()).argsort(descending=True, stable=True)
    order = order[extra[order] > 0]
    bought = order[float(costs[chosen].sum()) + extra[order].cumsum(0) <= budget]
    return chosen.index_copy(0, bought, wanted[bought])


def expected_error(deviation: Tensor, step: float, bits: int, cohort: int) -> Tensor:
    """Return the expected squared error ``[n]`` of the mean of ``cohort`` codes of so many bits, stochastically rounded to ``step``.

    For Laplacian coefficients. Rounding errors of clients are independent; what lies outside the range is taken not to average out.
    """
    limit = (1 << (bits - 1)) - 1
    relative = (deviation / step).clamp(1e-4, 1e4)
    clipped = relative.square() * torch.exp(-math.sqrt(2) * limit / relative)
    return (_rounding(relative) / cohort + clipped) * step**2


def _rounding(relative: Tensor) -> Tensor:
    """Return the variance, in squared steps, of stochastically rounding Laplacian numbers of these deviations (in steps)."""
    at, values = _rounding_table()
    position = (relative.log2() - math.log2(float(at[0]))) / (math.log2(float(at[-1])) - math.log2(float(at[0]))) * (len(at) - 1)
    low = position.floor().clamp(0, len(at) - 2)
    share = (position - low).clamp(0, 1)
    index = low.long()
    return values[index] * (1 - share) + values[index + 1] * share


@cache
def _rounding_table() -> tuple[Tensor, Tensor]:
    """Return deviations ``[200]`` in steps and the mean of ``f (1 - f)`` there, f the fractional part: a quadrature over quantiles."""
    at = torch.logspace(math.log2(1e-4), math.log2(1e4), 200, base=2.0)
    quantiles = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    unit = -torch.log1p(-quantiles) / math.sqrt(2)
    fraction = (at[:, None].double() * unit).frac()
    return at, (fraction * (1 - fraction)).mean(1).float()
