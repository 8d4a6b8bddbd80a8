"""Laws of local training: first those of every algorithm, then each one's own. A new algorithm is one more row in ``ALGORITHMS``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlight.clients import (
    Algorithm,
    Constant,
    Cosine,
    Ditto,
    Exponential,
    FedAvg,
    FedDyn,
    FedNova,
    FedProx,
    FedSGD,
    LocalModel,
    LocalResult,
    Memory,
    QFedAvg,
    Scaffold,
)
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import flatten

ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "fedavg, epochs": lambda: FedAvg(lr=0.1, batch_size=4, epochs=2),
    "fedavg, steps": lambda: FedAvg(lr=0.1, batch_size=4, steps=5),
    "fedavg, all options": lambda: FedAvg(0.1, 4, steps=5, momentum=0.9, weight_decay=0.01, max_grad_norm=0.5, schedule=Exponential(0.9)),
    "fedprox": lambda: FedProx(mu=0.5, lr=0.1, batch_size=4, epochs=2),
    "fedprox, momentum": lambda: FedProx(mu=0.5, lr=0.1, batch_size=4, steps=5, momentum=0.9),
    "scaffold": lambda: Scaffold(lr=0.1, batch_size=4, steps=5),
    "fednova": lambda: FedNova(lr=0.1, batch_size=4, epochs=2, momentum=0.5),
    "feddyn": lambda: FedDyn(alpha=0.5, lr=0.1, batch_size=4, steps=5),
    "ditto": lambda: Ditto(lam=0.5, lr=0.1, batch_size=4, steps=5),
    "q-fedavg": lambda: QFedAvg(q=1.0, lr=0.1, batch_size=4, steps=5),
    "fedsgd": lambda: FedSGD(batch_size=4),
}

Data = tuple[Tensor, Tensor]


@pytest.fixture(params=ALGORITHMS)
def algorithm(request: pytest.FixtureRequest) -> Algorithm:
    return ALGORITHMS[request.param]()


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def run(algorithm: Algorithm, model: LocalModel, data: Data, seed: int = 0, round: int = 2) -> LocalResult:
    """One client's round from the model's present start."""
    return algorithm.run(model, *data, round, torch.Generator().manual_seed(seed))


def full_gradient(model: LocalModel, data: Data) -> Tensor:
    return flatten(model.gradients(*data)[1])


# Every algorithm


def test_the_result_depends_on_the_generator_alone(algorithm: Algorithm, any_network: nn.Module, data: Data) -> None:
    results = []
    for noise in (1, 2):
        local = LocalModel(any_network, cross_entropy)
        local.load(local.weights.clone(), local.buffers.clone())
        torch.manual_seed(noise)
        results.append((run(algorithm, local, data), local.buffers.clone()))
    (a, a_buffers), (b, b_buffers) = results
    assert torch.equal(a.update, b.update) and torch.equal(a.loss, b.loss) and a.steps == b.steps
    assert torch.equal(a_buffers, b_buffers)


def test_another_generator_takes_other_batches(algorithm: Algorithm, model: LocalModel, data: Data) -> None:
    first = run(algorithm, model, data, seed=0).update
    model.load(model.start, model.buffers)
    assert torch.equal(run(algorithm, model, data, seed=1).update, first) == isinstance(algorithm, FedSGD)


def test_the_result_does_not_depend_on_what_ran_before(algorithm: Algorithm, any_network: nn.Module, data: Data) -> None:
    local = LocalModel(any_network, cross_entropy)
    weights, buffers = local.weights.clone(), local.buffers.clone()
    local.load(weights, buffers)
    first = run(algorithm, local, data)
    first_buffers = local.buffers.clone()
    local.load(weights + 1, buffers + 1)
    run(algorithm, local, (data[0] * 5, data[1].flip(0)), seed=9)
    local.load(weights, buffers)
    again = run(algorithm, local, data)
    assert torch.equal(first.update, again.update) and torch.equal(first.loss, again.loss)
    assert torch.equal(first_buffers, local.buffers)


def test_the_global_generator_and_the_global_weights_are_left_alone(algorithm: Algorithm, model: LocalModel, data: Data) -> None:
    weights, x, y = model.start.clone(), data[0].clone(), data[1].clone()
    before = torch.get_rng_state()
    run(algorithm, model, data)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(model.start, weights)
    assert torch.equal(data[0], x) and torch.equal(data[1], y)


def test_the_update_is_a_new_finite_descent_direction(algorithm: Algorithm, model: LocalModel, data: Data) -> None:
    gradient = full_gradient(model, data)
    result = run(algorithm, model, data)
    assert result.update.shape == model.weights.shape and torch.isfinite(result.update).all()
    assert torch.cosine_similarity(result.update, gradient, dim=0) > 0.5
    assert result.loss.ndim == 0 and result.steps >= 1 and not result.update.requires_grad
    kept = result.update.clone()
    model.load(torch.zeros_like(model.start), model.buffers)
    assert torch.equal(result.update, kept)


def test_clients_have_models_of_their_own_if_the_algorithm_says_so(algorithm: Algorithm, model: LocalModel, data: Data) -> None:
    memory = Memory()
    algorithm.run(model, *data, 2, torch.Generator().manual_seed(0), memory)
    assert (algorithm.personal(memory.own) is not None) == algorithm.personal_models


def test_it_works_with_less_data_than_a_batch(algorithm: Algorithm, model: LocalModel, data: Data) -> None:
    assert torch.isfinite(run(algorithm, model, (data[0][:1], data[1][:1])).update).all()


# FedAvg


def test_one_full_batch_step_of_fedavg_is_a_gradient_step(model: LocalModel, data: Data) -> None:
    gradient, loss = full_gradient(model, data), cross_entropy(model.module, *data).detach()
    result = run(FedAvg(lr=0.3, batch_size=10, steps=1), model, data)
    torch.testing.assert_close(result.update, 0.3 * gradient, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(result.loss, loss)


def test_fedavgs_update_leads_from_the_end_back_to_the_start(model: LocalModel, data: Data) -> None:
    result = run(FedAvg(lr=0.1, batch_size=4, epochs=1), model, data)
    torch.testing.assert_close(model.start - result.update, model.weights)


@pytest.mark.parametrize(("arguments", "steps"), [({"epochs": 2}, 6), ({"steps": 5}, 5)])
def test_fedavg_counts_its_steps(arguments: dict[str, int], steps: int, model: LocalModel, data: Data) -> None:
    assert run(FedAvg(lr=0.1, batch_size=4, **arguments), model, data).steps == steps


def test_fedavgs_loss_is_the_mean_over_its_steps(model: LocalModel, data: Data) -> None:
    result = run(FedAvg(lr=1e-8, batch_size=10, steps=5), model, data)
    torch.testing.assert_close(result.loss, cross_entropy(model.module, *data).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("lr", [0.05, 0.3])
def test_fedavg_is_torchs_sgd_step_by_step(momentum: float, weight_decay: float, lr: float, network: nn.Module, data: Data) -> None:
    reference = LocalModel(network, cross_entropy)
    reference.load(reference.weights.clone(), reference.buffers)
    optimizer = torch.optim.SGD(reference.module.parameters(), lr, momentum, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(3)
    path = []
    for xb, yb in reference.batches(*data, 4, None, 7, generator):
        optimizer.zero_grad()
        cross_entropy(reference.module, xb, yb).backward()
        optimizer.step()
        path.append(reference.start - reference.weights)
    for steps in range(1, 8):
        local = LocalModel(network, cross_entropy)
        local.load(local.weights.clone(), local.buffers)
        algorithm = FedAvg(lr, 4, steps=steps, momentum=momentum, weight_decay=weight_decay)
        torch.testing.assert_close(run(algorithm, local, data, seed=3).update, path[steps - 1], atol=1e-6, rtol=1e-4)


def test_momentum_starts_anew_each_round(model: LocalModel, data: Data) -> None:
    algorithm = FedAvg(lr=0.1, batch_size=10, steps=1, momentum=0.9)
    gradient = full_gradient(model, data)
    for _ in range(2):
        model.load(model.start, model.buffers)
        torch.testing.assert_close(run(algorithm, model, data).update, 0.1 * gradient, atol=1e-6, rtol=1e-4)


def test_max_grad_norm_bounds_a_step_and_keeps_its_direction(model: LocalModel, data: Data) -> None:
    gradient = full_gradient(model, data)
    norm = float(gradient.norm())
    for bound, expected in ((norm / 4, norm / 4), (norm * 4, norm)):
        model.load(model.start, model.buffers)
        update = run(FedAvg(lr=0.1, batch_size=10, steps=1, max_grad_norm=bound), model, data).update
        torch.testing.assert_close(update, 0.1 * gradient * (expected / norm), atol=1e-6, rtol=1e-4)


def test_a_zero_gradient_is_not_clipped_to_nan(network: nn.Module, data: Data) -> None:
    local = LocalModel(network, lambda model, x, y: 0 * model(x).sum())
    local.load(local.weights.clone(), local.buffers)
    assert not run(FedAvg(lr=0.1, batch_size=10, steps=2, max_grad_norm=1.0), local, data).update.any()


def test_the_schedule_scales_the_learning_rate(model: LocalModel, data: Data) -> None:
    gradient = full_gradient(model, data)
    for round in (0, 3):
        model.load(model.start, model.buffers)
        algorithm = FedAvg(lr=0.1, batch_size=10, steps=1, schedule=Exponential(0.5))
        expected = 0.1 * 0.5**round * gradient
        torch.testing.assert_close(run(algorithm, model, data, round=round).update, expected, atol=1e-6, rtol=1e-4)


# FedProx


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.01, "max_grad_norm": 0.5, "schedule": Exponential(0.9)}])
@pytest.mark.parametrize("length", [{"epochs": 2}, {"steps": 5}])
def test_fedprox_without_mu_is_fedavg_bit_for_bit(
    options: dict[str, object], length: dict[str, int], model: LocalModel, data: Data
) -> None:
    plain = run(FedAvg(0.1, 4, **length, **options), model, data)
    model.load(model.start, model.buffers)
    prox = run(FedProx(0.0, lr=0.1, batch_size=4, **length, **options), model, data)
    assert torch.equal(plain.update, prox.update) and torch.equal(plain.loss, prox.loss)


class Point(nn.Module):
    """A model that is one vector of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, -1.0]))


