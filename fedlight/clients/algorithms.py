"""Local training in one round. Each algorithm is one class and returns an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlight.clients.local_model import LocalModel
from fedlight.clients.schedule import Constant, Schedule
from fedlight.core.codec import State
from fedlight.core.errors import require
from fedlight.core.layout import flat_gradient


@dataclass(frozen=True)
class LocalResult:
    """The result of local training: the update ``[dim]``, the mean loss over its steps (0-d) and the number of steps.

    The server needs the means of ``others`` (vectors ``[dim]``, in the update's units) and ``scalars`` as well; ``upload`` is all that is
    averaged as one vector ``[vectors * dim + scalars]``, the codec's input.
    """

    update: Tensor
    loss: Tensor
    steps: int
    others: tuple[Tensor, ...] = ()
    scalars: tuple[float, ...] = ()
    upload: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        more = [*self.others, self.update.new_tensor(self.scalars)] if self.others or self.scalars else []
        object.__setattr__(self, "upload", torch.cat([self.update, *more]) if more else self.update)


@dataclass
class Memory:
    """What a client knows beyond the global model: its own state, changed in place, and the server's broadcast."""

    own: State = field(default_factory=dict)
    server: Mapping[str, Any] = field(default_factory=dict)


class Algorithm(ABC):
    """Local training, from the global weights in ``model`` and a client's data to its update, and the server's use of the mean.

    Attributes:
        vectors: number of vectors ``[dim]`` that a client uploads: the update, and others to average.
        scalars: number of further numbers that it uploads; the server uses only sums of vectors and numbers.
        client_state: whether clients keep state from one of their rounds to the next.
        replayable: whether the server's step is the mean update itself, so that clients can repeat it from the sum of codes.
        shared: whether every weight must be common to all clients (then BatchNorm layers cannot stay local).
        personal_models: whether clients keep personal models, which ``personal`` returns.
    """

    vectors: int = 1
    scalars: int = 0
    client_state: bool = False
    replayable: bool = True
    shared: bool = False
    personal_models: bool = False

    @abstractmethod
    def run(
        self, model: LocalModel, x: Tensor, y: Tensor, round: int, generator: torch.Generator, memory: Memory | None = None
    ) -> LocalResult:
        """Train on ``x`` ``[n, ...]`` and ``y`` ``[n]``; every draw comes from ``generator``. Without ``memory`` the client is new."""

    def work(self, samples: int) -> int:
        """Return how many samples a client with ``samples`` processes in a round, which determines its time."""
        return samples

    def broadcast(self, state: State) -> State:
        """Return the part of the server's state that it sends to clients before a round (counted as downlink)."""
        return {}

    def step(self, mean: Tensor, share: float, state: State) -> Tensor:
        """Return the server optimizer's gradient ``[dim]`` from the mean upload ``[vectors * dim + scalars]``.

        ``share`` is the share of all clients whose uploads are in the mean; ``state`` is the server's and may be changed in place.
        """
        return mean

    def personal(self, own: State) -> tuple[Tensor, Tensor] | None:
        """Return weights ``[dim]`` and buffers of a client's personal model, or None if it has none."""
        return None

    def check(self, model: LocalModel) -> None:  # noqa: B027  (most train anything)
        """Raise ``ConfigurationError``, before training starts, if the model cannot be trained this way."""


def check_local_steps(epochs: int | None, steps: int | None, batch_size: int) -> None:
    """Raise ``ConfigurationError`` unless one of ``epochs`` and ``steps`` is given and every count is at least 1."""
    require((epochs is None) != (steps is None), f"Expected exactly one of `epochs` and `steps` but got epochs={epochs} and steps={steps}")
    for name, count in (("epochs", epochs), ("steps", steps), ("batch_size", batch_size)):
        require(count is None or count >= 1, f"Expected `{name}` >= 1 but got {count}")


def local_samples(samples: int, epochs: int | None, steps: int | None, batch_size: int) -> int:
    """Return how many samples a client processes in a round of local epochs or steps."""
    return samples * epochs if epochs else min(samples, batch_size) * (steps or 1)


class FedAvg(Algorithm):
    """Local SGD; the update is the initial minus the final weights (McMahan et al. 2017, arXiv 1602.05629, Algorithm 1).

    Args:
        lr: client learning rate.
        batch_size: samples in a local batch.
        epochs: local epochs per round; give this or ``steps``.
        steps: local steps per round; give this or ``epochs``.
        momentum: heavy-ball momentum of the client's SGD, reset each round.
        weight_decay: L2 penalty added to the gradient.
        max_grad_norm: bound on the norm of each local gradient; none if not given.
        schedule: factor on ``lr`` that changes over rounds; constant if not given.

    Raises:
        ConfigurationError: if a number is out of range, or both or neither of ``epochs`` and ``steps`` are given.
    """

    def __init__(
        self,
        lr: float = 0.05,
        batch_size: int = 32,
        epochs: int | None = None,
        steps: int | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        check_local_steps(epochs, steps, batch_size)
        require(lr > 0, f"Expected `lr` > 0 but got {lr}")
        require(0 <= momentum < 1, f"Expected `momentum` in [0, 1) but got {momentum}")
        require(weight_decay >= 0, f"Expected `weight_decay` >= 0 but got {weight_decay}")
        require(max_grad_norm is None or max_grad_norm > 0, f"Expected `max_grad_norm` > 0 but got {max_grad_norm}")
        self.lr = lr
        self.batch_size = batch_size
        self.epochs = epochs
        self.steps = steps
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.schedule = schedule or Constant()

    def work(self, samples: int) -> int:
        """Return how many samples a client with ``samples`` processes in a round."""
        return local_samples(samples, self.epochs, self.steps, self.batch_size)

    @property
    def plain(self) -> bool:
        """Whether a step is ``weights -= lr * gradient`` and nothing else (then no flat gradient is built)."""
        return not (self.momentum or self.weight_decay or self.max_grad_norm)

    def direction(self, gradient: Tensor, model: LocalModel) -> Tensor:
        """Return the gradient ``[dim]`` that local SGD follows; algorithms add their terms here."""
        return gradient

    def correction(self, memory: Memory) -> Tensor | None:
        """Return the vector ``[dim]`` to add to every local gradient of a round, or None: from a client's or the server's state."""
        return None

    def run(
        self, model: LocalModel, x: Tensor, y: Tensor, round: int, generator: torch.Generator, memory: Memory | None = None
    ) -> LocalResult:
        """Run local SGD from ``model.start`` and return the update."""
        lr = self.lr * self.schedule.factor(round)
        velocity: Tensor | None = None
        correction = self.correction(memory or Memory())
        plain = self.plain and correction is None
        total, steps = torch.zeros((), device=y.device), 0
        for xb, yb in model.batches(x, y, self.batch_size, self.epochs, self.steps, generator):
            loss, grads = model.gradients(xb, yb)
            if plain:
                model.descend(grads, lr)
            else:
                velocity = self.descend(model, flat_gradient(grads), velocity, lr, correction, model.absent)
            total += loss
            steps += 1
        return LocalResult(model.update(), total / max(steps, 1), steps)

    def descend(
        self,
        model: LocalModel,
        gradient: Tensor,
        velocity: Tensor | None,
        lr: float,
        correction: Tensor | None = None,
        absent: Sequence[slice] = (),
    ) -> Tensor:
        """Move ``model.weights`` one step in place; return the step ``[dim]``, the next ``velocity`` (also changed in place).

        ``absent`` are the parts of the vector whose gradient is missing, not zero: as in torch they do not decay, nor move by momentum,
        unless the algorithm has a term of its own for every weight.
        """
        extra = correction is not None or type(self).direction is not FedAvg.direction
        with torch.no_grad():
            still = (
                []
                if extra
                else [(part, model.weights[part].clone(), None if velocity is None else velocity[part].clone()) for part in absent]
            )
            if self.weight_decay:
                gradient.add_(model.weights, alpha=self.weight_decay)
                for part in absent:
                    gradient[part] = 0
            step = self.direction(gradient, model)
            if correction is not None:
                step.add_(correction)
            if self.max_grad_norm is not None:
                step = step * (self.max_grad_norm / step.norm()).clamp(max=1.0)
            if self.momentum:
                step = step if velocity is None else velocity.mul_(self.momentum).add_(step)
            model.weights.sub_(step, alpha=lr)
            for part, weights, pace in still:
                model.weights[part] = weights
                step[part] = 0 if pace is None else pace
        return step


class FedProx(FedAvg):
    """FedAvg with a proximal term ``mu / 2 ||w - w_t||^2`` in every local loss (Li et al. 2020, arXiv 1812.06127, Eq. 2).

    Args:
        mu: weight of the proximal term; 0 is FedAvg.
        local: options of local SGD, those of `FedAvg`.
    """

    def __init__(self, mu: float = 0.01, **local: Any) -> None:
        super().__init__(**local)
        require(mu >= 0, f"Expected `mu` >= 0 but got {mu}")
        self.mu = mu

    @property
    def plain(self) -> bool:
        """Whether there is no extra term at all."""
        return super().plain and not self.mu

    def direction(self, gradient: Tensor, model: LocalModel) -> Tensor:
        """Return the gradient of the loss plus ``mu (w - w_t)``, ``[dim]``."""
        return super().direction(gradient, model).add_(model.weights, alpha=self.mu).sub_(model.start, alpha=self.mu)


class FedSGD(Algorithm):
    """One gradient over all of the client's data: the update *is* the gradient (McMahan et al. 2017, section 2).

    The server optimizer sets the learning rate.

    Args:
        batch_size: samples in memory at once; the gradient is the same for any value (up to rounding), BatchNorm aside.
    """

    def __init__(self, batch_size: int = 1024) -> None:
        require(batch_size >= 1, f"Expected `batch_size` >= 1 but got {batch_size}")
        self.batch_size = batch_size

    def run(
        self, model: LocalModel, x: Tensor, y: Tensor, round: int, generator: torch.Generator, memory: Memory | None = None
    ) -> LocalResult:
        """Return the full gradient at the global weights."""
        if model.augment is not None:
            x = model.augment(x, generator)
        update, total = torch.zeros_like(model.weights), torch.zeros((), device=y.device)
        xs = x.split(self.batch_size)  # type: ignore[no-untyped-call]
        for xb, yb in zip(xs, torch.split(y, self.batch_size), strict=True):
            share = len(yb) / len(y)
            loss, grads = model.gradients(xb, yb)
            update.add_(flat_gradient(grads), alpha=share)
            total += loss * share
        return LocalResult(update, total, 1)
