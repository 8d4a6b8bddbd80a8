"""Laws of clients in threads: each has the update that it gets by itself, bit for bit, and they do train at the same time."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedlight.clients import ClientTask, Engine, FedAvg, LocalModel, LocalResult, Sequential, Threaded
from fedlight.clients.layers import OwnDropout, own_dropout
from fedlight.core.errors import ConfigurationError, LocalTrainingError
from fedlight.core.process import cores_of_a_process
from fedlight.modules import BenchmarkCNN
from tests.clients.conftest import cross_entropy
from tests.clients.test_algorithms import ALGORITHMS
from tests.clients.test_engine import tasks as clients_of

WAIT = 60  # seconds after which a thread that waits for another gives up
SIZES = (10, 7, 4, 12, 9, 10, 3)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dropout": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)), (6,)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)), (6,)),
    "cumulative batch norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 3)), (6,)),
    "convolutions, pooling, dropout": (lambda: BenchmarkCNN(num_classes=3), (3, 32, 32)),
}


def local_model(name: str = "dropout") -> LocalModel:
    torch.manual_seed(0)
    local = LocalModel(NETWORKS[name][0](), cross_entropy)
    local.load(local.weights.clone(), local.buffers.clone())
    return local


def tasks(model: LocalModel, shape: tuple[int, ...] = (6,)) -> list[ClientTask]:
    return clients_of(model, shape, SIZES)


def train(engine: Engine, model: LocalModel, algorithm: Any, made: list[ClientTask]) -> list[tuple[int, LocalResult, Tensor, Tensor]]:
    """Return client, result, weights and buffers of every turn, as they are when it is handed on."""
    found = engine.train(model, algorithm, made, 2)
    return [(task.client, result, own.weights.clone(), own.buffers.clone()) for task, result, own in found]


def assert_equal(ours: list[tuple[int, LocalResult, Tensor, Tensor]], theirs: list[tuple[int, LocalResult, Tensor, Tensor]]) -> None:
    assert [client for client, *_ in ours] == [client for client, *_ in theirs] == list(range(len(SIZES)))
    for (_, mine, *kept), (_, other, *kept_too) in zip(ours, theirs, strict=True):
        assert float(other.update.norm()) > 0
        assert torch.equal(mine.upload, other.upload) and torch.equal(mine.loss, other.loss) and mine.steps == other.steps
        assert all(torch.equal(a, b) for a, b in zip(kept, kept_too, strict=True))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_the_same_updates_and_memories(name: str) -> None:
    algorithm, model = ALGORITHMS[name](), local_model()
    made = [tasks(model) for _ in range(2)]
    seen = [train(engine, model, algorithm, own) for engine, own in zip((Threaded(3), Sequential()), made, strict=True)]
    if name != "ditto":  # whose personal model is the last in the local one
        assert_equal(*seen)
    assert all(torch.equal(mine[1].upload, other[1].upload) for mine, other in zip(*seen, strict=True))
    for mine, other in zip(*made, strict=True):
        assert mine.memory.own.keys() == other.memory.own.keys()
        assert all(torch.equal(mine.memory.own[key], other.memory.own[key]) for key in mine.memory.own)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_has_the_same_updates_and_buffers(name: str) -> None:
    model, algorithm = local_model(name), FedAvg(lr=0.05, batch_size=3, steps=4, momentum=0.5)
    assert_equal(*[train(engine, model, algorithm, tasks(model, NETWORKS[name][1])) for engine in (Threaded(2), Sequential())])


@settings(max_examples=8)
@given(workers=st.integers(1, 5), augmented=st.booleans())
def test_any_number_of_threads_gives_the_same_updates_round_after_round(workers: int, augmented: bool) -> None:
    model, algorithm, engine = local_model(), FedAvg(lr=0.1, batch_size=4, epochs=2), Threaded(workers)
    if augmented:
        model.augment = lambda x, generator: x + torch.randn(x.shape, generator=generator)
    for _ in range(2):
        assert_equal(train(engine, model, algorithm, tasks(model)), train(Sequential(), model, algorithm, tasks(model)))


class Tied(nn.Module):
    """Uses one weight twice: autocast may cast it once or twice, and gradients add up in one precision or the other."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.square(self.square(x).tanh()).tanh())


