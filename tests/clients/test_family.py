"""Laws of whole rounds of an algorithm, without codec or Lightning: each equals FedAvg where its extra term is zero, rests at the optimum
of a convex problem, and does what its paper says of it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fedlight.clients import ClientOptimizer, Ditto, FedAvg, FedDyn, FedNova, FedProx, LocalModel, Memory, QFedAvg, Scaffold
from fedlight.clients.fednova import effective_steps
from tests.clients.test_algorithms import ALGORITHMS


class Point(nn.Module):
    """A model that is its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))


def quadratic(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``1/2 sum_j h_j (w_j - b_j)^2`` with curvatures and minimum in a client's one sample ``[1, 4]``."""
    h, b = x[0, :2], x[0, 2:]
    return 0.5 * (h * (model.w - b).square()).sum()


CLIENTS = [torch.tensor([[1.0, 0.2, 2.0, 1.0]]), torch.tensor([[0.1, 1.5, -3.0, 4.0]])]
OPTIMUM = sum(x[0, :2] * x[0, 2:] for x in CLIENTS) / sum(x[0, :2] for x in CLIENTS)


def federation(algorithm, rounds: int, start: Tensor | None = None, clients=CLIENTS, owns=None, state=None) -> Tensor:
    """Return the weights after rounds of all clients and a server of learning rate 1."""
    model = LocalModel(Point(), quadratic)
    weights = torch.zeros(2) if start is None else start.clone()
    owns, state = [{} for _ in clients] if owns is None else owns, {} if state is None else state
    for number in range(rounds):
        uploads = []
        for own, x in zip(owns, clients, strict=True):
            model.load(weights.clone(), model.buffers)
            generator = torch.Generator().manual_seed(number)
            memory = Memory(own, algorithm.broadcast(state))
            uploads.append(algorithm.run(model, x, torch.zeros(1), number, generator, memory).upload)
        weights = weights - algorithm.step(torch.stack(uploads).mean(0), 1.0, state)
    return weights


@pytest.mark.parametrize("samples", [1, 3, 4, 10])
@pytest.mark.parametrize("name", [*ALGORITHMS, "own optimizer, epochs", "own optimizer, steps"])
def test_its_work_is_the_samples_that_it_goes_through(name: str, samples: int) -> None:
    """In every round: as a new client and as one that remembers."""
    sgd = partial(torch.optim.SGD, lr=0.1)
    own = {"epochs": ClientOptimizer(sgd, batch_size=4, epochs=2), "steps": ClientOptimizer(sgd, batch_size=4, steps=5)}
    algorithm = ALGORITHMS[name]() if name in ALGORITHMS else own[name.rpartition(" ")[2]]
    gone_through = []

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        gone_through.append(len(y))
        return nn.functional.cross_entropy(model(x), y)

    model, memory = LocalModel(nn.Linear(4, 3), objective), Memory()
    for number in range(2):
        gone_through.clear()
        model.load(torch.zeros_like(model.weights), model.buffers.clone())
        memory.server = algorithm.broadcast({})
        algorithm.run(model, torch.ones(samples, 4), torch.arange(samples) % 3, number, torch.Generator(), memory)
        assert sum(gone_through) == algorithm.work(samples)


@pytest.mark.parametrize(
    "zero",
    [
        FedProx(0.0, lr=0.1, batch_size=1, steps=5),
        FedNova(0.1, 1, steps=5),
        FedDyn(0.0, lr=0.1, batch_size=1, steps=5),
        Ditto(0.5, lr=0.1, batch_size=1, steps=5),
        QFedAvg(0.0, lr=0.1, batch_size=1, steps=5),
    ],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_it_is_fedavg_where_its_extra_term_is_zero(zero):
    torch.testing.assert_close(federation(zero, 4), federation(FedAvg(0.1, 1, steps=5), 4), rtol=1e-5, atol=1e-6)


def test_the_first_round_of_scaffold_is_fedavg():
    assert torch.equal(federation(Scaffold(0.1, 1, 5), 1), federation(FedAvg(0.1, 1, steps=5), 1))


@pytest.mark.parametrize("algorithm", [Scaffold(0.1, 1, 10), FedDyn(0.5, lr=0.1, batch_size=1, steps=10)], ids=["scaffold", "feddyn"])
def test_corrected_clients_find_the_optimum_and_rest_there_where_fedavg_does_not(algorithm):
    owns, state = [{}, {}], {}
    found = federation(algorithm, 250, owns=owns, state=state)
    torch.testing.assert_close(found, OPTIMUM, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(federation(algorithm, 1, found, owns=owns, state=state), found, rtol=1e-4, atol=1e-4)
    assert (federation(FedAvg(0.1, 1, steps=10), 100) - OPTIMUM).norm() > 0.1


@pytest.mark.parametrize(
    "algorithm",
    [FedNova(0.1, 1, steps=5), QFedAvg(2.0, lr=0.1, batch_size=1, steps=5), Ditto(0.5, lr=0.1, batch_size=1, steps=5)],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_it_rests_at_an_optimum_that_clients_share(algorithm):
    shared = [x.clone() for x in CLIENTS]
    for x in shared:
        x[0, 2:] = torch.tensor([1.0, -2.0])
    optimum = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(federation(algorithm, 5, optimum, shared), optimum)


def test_scaffold_is_nearer_to_the_optimum_than_fedavg_after_as_many_rounds():
    scaffold, fedavg = (federation(algorithm, 40) for algorithm in (Scaffold(0.1, 1, 10), FedAvg(0.1, 1, steps=10)))
    assert (scaffold - OPTIMUM).norm() < 0.3 * (fedavg - OPTIMUM).norm()


def test_the_servers_control_variate_is_the_mean_of_the_clients():
    owns, state = [{}, {}], {}
    federation(Scaffold(0.1, 1, 10), 7, owns=owns, state=state)
    torch.testing.assert_close(state["control"], (owns[0]["control"] + owns[1]["control"]) / 2)


def test_fednova_counts_clients_alike_however_many_steps_they_take():
    """Of two clients with gradients as constants, one takes four times the steps: FedAvg follows it, FedNova the mean gradient."""

    def linear(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (model.w * x.mean(0)).sum()

    def step(algorithm) -> Tensor:
        local, uploads = LocalModel(Point(), linear), []
        for x in (torch.tensor([[1.0, 0.0]]).repeat(4, 1), torch.tensor([[0.0, 1.0]])):
            local.load(torch.zeros(2), local.buffers)
            uploads.append(algorithm.run(local, x, torch.zeros(len(x)), 0, torch.Generator().manual_seed(0)).upload)
        return algorithm.step(torch.stack(uploads).mean(0), 1.0, {})

    torch.testing.assert_close(step(FedAvg(0.1, 1, epochs=1)), torch.tensor([0.2, 0.05]))
    torch.testing.assert_close(step(FedNova(0.1, 1, epochs=1)), torch.tensor([0.125, 0.125]))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_effective_steps_count_how_far_a_constant_gradient_carries(momentum):
    velocity = total = 0.0
    for _ in range(7):
        velocity = momentum * velocity + 1
        total += velocity
    assert effective_steps(7, momentum) == pytest.approx(total)


def test_a_larger_q_brings_the_worst_client_nearer():
    def worst(q: float) -> float:
        end = federation(QFedAvg(q, lr=0.1, batch_size=1, steps=3), 300)
        return max(float(0.5 * (x[0, :2] * (end - x[0, 2:]).square()).sum()) for x in CLIENTS)

    assert worst(2.0) < worst(0.0)


def test_ditto_keeps_a_model_between_the_clients_own_and_the_global_one():
    ends = []
    for lam in (0.0, 0.5, 5.0):
        owns = [{}, {}]
        start = federation(Ditto(lam, lr=0.1, batch_size=1, steps=5), 60, owns=owns)
        ends.append(float((owns[0]["weights"] - start).norm()))
    assert ends == sorted(ends, reverse=True) and ends[-1] < 0.3 * ends[0]
    assert Ditto(0.1, steps=1).personal({}) is None and Ditto(0.1, steps=1).personal(owns[0]) is not None