@given(mu=st.floats(0, 3), lr=st.floats(0.01, 0.3), steps=st.integers(1, 20))
def test_fedprox_on_a_quadratic_is_exact(mu: float, lr: float, steps: int) -> None:
    """On (a/2)|w - c|^2 the way to w* = (a c + mu w_0) / (a + mu) shrinks by 1 - lr (a + mu) a step."""
    a, c = 2.0, torch.tensor([1.0, 0.5])
    local = LocalModel(Point(), lambda model, x, y: a / 2 * (model.w - c).square().sum())
    local.load(local.weights.clone(), local.buffers)
    start = local.start.double()
    best = (a * c.double() + mu * start) / (a + mu)
    expected = best + (1 - lr * (a + mu)) ** steps * (start - best)
    result = run(FedProx(mu, lr=lr, batch_size=1, steps=steps), local, (torch.zeros(3, 1), torch.zeros(3)))
    torch.testing.assert_close(result.update.double(), start - expected, atol=1e-4, rtol=1e-4)


def test_a_larger_mu_stays_closer_to_the_start(model: LocalModel, data: Data) -> None:
    lengths = []
    for mu in (0.0, 0.5, 2.0, 5.0):
        model.load(model.start, model.buffers)
        lengths.append(float(run(FedProx(mu, lr=0.1, batch_size=4, steps=30), model, data).update.norm()))
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] < 0.5 * lengths[0]


