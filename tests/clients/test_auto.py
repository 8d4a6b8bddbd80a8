"""Laws of the choice of an engine: only what can train a run is tried, and a trial leaves nothing behind."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedlight.clients import Algorithm, Auto, FedAvg, FedProx, LocalModel, Scaffold
from fedlight.clients.auto import FAR, MARGIN, NAMES, PASSES, THREAD_PASSES, choose, race, time_threads
from fedlight.modules import MLP
from tests.clients.conftest import cross_entropy
from tests.clients.test_engine import tasks

MANY = FedAvg(lr=0.1, batch_size=2, epochs=5)


def local_model(network: nn.Module | None = None) -> LocalModel:
    torch.manual_seed(0)
    return LocalModel(network or MLP(6, [8], 3), cross_entropy)


def checked(model: LocalModel, algorithm: Algorithm = MANY, personal: bool = False) -> Auto:
    auto, (task, *_) = Auto(), tasks(model)
    auto.check(lambda: model, algorithm, (task.x, task.y), personal, model.weights.device)
    return auto


@given(st.lists(st.one_of(st.floats(1e-3, 1e3), st.just(math.inf)), min_size=3, max_size=3))
def test_nobody_saves_a_twentieth_of_the_chosen_one_s_time(times: list[float]) -> None:
    seconds = dict(zip(NAMES, times, strict=True))
    chosen = seconds[choose(seconds)]
    assert all(one >= (1 - MARGIN) * chosen for one in times)


def test_the_first_is_stayed_with_where_others_save_little() -> None:
    assert choose({"Sequential": 1.0, "Threaded": 0.96, "Vectorized": 0.97}) == "Sequential"


@pytest.mark.parametrize(
    ("network", "algorithm", "personal", "able"),
    [
        (lambda: MLP(6, [8], 3), MANY, False, ["Sequential", "Threaded", "Vectorized"]),
        (lambda: MLP(6, [8], 3), FedProx(0.1, lr=0.1, steps=2, batch_size=2), False, ["Sequential", "Threaded", "Vectorized"]),
        (lambda: MLP(6, [8], 3), Scaffold(lr=0.1, steps=2, batch_size=2), False, ["Sequential", "Threaded"]),
        (lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)), MANY, False, ["Sequential", "Threaded"]),
        (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), MANY, True, ["Sequential", "Threaded"]),
        (lambda: Drawing(6, 3), MANY, False, ["Sequential"]),
        (lambda: MLP(6, [80_000], 3), MANY, False, ["Sequential", "Threaded"]),
    ],
    ids=["plain", "proximal", "control variates", "dropout", "norms at home", "draws by itself", "large, on a CPU"],
)
def test_only_engines_that_can_train_the_run_are_tried(
    network: Callable[[], nn.Module], algorithm: Algorithm, personal: bool, able: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlight.clients.auto.cores_of_a_process", lambda: 2)
    model = local_model(network())
    before = generators()
    assert list(checked(model, algorithm, personal).candidates) == able
    assert generators() == before


class Drawing(nn.Linear):
    """Draws from a generator of the process's, and fails where it is run on many clients at once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch._C._functorch.is_batchedtensor(self.weight)
        return super().forward(x) + np.random.rand() + torch.rand(())  # noqa: NPY002


def generators() -> tuple[Any, ...]:
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), numpy[1].tolist(), random.getstate()  # type: ignore[index, union-attr]


@pytest.mark.parametrize("network", [lambda: MLP(6, [8], 3), lambda: Drawing(6, 3)], ids=["plain", "draws by itself"])
def test_a_trial_takes_a_time_with_each_engine_and_leaves_no_trace(network: Callable[[], nn.Module]) -> None:
    model = local_model(network())
    auto = checked(model)
    before, state, made = generators(), model.weights.clone(), []
    own = [parameter.detach().clone() for parameter in model.network.parameters()]

    def clients(count: int) -> Any:
        made.append(count)
        return tasks(model)[:count]

    seconds = auto.time(model, MANY, clients, cohort=4)
    assert list(seconds) == list(NAMES) and max(made) == 4
    assert {name for name, one in seconds.items() if one < math.inf} == set(auto.candidates)
    assert generators() == before and torch.equal(model.weights, state) and model.step == 0
    assert all(torch.equal(a, b) for a, b in zip(own, model.network.parameters(), strict=True))


def test_a_slow_client_takes_three_steps_of_its_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlight.clients.auto.CLIENT", 0.0)
    Counting.calls, model = 0, local_model(Counting(6, 3))
    time_threads(model, FedAvg(lr=0.1, batch_size=1, epochs=50), lambda count: tasks(model)[:count], 2)
    assert 0 < Counting.calls <= 2 + 2 * 3 * THREAD_PASSES


class Counting(nn.Linear):
    """Counts the calls of all its copies."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Counting.calls += 1
        return super().forward(x)


def test_timers_take_turns_until_one_is_far_behind() -> None:
    calls: list[str] = []
    times = {"a": iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0]), "b": iter([2.0] * PASSES), "c": iter([2.0 * FAR, *[1.0] * PASSES])}

    def timer(name: str) -> Callable[[], float]:
        return lambda: (calls.append(name), next(times[name]))[1]

    assert race({name: timer(name) for name in times}) == {"a": 1.0, "b": 2.0, "c": 1.0}
    assert calls[:6] == ["a", "b", "c"] * 2
    times = {"a": iter([1.0] * PASSES), "c": iter([1.1 * FAR])}
    assert race({name: timer(name) for name in times}) == {"a": 1.0, "c": 1.1 * FAR}


def test_more_threads_count_by_their_slowest_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other stand still whenever somebody else takes a core."""
    times = {1: iter([3.0, 2.0, 4.0, 2.5]), 2: iter([9.0, 1.0, 1.8, 1.2])}
    monkeypatch.setattr("fedlight.clients.auto._steps", lambda *arguments: 3)
    monkeypatch.setattr("fedlight.clients.auto.seconds_of", lambda *arguments: next(times[torch.get_num_threads()]))
    assert time_threads(local_model(), MANY, lambda count: [], 2) == (2.0, 1.8)
    assert torch.get_num_threads() == 1


def test_threads_are_put_back_after_a_trial() -> None:
    model = local_model()
    one, two = time_threads(model, MANY, lambda count: tasks(model)[:count], 2)
    assert 0 < one < math.inf and 0 < two < math.inf
    assert torch.get_num_threads() == 1


def test_one_that_cannot_train_the_run_is_not_taken() -> None:
    auto = checked(local_model(), Scaffold(lr=0.1, steps=2, batch_size=2))
    auto.take("Vectorized")
    assert not auto.chosen
    auto.take("Sequential")
    assert auto.chosen == "Sequential"
