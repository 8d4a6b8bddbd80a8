"""Laws of the engines: the vectorised one gives every client the update that it gets by itself, or refuses before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlight.clients import ClientTask, Engine, FedAvg, FedProx, FedSGD, LocalModel, LocalResult, Sequential, Threaded, Vectorized
from fedlight.clients.engine import in_company
from fedlight.core.errors import ConfigurationError
from fedlight.modules import MLP, LeNet5, SmallCNN
from tests.clients.conftest import cross_entropy
from tests.clients.test_algorithms import ALGORITHMS

SIZES = (10, 7, 4, 12, 9)
TOLERANCE = 1e-5  # relative distance of updates in float32: what the docstring states
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (lambda: MLP(6, [8], 3), (6,)),
    "convolutions": (lambda: LeNet5(num_classes=3, image_size=12), (1, 12, 12)),
    "group norm": (lambda: SmallCNN(num_classes=3, image_size=18, norm="group"), (3, 18, 18)),
    "batch norm without statistics": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3)),
        (6,),
    ),
    "partly frozen": (lambda: frozen(MLP(6, [8, 8], 3)), (6,)),
}


class Branching(nn.Linear):
    """Looks at the numbers it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > 0 else -super().forward(x)


class Counting(nn.Linear):
    """Remembers how often it was called."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def frozen(network: nn.Module) -> nn.Module:
    next(network.parameters()).requires_grad_(False)
    return network


ENGINES: dict[str, Callable[[], Engine]] = {"vectorized": lambda: Vectorized(5), "threaded": lambda: Threaded(2)}
"""Laws that hold of every engine but the one that all are compared with."""

any_engine = pytest.mark.parametrize("make", ENGINES.values(), ids=ENGINES)


def local_model(network: str | nn.Module = "perceptron", dtype: torch.dtype = torch.float32) -> LocalModel:
    torch.manual_seed(0)
    made = NETWORKS[network][0]() if isinstance(network, str) else network
    local = LocalModel(made.to(dtype), cross_entropy)
    local.load(local.weights.clone(), local.buffers.clone())
    return local


def tasks(model: LocalModel, shape: tuple[int, ...] = (6,), sizes: tuple[int, ...] = SIZES, spoilt: int | None = None) -> list[ClientTask]:
    """Clients of these sizes; the data of the one that is spoilt is not finite."""
    made = []
    for client, size in enumerate(sizes):
        draws = torch.Generator().manual_seed(client)
        x = torch.randn(size, *shape, generator=draws).to(model.weights.dtype)
        y = torch.randint(3, (size,), generator=draws)
        if client == spoilt:
            x[0] = float("nan")
            x[-1] = float("inf")
        made.append(ClientTask(client, x, y, model.start, model.buffers.clone(), torch.Generator().manual_seed(100 + client), 200 + client))
    return made


def results(engine: Engine, model: LocalModel, algorithm: Any, made: list[ClientTask], round: int = 2) -> list[LocalResult]:
    found = list(engine.train(model, algorithm, made, round))
    assert [task for task, *_ in found] == made
    return [result for _, result, _ in found]


def assert_same(ours: list[LocalResult], theirs: list[LocalResult], tolerance: float = TOLERANCE) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert float(other.update.norm()) > 0
        assert float((mine.update - other.update).norm()) <= tolerance * float(other.update.norm())
        assert abs(float(mine.loss - other.loss)) <= 1e-5  # summed in float32, whatever the weights are
        assert mine.steps == other.steps


def check(engine: Engine, model: LocalModel, algorithm: Any, x: Any = None, personal: bool = False) -> None:
    data = (tasks(model)[0].x if x is None else x, tasks(model)[0].y)
    engine.check(lambda: model, algorithm, data, personal, model.weights.device)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_the_same_updates_or_is_refused(name: str) -> None:
    model, algorithm = local_model(), ALGORITHMS[name]()
    if type(algorithm) not in (FedAvg, FedProx):
        with pytest.raises(ConfigurationError, match="`algorithm`.*engine Sequential"):
            check(Vectorized(), model, algorithm)
        return
    check(Vectorized(), model, algorithm)
    assert_same(results(Vectorized(3), model, algorithm, tasks(model)), results(Sequential(), model, algorithm, tasks(model)))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_has_the_same_updates(name: str) -> None:
    model, shape = local_model(name), NETWORKS[name][1]
    algorithm = FedAvg(lr=0.05, batch_size=4, steps=10, momentum=0.5)
    both = [results(engine, model, algorithm, tasks(model, shape)) for engine in (Vectorized(3), Sequential())]
    assert_same(*both)


@settings(max_examples=12)  # hundreds of steps each
@given(
    sizes=st.lists(st.integers(1, 13), min_size=1, max_size=5).map(tuple),
    clients=st.integers(1, 4),
    batch_size=st.integers(2, 6),
    passes=st.sampled_from([{"epochs": 1}, {"epochs": 2}, {"steps": 4}]),
)
def test_clients_of_any_sizes_in_chunks_of_any_size_have_their_own_updates(
    sizes: tuple[int, ...], clients: int, batch_size: int, passes: dict[str, int]
) -> None:
    model = local_model(dtype=torch.float64)
    algorithm = FedProx(mu=0.5, lr=0.1, batch_size=batch_size, momentum=0.9, weight_decay=0.01, max_grad_norm=0.5, **passes)
    both = [results(engine, model, algorithm, tasks(model, sizes=sizes)) for engine in (Vectorized(clients), Sequential())]
    assert_same(*both, tolerance=1e-10)


@any_engine
def test_augmentation_draws_the_same_numbers(make: Callable[[], Engine]) -> None:
    model = local_model()
    model.augment = lambda x, generator: x + torch.randn(x.shape, generator=generator)
    algorithm = FedAvg(lr=0.1, batch_size=4, epochs=2)
    assert_same(*[results(engine, model, algorithm, tasks(model)) for engine in (make(), Sequential())])


@any_engine
def test_nothing_non_finite_of_one_client_reaches_another(make: Callable[[], Engine]) -> None:
    model, algorithm = local_model("convolutions"), FedAvg(lr=0.1, batch_size=4, epochs=2, momentum=0.5, max_grad_norm=1.0)
    shape = NETWORKS["convolutions"][1]
    clean = results(make(), model, algorithm, tasks(model, shape))
    spoilt = results(make(), model, algorithm, tasks(model, shape, spoilt=2))
    assert not torch.isfinite(spoilt[2].update).all()
    for client in (0, 1, 3, 4):
        assert torch.equal(spoilt[client].update, clean[client].update) and torch.equal(spoilt[client].loss, clean[client].loss)


def test_no_more_than_a_chunk_is_taken_before_its_results_are() -> None:
    model, taken = local_model(), []

    def one_by_one() -> Iterator[ClientTask]:
        for task in tasks(model):
            taken.append(task.client)
            yield task

    seen = [(task.client, len(taken)) for task, *_ in Vectorized(2).train(model, FedAvg(lr=0.1, batch_size=4, steps=1), one_by_one(), 0)]
    assert seen == [(0, 2), (1, 2), (2, 4), (3, 4), (4, 5)]


@any_engine
def test_updates_are_vectors_of_their_own(make: Callable[[], Engine]) -> None:
    model = local_model()
    first, second, *_ = results(make(), model, FedAvg(lr=0.1, batch_size=4, steps=1), tasks(model))
    kept = second.update.clone()
    first.update.fill_(1.0)
    assert torch.equal(second.update, kept) and second.update.untyped_storage().nbytes() == kept.untyped_storage().nbytes()


def test_batches_of_equal_size_go_together_and_each_clients_in_their_order() -> None:
    lengths = ([3, 3, 1], [3, 2], [3, 3, 3, 1], [])
    queues = [[(torch.full((n, 2), float(i)), torch.full((n,), k)) for k, n in enumerate(own)] for i, own in enumerate(lengths)]
    seen: dict[int, list[tuple[int, int]]] = {i: [] for i in range(len(lengths))}
    groups = []
    for group, x, y in in_company([iter(queue) for queue in queues]):
        groups.append(group)
        assert x.shape == (len(group), y.shape[1], 2)
        for i, own, places in zip(group, x, y, strict=True):
            assert (own == i).all()
            seen[i].append((int(places[0]), len(places)))
    assert seen == {i: list(enumerate(own)) for i, own in enumerate(lengths)}
    assert groups == [[0, 1, 2], [0, 2], [2], [0, 2], [1]]  # the last batches of one sample wait for each other


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)),
        nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)),
        nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, momentum=None)),
        Branching(6, 3),
        Counting(),
    ],
    ids=["dropout", "batch norm", "cumulative batch norm", "branching", "counting"],
)
def test_a_network_that_is_no_pure_function_is_refused(network: nn.Module) -> None:
    with pytest.raises(ConfigurationError, match="`network`.*`engine` Vectorized.*engine Sequential"):
        check(Vectorized(), local_model(network), FedAvg(steps=1))


def test_what_is_more_than_local_sgd_is_refused() -> None:
    class Remembering(FedAvg):
        def correction(self, memory: Any) -> Tensor | None:
            return memory.own.get("drift")

    class Curious(FedAvg):
        def direction(self, gradient: Tensor, model: LocalModel) -> Tensor:
            return gradient * model.loss(torch.zeros(1, 6), torch.zeros(1, dtype=torch.int64))

    model = local_model()
    for algorithm in (FedSGD(), Remembering(steps=1), Curious(steps=1)):
        with pytest.raises(ConfigurationError, match="`algorithm`.*`engine` Vectorized.*engine Sequential"):
            check(Vectorized(), model, algorithm)
    with pytest.raises(ConfigurationError, match="`batch_norm` mean"):
        check(Vectorized(), model, FedAvg(steps=1), personal=True)
    with pytest.raises(ConfigurationError, match="data in memory"):
        check(Vectorized(), model, FedAvg(steps=1), x=["not", "a", "tensor"])
    with pytest.raises(ConfigurationError, match="`clients` >= 1"):
        Vectorized(0)