@pytest.mark.parametrize("network", [None, Tied()])
def test_low_precision_reaches_the_threads(network: nn.Module | None) -> None:
    model, algorithm = local_model(), FedAvg(lr=0.1, batch_size=4, epochs=1)
    if network is not None:
        model = LocalModel(network, cross_entropy)
        model.load(model.weights.clone(), model.buffers.clone())
    full = train(Threaded(2), model, algorithm, tasks(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = [train(engine, model, algorithm, tasks(model)) for engine in (Threaded(2), Sequential())]
    assert_equal(*low)
    assert not torch.equal(low[0][0][1].update, full[0][1].update)


class Meets(FedAvg):
    """Clients that wait for each other, so many at a time."""

    def __init__(self, parties: int) -> None:
        super().__init__(lr=0.1, batch_size=4, steps=1)
        self.barrier = threading.Barrier(parties, timeout=WAIT)

    def run(self, *arguments: Any) -> LocalResult:
        self.barrier.wait()
        return super().run(*arguments)


def test_as_many_clients_as_there_are_threads_train_at_the_same_time() -> None:
    model = local_model()
    found = train(Threaded(3), model, Meets(3), tasks(model)[:6])
    assert [client for client, *_ in found] == list(range(6))


def test_no_more_clients_are_taken_than_there_are_models() -> None:
    model, taken, engine = local_model(), [], Threaded(2)

    def one_by_one() -> Iterator[ClientTask]:
        for task in tasks(model):
            taken.append(task.client)
            yield task

    for _ in range(2):
        taken.clear()
        seen = [len(taken) for _ in engine.train(model, FedAvg(lr=0.1, batch_size=4, steps=1), one_by_one(), 0)]
        assert seen == [4, 5, 6, 7, 7, 7, 7] and len(engine._models) == 4


def test_no_more_models_are_made_than_there_are_clients() -> None:
    model, engine = local_model(), Threaded(9)
    train(engine, model, FedAvg(lr=0.1, batch_size=4, steps=1), tasks(model))
    assert len(engine._models) == len(SIZES)


def test_threads_are_the_processs_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlight.core.process.usable_cores", lambda: 8)
    assert cores_of_a_process() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores_of_a_process() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert cores_of_a_process() == 1


def test_torch_has_its_threads_again_after_a_round() -> None:
    model, before = local_model(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = Threaded(1).train(model, FedAvg(lr=0.1, batch_size=4, steps=1), tasks(model), 0)
        next(found)
        assert torch.get_num_threads() == 1
        list(found)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def training_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fedlight-train")]


def test_a_clients_error_is_raised_with_its_number_and_leaves_no_thread() -> None:
    class Falls(FedAvg):
        def run(self, model: LocalModel, x: Tensor, *arguments: Any) -> LocalResult:
            if len(x) == SIZES[2]:
                raise ArithmeticError("in the third client")
            return super().run(model, x, *arguments)

    model = local_model()
    found = Threaded(2).train(model, Falls(lr=0.1, batch_size=4, steps=1), tasks(model), 0)
    assert [next(found)[0].client for _ in range(2)] == [0, 1]
    with pytest.raises(LocalTrainingError, match=r"Client 2 failed in round 0.*in the third client") as caught:
        next(found)
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert training_threads() == []


def test_a_round_that_is_given_up_leaves_no_thread() -> None:
    model = local_model()
    found = Threaded(2).train(model, FedAvg(lr=0.1, batch_size=4, steps=1), tasks(model), 0)
    next(found)
    assert training_threads()
    found.close()
    assert training_threads() == []


# Dropout


@settings(max_examples=30)
@given(
    p=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
    training=st.booleans(),
    inplace=st.booleans(),
    kind=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    last=st.booleans(),
)
def test_dropout_of_its_own_draws_what_torchs_does(
    p: float, seed: int, training: bool, inplace: bool, kind: torch.dtype, last: bool
) -> None:
    results = []
    for own in (True, False):
        layer = nn.Dropout(p, inplace).train(training)
        if own:
            own_dropout(layer).manual_seed(seed)
            assert isinstance(layer, OwnDropout)
        torch.manual_seed(0 if own else seed)
        x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1)).to(kind)
        x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
        y = layer(2 * x)
        results.append((y.detach(), torch.autograd.grad(y.float().square().sum(), x)[0]))
    (ours, slope), (theirs, slope_too) = results
    assert torch.equal(ours, theirs) and torch.equal(slope, slope_too)


def test_dropout_of_its_own_leaves_the_process_generator_alone() -> None:
    layer = nn.Dropout(0.5)
    own_dropout(layer)
    before = torch.get_rng_state()
    layer(torch.ones(100))
    assert torch.equal(torch.get_rng_state(), before)


# Refusals


class Functional(nn.Linear):
    """Draws from the process's generator."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


def check(model: LocalModel, x: Any = None, device: str = "cpu", algorithm: Any = None) -> None:
    data = (tasks(model)[0].x if x is None else x, tasks(model)[0].y)
    Threaded(2).check(lambda: model, algorithm or FedAvg(steps=1), data, True, torch.device(device))


@pytest.mark.parametrize("network", [Functional(6, 3), nn.Sequential(nn.Linear(6, 3), nn.AlphaDropout(0.5))], ids=["function", "alpha"])
def test_layers_that_draw_from_the_process_generator_are_refused(network: nn.Module) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ConfigurationError, match=r"its own generators under `engine` Threaded.*nn\.Dropout.*engine Sequential"):
        check(LocalModel(network, cross_entropy))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentations_and_algorithms_that_draw_from_it_are_refused() -> None:
    class Noisy(FedAvg):
        def direction(self, gradient: Tensor, model: LocalModel) -> Tensor:
            return gradient + torch.randn(gradient.shape)

    augmented = [local_model() for _ in range(3)]
    augmented[0].augment = lambda x, generator: x + torch.randn(x.shape)
    augmented[1].augment = lambda x, generator: x * random.random()
    augmented[2].augment = lambda x, generator: x * float(np.random.rand())  # noqa: NPY002 (that is the point)
    for model, algorithm in (*((one, None) for one in augmented), (local_model(), Noisy(steps=1, momentum=0.5))):
        with pytest.raises(ConfigurationError, match="its own generators under `engine` Threaded.*engine Sequential"):
            check(model, algorithm=algorithm)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_taken_and_leaves_the_global_generator_alone(name: str) -> None:
    model = local_model()
    before = torch.get_rng_state()  # of after the seed that the model was made from
    check(model, algorithm=ALGORITHMS[name]())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_try_takes_one_step() -> None:
    taken = []

    class Counted(FedAvg):
        def direction(self, gradient: Tensor, model: LocalModel) -> Tensor:
            taken.append(1)
            return gradient

    check(local_model(), algorithm=Counted(epochs=50, momentum=0.5))
    assert len(taken) == 1


def test_what_threads_cannot_keep_apart_is_refused() -> None:
    class Steps(LocalModel):
        pass

    check(local_model())
    with pytest.raises(ConfigurationError, match="plain network.*engine Sequential"):
        check(Steps(nn.Linear(6, 3), cross_entropy))
    with pytest.raises(ConfigurationError, match="data in memory.*engine Sequential"):
        check(local_model(), x=["not", "a", "tensor"])
    with pytest.raises(ConfigurationError, match="the CPU under `engine` Threaded but got cuda.*Sequential"):
        check(local_model(), device="cuda")
    with pytest.raises(ConfigurationError, match="`workers` >= 1 but got 0"):
        Threaded(0)
