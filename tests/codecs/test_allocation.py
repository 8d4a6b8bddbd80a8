from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedlight.codecs.allocation import WIDTHS, Cost, _with_step, allocate, expected_error, masked_cost, plain_cost

COSTS: dict[str, Cost] = {"plain": plain_cost, "masked": masked_cost(10)}
costs = pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
deviations = st.lists(st.floats(-3, 3), min_size=1, max_size=30).map(lambda logs: torch.tensor(logs).exp())


def spent(bits: Tensor, cost: Cost) -> int:
    return sum(cost(b) for b in bits.tolist())


@costs
@given(deviation=deviations, share=st.floats(0.1, 1), budget=st.integers(0, 250), cohort=st.integers(1, 100))
def test_the_budget_is_never_exceeded_and_bits_save_error(cost: Cost, deviation: Tensor, share: float, budget: int, cohort: int) -> None:
    energy = share * deviation.square()
    found = allocate(energy, deviation, cohort, budget, cost)
    assert spent(found.bits, cost) <= budget and set(found.bits.tolist()) <= set(WIDTHS)
    assert found.bits.shape == found.error.shape == energy.shape and found.step > 0
    assert (found.error <= energy * (1 + 1e-6)).all()
    assert torch.equal(found.error[found.bits == 0], energy[found.bits == 0])
    for bits in found.bits.unique().tolist():
        if bits:
            mine = found.bits == bits
            torch.testing.assert_close(found.error[mine], expected_error(deviation, found.step, bits, cohort)[mine])


