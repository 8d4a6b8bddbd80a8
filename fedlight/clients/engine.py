"""How a process trains the clients of a cohort: one after another, or many at once as one computation on stacked weights.

For threads see `fedlight.clients.threaded`; which is fastest for a run, `fedlight.clients.auto` finds out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedlight.clients.algorithms import Algorithm, FedAvg, LocalResult, Memory
from fedlight.clients.layers import quicken_pooling
from fedlight.clients.local_model import LocalModel, Objective
from fedlight.core.codec import State
from fedlight.core.errors import ConfigurationError, LocalTrainingError, own_error, require
from fedlight.core.orders import Visit

Batch = tuple[Tensor, Tensor]


@dataclass
class ClientTask:
    """One client's part of a round: samples ``x`` ``[n, ...]`` and ``y`` ``[n]``, its initial weights ``[dim]`` and buffers.

    ``generator`` draws batches, the seed ``noise`` dropout; ``norm`` holds the client's personal normalization layers, if any, and
    ``extras`` what else training changed in the model so far.
    """

    client: int
    x: Tensor
    y: Tensor
    weights: Tensor
    buffers: Tensor
    generator: torch.Generator
    noise: int = 0
    memory: Memory = field(default_factory=Memory)
    norm: State = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)


Trained = Generator[tuple[ClientTask, LocalResult, LocalModel]]
"""Every task, with its result and the model that it was trained in."""


class Engine(ABC):
    """Trains clients. Law 5: a client's result does not depend on the other clients, and is equal to rounding under every engine."""

    @abstractmethod
    def train(self, model: LocalModel, algorithm: Algorithm, tasks: Iterable[ClientTask], round: int) -> Trained:
        """Yield every task, in order, with its result and the model, which holds that client's buffers until the next request."""

    def check(  # noqa: B027  (one after another, clients can do anything)
        self, make_model: Callable[[], LocalModel], algorithm: Algorithm, data: Batch, personal: bool, device: torch.device
    ) -> None:
        """Raise ``ConfigurationError``, before training starts, for what the engine cannot train.

        ``data`` is one client's; ``personal`` says whether clients keep personal normalization layers; rounds run on ``device``.
        """


def train_client(
    model: LocalModel, algorithm: Algorithm, task: ClientTask, round: int, precision: torch.dtype | None = None
) -> LocalResult:
    """Train one client from its own weights and draws, under autocast at ``precision``; raises ``LocalTrainingError`` for what fails."""
    # Without autocast's cache of cast weights, which all threads share: weights change between steps.
    with torch.autocast(task.weights.device.type, precision, cache_enabled=False) if precision else nullcontext():
        model.visit = Visit(round)
        model.load(task.weights, task.buffers, task.extras)  # it puts generators of the network's own back as well
        model.seed_noise(task.noise)
        try:
            return algorithm.run(model, task.x, task.y, round, task.generator, task.memory)
        except Exception as error:
            if own_error(error) is error:
                raise
            raise LocalTrainingError(
                f"Client {task.client} failed in round {round}, in local step {model.step} of its training: {type(error).__name__}: {error}"
            ) from error