# FedSGD


@given(batch_size=st.integers(1, 15), n=st.integers(1, 10))
def test_fedsgd_is_the_full_gradient_whatever_the_batch_size(batch_size: int, n: int) -> None:
    torch.manual_seed(0)
    local = LocalModel(nn.Linear(4, 3), cross_entropy)
    local.load(local.weights.clone(), local.buffers)
    data = torch.randn(n, 4), torch.randint(3, (n,))
    result = run(FedSGD(batch_size), local, data)
    torch.testing.assert_close(result.update, full_gradient(local, data), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(result.loss, cross_entropy(local.module, *data).detach())
    assert torch.equal(local.weights, local.start) and result.steps == 1


# Schedules and refusals


def test_schedules_are_the_formulas_of_their_docstrings() -> None:
    assert [Constant().factor(round) for round in (0, 1, 99)] == [1, 1, 1]
    assert [Exponential(0.5).factor(round) for round in range(3)] == [1, 0.5, 0.25]
    cosine = Cosine(rounds=10, final=0.1)
    assert [cosine.factor(round) for round in (0, 5, 10, 50)] == pytest.approx([1, 0.55, 0.1, 0.1])
    factors = [cosine.factor(round) for round in range(12)]
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedAvg(), "exactly one of `epochs` and `steps` but got epochs=None and steps=None"),
        (lambda: FedAvg(epochs=1, steps=1), "exactly one of `epochs` and `steps` but got epochs=1 and steps=1"),
        (lambda: FedAvg(epochs=0), "`epochs` >= 1 but got 0"),
        (lambda: FedAvg(steps=0), "`steps` >= 1 but got 0"),
        (lambda: FedAvg(batch_size=0, epochs=1), "`batch_size` >= 1 but got 0"),
        (lambda: FedAvg(lr=-0.1, epochs=1), "Expected `lr` > 0 but got -0.1$"),
        (lambda: FedAvg(momentum=1, epochs=1), r"Expected `momentum` in \[0, 1\) but got 1$"),
        (lambda: FedAvg(weight_decay=-1, epochs=1), "Expected `weight_decay` >= 0 but got -1$"),
        (lambda: FedAvg(max_grad_norm=0, epochs=1), "Expected `max_grad_norm` > 0 but got 0$"),
        (lambda: FedAvg(momentum=1, epochs=1), r"`momentum` in \[0, 1\)"),
        (lambda: FedAvg(weight_decay=-1, epochs=1), "`weight_decay` >= 0"),
        (lambda: FedAvg(max_grad_norm=0, epochs=1), "`max_grad_norm` > 0"),
        (lambda: FedProx(mu=-0.1, epochs=1), "`mu` >= 0 but got -0.1"),
        (lambda: FedSGD(batch_size=0), "`batch_size` >= 1 but got 0"),
        (lambda: Exponential(0), r"`decay` in \(0, 1\] but got 0"),
        (lambda: Cosine(0), "`rounds` >= 1 but got 0"),
    ],
)
def test_arguments_out_of_range_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