@pytest.mark.quick(6)
@costs
@pytest.mark.parametrize("kind", ["drawn", "equal", "two kinds"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_the_budget_is_used_up_to_what_one_more_coefficient_takes(cost: Cost, kind: str, share: float) -> None:
    """Where there is energy to spend it on; coefficients of equal energy included, which no price tells apart."""
    deviation = {
        "drawn": torch.randn(300, generator=torch.Generator().manual_seed(0)).exp(),
        "equal": torch.ones(300),
        "two kinds": torch.cat([torch.ones(100), torch.full((200,), 0.1)]),
    }[kind]
    budget = int(share * 300 * cost(2))
    found = allocate(deviation.square(), deviation, 10, budget, cost)
    assert budget - cost(8) <= spent(found.bits, cost) <= budget


@costs
@given(data=st.data(), step=st.floats(0.05, 2), budget=st.integers(2, 40), cohort=st.integers(1, 20))
def test_at_a_step_it_is_the_best_there_is_but_for_the_last_coefficient(
    cost: Cost, data: st.DataObject, step: float, budget: int, cohort: int
) -> None:
    """Against every allocation of four coefficients: no better than the best, no worse than the best with one coefficient's bits less."""
    deviation = torch.tensor(data.draw(st.lists(st.floats(-2, 2), min_size=4, max_size=4))).exp()
    energy = deviation.square() * torch.tensor(data.draw(st.lists(st.floats(0.05, 1), min_size=4, max_size=4)))
    found = _with_step(energy, deviation, cohort, budget, cost, step)
    errors = torch.stack([energy, *(expected_error(deviation, step, bits, cohort) for bits in WIDTHS[1:])])

    def best(limit: int) -> float:
        every = (w for w in product(range(len(WIDTHS)), repeat=4) if sum(cost(WIDTHS[i]) for i in w) <= limit)
        return min(sum(table[i][j] for j, i in enumerate(w)) for w in every)

    table = errors.tolist()
    largest = max(cost(b) for b in WIDTHS)
    error = float(found.error.sum())
    assert error >= best(budget) * (1 - 1e-5)
    assert error <= best(max(budget - largest, 0)) * (1 + 1e-5) + 0.02 * float(energy.sum())


@pytest.mark.parametrize("budget", [20, 60, 150, 400])
def test_no_other_common_step_does_much_better(budget: int) -> None:
    deviation = torch.randn(60, generator=torch.Generator().manual_seed(1)).exp()
    energy = 0.5 * deviation.square()
    found = float(allocate(energy, deviation, 10, budget).error.sum())
    scale = float(deviation.square().mean().sqrt())
    others = [float(_with_step(energy, deviation, 10, budget, plain_cost, scale * 2 ** (k / 8)).error.sum()) for k in range(-40, 33)]
    assert found <= 1.05 * min(others)


@pytest.mark.parametrize("relative", [0.05, 0.3, 1.0, 2.5, 20.0])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_the_expected_error_is_that_of_rounding_laplacian_numbers(relative: float, bits: int) -> None:
    """One client's, by drawing; clipped numbers are not rounded as well, which the formula leaves out of account."""
    step, n = 0.7, 200_000
    generator = torch.Generator().manual_seed(bits)
    deviation = relative * step
    signs = torch.randint(2, (n,), generator=generator) * 2 - 1
    x = -torch.log1p(-torch.rand(n, generator=generator, dtype=torch.float64)) * deviation / math.sqrt(2) * signs
    limit = 2 ** (bits - 1) - 1
    code = (x / step + torch.rand(n, generator=generator, dtype=torch.float64)).floor().clamp(-limit, limit)
    drawn = (code * step - x).square()
    expected = float(expected_error(torch.tensor([deviation]), step, bits, 1))
    beyond = float((x.abs() > limit * step).double().mean())
    slack = 5 * float(drawn.std()) / n**0.5 + 0.25 * beyond * step**2 + 0.005 * expected
    assert float(drawn.mean()) == pytest.approx(expected, abs=slack)


def test_a_cohort_averages_rounding_and_not_clipping() -> None:
    """By drawing cohorts of ten clients that agree but for their rounding: errors of the mean."""
    step, bits, cohort, n = 1.0, 3, 10, 20_000
    generator = torch.Generator().manual_seed(0)
    x = -torch.log1p(-torch.rand(n, 1, generator=generator, dtype=torch.float64)) * 2.0 / math.sqrt(2)
    code = (x + torch.rand(n, cohort, generator=generator, dtype=torch.float64)).floor().clamp(-3, 3)
    drawn = float((code.mean(1, keepdim=True) - x).square().mean())
    assert float(expected_error(torch.tensor([2.0]), step, bits, cohort)) == pytest.approx(drawn, rel=0.1)


@given(deviation=deviations, bits=st.sampled_from(WIDTHS[1:]), step=st.floats(0.01, 10))
def test_more_clients_never_add_error(deviation: Tensor, bits: int, step: float) -> None:
    errors = [expected_error(deviation, step, bits, cohort) for cohort in (1, 2, 10, 100)]
    assert all((a >= b).all() for a, b in pairwise(errors))
    assert torch.isfinite(errors[0]).all()


@costs
@given(deviation=deviations, budget=st.integers(2, 200))
def test_coefficients_without_energy_get_no_bits(cost: Cost, deviation: Tensor, budget: int) -> None:
    zeros = torch.zeros(5)
    found = allocate(torch.cat([zeros, deviation.square()]), torch.cat([zeros, deviation]), 10, budget, cost)
    assert not found.bits[:5].any() and not found.error[:5].any()


def test_nothing_is_spent_where_there_is_nothing() -> None:
    found = allocate(torch.zeros(4), torch.zeros(4), 10, 100)
    assert not found.bits.any() and not found.error.any()


@costs
@given(deviation=deviations, share=st.floats(0.1, 1), budget=st.integers(2, 200))
def test_more_energy_gets_no_fewer_bits(cost: Cost, deviation: Tensor, share: float, budget: int) -> None:
    """Where energies are the same share of the squared deviation."""
    deviation = deviation.sort().values
    energy = share * deviation.square()
    found = allocate(energy, deviation, 10, budget, cost)
    distinct = energy.diff() > 0.05 * energy[1:]
    # The last of the budget may go to one of several that save about as much for their bits.
    fewer = int((found.bits.diff()[distinct] < 0).sum())
    assert fewer <= 1


@pytest.mark.parametrize("kind", ["drawn", "equal"])
def test_more_budget_never_adds_error(kind: str) -> None:
    deviation = torch.randn(50, generator=torch.Generator().manual_seed(2)).exp() if kind == "drawn" else torch.ones(50)
    errors = [float(_with_step(deviation.square(), deviation, 10, budget, plain_cost, 0.5).error.sum()) for budget in range(0, 300, 7)]
    assert all(later <= earlier * 1.001 for earlier, later in pairwise(errors))


def test_a_step_nearby_is_looked_for_nearby() -> None:
    deviation = torch.randn(80, generator=torch.Generator().manual_seed(3)).exp()
    energy = 0.5 * deviation.square()
    whole = allocate(energy, deviation, 10, 120)
    near = allocate(energy, deviation, 10, 120, near=whole.step)
    assert 0.75 <= near.step / whole.step <= 1.2
    assert float(near.error.sum()) <= float(whole.error.sum()) * (1 + 1e-6)


@given(clients=st.integers(1, 10_000), bits=st.sampled_from(WIDTHS[1:]))
def test_the_masked_cost_is_what_the_least_modulus_that_no_sum_overflows_is_worth(clients: int, bits: int) -> None:
    """To 3 %: numbers lie in groups of whole bits; and never more than whole bits for each."""
    most = clients * (2 ** (bits - 1) - 1)
    worth = math.log2(2 * most + 1)
    assert worth - 1e-9 <= masked_cost(clients)(bits) <= min(1.03 * worth, math.ceil(worth))


def test_costs_of_nothing_and_of_one_client() -> None:
    assert plain_cost(0) == masked_cost(10)(0) == 0
    assert all(plain_cost(bits) - 0.5 < masked_cost(1)(bits) <= bits == plain_cost(bits) for bits in WIDTHS)