def precision_on(device: torch.device) -> torch.dtype | None:
    """Return this thread's autocast precision on a device, None for full precision."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def require_plain(model: LocalModel, x: object, engine: str, why: str) -> None:
    """Raise ``ConfigurationError`` unless clients train a plain network on a tensor ``x`` of inputs, as ``engine`` needs."""
    if type(model) is not LocalModel or not isinstance(x, Tensor):
        raise ConfigurationError(
            f"Expected a plain network, a `loss` and data in memory under `engine` {engine} but got {type(model.module).__name__} on "
            f"{type(x).__name__}: {why}; use the engine Sequential"
        )


class Sequential(Engine):
    """One client after another in one model: every algorithm and every network."""

    def train(self, model: LocalModel, algorithm: Algorithm, tasks: Iterable[ClientTask], round: int) -> Trained:
        """Yield every task with its result and ``model``, whose max pooling is replaced by a faster one."""
        quicken_pooling(model.module)
        precision = precision_on(model.weights.device)
        for task in tasks:
            yield task, train_client(model, algorithm, task, round, precision), model


class Vectorized(Engine):
    """Local SGD of many clients at once, by ``torch.func.vmap`` over stacked weights ``[clients, dim]``: for a GPU and small models.

    Updates equal those of `Sequential` to rounding (relative distance below 1e-5 after ten local steps in float32); batches are the same.
    If rounding decides which of two numbers is larger, as in max pooling, a client's update sometimes differs by 1e-3.
    Clients of different sizes are neither padded nor masked: those with equally large next batches step together.

    Args:
        clients: number of clients trained at once; each takes memory for about five models (seven with momentum) plus its batches.

    Raises:
        ConfigurationError: if ``clients`` is less than 1, or (before training) if it cannot train: an algorithm other than FedAvg
            and FedProx, dropout, BatchNorm statistics, a LightningModule, data that is not in memory.
    """

    def __init__(self, clients: int = 32) -> None:
        require(clients >= 1, f"Expected `clients` >= 1 but got {clients}")
        self.clients = clients

    def train(self, model: LocalModel, algorithm: Algorithm, tasks: Iterable[ClientTask], round: int) -> Trained:
        """Train a chunk of clients at once, then yield their results one by one: only one chunk is in memory."""
        assert isinstance(algorithm, FedAvg)
        waiting = iter(tasks)
        while chunk := list(islice(waiting, self.clients)):
            for task, result in zip(chunk, _train_chunk(model, algorithm, chunk, round), strict=True):
                yield task, result, model

    def check(self, make_model: Callable[[], LocalModel], algorithm: Algorithm, data: Batch, personal: bool, device: torch.device) -> None:
        """Refuse everything except local SGD on tensors, and test the first step of two clients."""
        kind: Any = type(algorithm)
        # FedAvg, at most with another direction: no state, no second pass, no further uploads.
        if not (isinstance(algorithm, FedAvg) and kind.run is FedAvg.run and kind.correction is FedAvg.correction):
            raise ConfigurationError(
                "Expected an `algorithm` with local SGD only, FedAvg or FedProx, under `engine` Vectorized but got "
                f"{type(algorithm).__name__}: choose one of them, or the engine Sequential"
            )
        if personal:
            raise ConfigurationError(
                "Expected `batch_norm` mean under `engine` Vectorized, whose clients start from the same weights, but got local: "
                "use the engine Sequential"
            )
        model, (x, y) = make_model(), data
        name = type(model.module).__name__
        require_plain(model, x, "Vectorized", "steps of a LightningModule and batches of a data module are one client's")
        model.load(model.weights.clone(), model.buffers.clone())
        weights = model.weights.repeat(2, 1)
        try:
            together(model, algorithm, 0.0)(weights, weights.clone(), torch.stack([x[:2]] * 2), torch.stack([y[:2]] * 2))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(
                f"Expected a `network`, `loss` and `algorithm` that are pure functions under `engine` Vectorized but with {name} one is "
                "not: leave dropout out (clients would draw other numbers), take GroupNorm for BatchNorm, or use the engine Sequential. "
                f"In torch's words: {str(error).partition('.')[0]}"
            ) from error


def _train_chunk(model: LocalModel, algorithm: FedAvg, chunk: Sequence[ClientTask], round: int) -> Iterator[LocalResult]:
    model.load(chunk[0].weights, chunk[0].buffers, chunk[0].extras)
    weights = model.weights.repeat(len(chunk), 1)
    velocity = torch.zeros_like(weights) if algorithm.momentum else None
    totals, steps = weights.new_zeros(len(chunk)), [0] * len(chunk)
    absent = []
    if algorithm.weight_decay:  # which weights the loss does not reach is the same for all: their steps are one computation
        model.gradients(chunk[0].x[:1], chunk[0].y[:1])
        absent, model.first = model.absent, None  # that batch was nobody's step
    step = together(model, algorithm, algorithm.lr * algorithm.schedule.factor(round), absent)
    size, epochs, count = algorithm.batch_size, algorithm.epochs, algorithm.steps
    for group, x, y in in_company([model.batches(task.x, task.y, size, epochs, count, task.generator) for task in chunk]):
        if len(group) == len(chunk):
            totals += step(weights, velocity, x, y)
        else:
            rows = torch.tensor(group, device=weights.device)
            part, pace = weights[rows], None if velocity is None else velocity[rows]
            totals[rows] += step(part, pace, x, y)
            weights[rows] = part
            if velocity is not None and pace is not None:
                velocity[rows] = pace
        for i in group:
            steps[i] += 1
    for own, total, taken in zip(weights, totals, steps, strict=True):
        yield LocalResult(model.start - own, total / max(taken, 1), taken)


def in_company(queues: Sequence[Iterator[Batch]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield (which queues, x ``[clients, n, ...]``, y ``[clients, n]``) until all are empty, each queue's batches in their order.

    Queues with equally large next batches go together, most queues first, then largest batches: smaller last batches wait.
    """
    heads = [next(queue, None) for queue in queues]
    while True:
        alike: dict[int, list[int]] = {}
        for i, head in enumerate(heads):
            if head is not None:
                alike.setdefault(len(head[1]), []).append(i)
        if not alike:
            return
        group = alike[max(alike, key=lambda size: (len(alike[size]), size))]
        batches = [cast("Batch", heads[i]) for i in group]
        yield group, torch.stack([x for x, _ in batches]), torch.stack([y for _, y in batches])
        for i in group:
            heads[i] = next(queues[i], None)


def together(
    model: LocalModel, algorithm: FedAvg, lr: float, absent: Sequence[slice] = ()
) -> Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]:
    """Return a function for one step of many clients: it changes weights and velocities ``[clients, dim]`` in place, returns losses.

    It maps the algorithm's own step over clients, so no client's numbers can reach another's.
    """
    network, layout = _Objective(model.module, model.objective), model.flat.layout
    names = [f"network.{name}" for name in layout.names]

    def loss(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        pieces = dict(zip(names, layout.split(weights), strict=True))
        return cast("Tensor", torch.func.functional_call(network, pieces, (x, y)))

    def step(weights: Tensor, velocity: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
        gradient, value = torch.func.grad_and_value(loss)(weights, x, y)
        place = SimpleNamespace(weights=weights, start=model.start)  # all that an algorithm's direction depends on
        algorithm.descend(cast("LocalModel", place), gradient, velocity, lr, absent=absent)
        return cast("Tensor", value)

    axes = (0, 0 if algorithm.momentum else None, 0, 0)
    return torch.func.vmap(step, in_dims=axes, randomness="error")


class _Objective(nn.Module):
    """A network with its loss as one module, so that its parameters can be replaced for any loss."""

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network = network
        self.objective = objective

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss (0-d) of one client's batch."""
        return self.objective(self.network, x, y)
