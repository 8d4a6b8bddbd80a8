"""The model that a client trains: one flat vector of weights, changed in place and reused for every client of a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedlight.clients.copying import own_copy
from fedlight.clients.memento import Memento
from fedlight.core.buffers import ClientExtras
from fedlight.core.errors import ConfigurationError
from fedlight.core.layout import FlatModel, absent, as_real, derivatives
from fedlight.core.orders import Ordered, Visit, epoch_lengths, epoch_orders
from fedlight.core.random import seed_process

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Maps (model, inputs ``[n, ...]``, targets ``[n]``) to a scalar mean loss."""

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Maps (inputs ``[n, ...]``, the client's generator) to changed inputs."""


class LocalModel:
    """A private copy of the global model with flat weights, and the operations of local training.

    Every client begins with all of it as it was made, whatever the one before did to it.

    Attributes:
        weights: the current weights ``[dim]``, a view of the model's parameters.
        start: the weights ``[dim]`` at the start of the round.
        noise: the generator of its dropout; None for the device's own.
        visit: the client's part of the round that it trains in.
        step: local steps that the client has begun in it.
        first: the loss (0-d) of its first one, None before it.
        ends_epoch: whether the current batch is the last one of its epoch.
        schedules: learning-rate schedules of clients' own optimizers, where an earlier round left them.
        reached: whether the last loss reached each parameter; an optimizer leaves the others alone.
    """

    def __init__(
        self, network: nn.Module, objective: Objective, device: torch.device | None = None, augment: Augment | None = None
    ) -> None:
        module = own_copy(network)
        self._modes = self.modes(module)
        self._train(module)
        self.flat = FlatModel(module.to(device) if device is not None else module)
        self.module = self.flat.module
        self.network = network
        self.objective = objective
        self.augment = augment
        self.noise: torch.Generator | None = None
        self.visit = Visit()
        self.step = 0
        self.first: Tensor | None = None
        self.ends_epoch = False
        self.schedules: dict[tuple[int, ...], Any] = {}
        self.weights = self.flat.weights
        self._pieces = self.flat.layout.split(self.weights)  # the parameters again, as tensors outside autograd
        self._parameters = tuple(self.flat.parameters)
        self.reached = [True] * len(self._parameters)
        self._seed = torch.ones((), device=self.weights.device)  # the loss's derivative by itself
        self.start = torch.empty_like(self.weights)
        self.extras = ClientExtras(self.module, network)
        self._memento: Memento | None = None
        self._mixed = False  # whether local training runs under autocast: set in `load`, once per client

    @property
    def buffers(self) -> Tensor:
        """Running statistics ``[buffer_dim]`` of normalisation layers, also a view."""
        return self.flat.buffers

    def modes(self, module: nn.Module) -> list[bool]:
        """Return which parts of a module train, in the order of ``modules()``: parts that were left in evaluation mode do not.

        A network that is in evaluation mode as a whole is one that was looked at last, and trains.
        """
        return [part.training or not module.training for part in module.modules()]

    def _train(self, module: nn.Module) -> None:
        """Put every part into the mode that it is trained in."""
        for part, mode in zip(module.modules(), self._modes, strict=True):
            part.training = mode

    def load(self, weights: Tensor, buffers: Tensor, extras: Mapping[str, Tensor] | None = None) -> None:
        """Start from global weights ``[dim]``, buffers ``[buffer_dim]`` and the server's ``extras``, and in the network's own modes."""
        if self._memento is None:
            self._memento = Memento(self.module)
        self._memento.put_back()
        self.start, self.step, self.first = weights, 0, None
        self.flat.attach()
        self.weights.copy_(weights)
        self._mixed = torch.is_autocast_enabled(weights.device.type)
        if len(self.buffers):
            self.buffers.copy_(buffers)
        self.extras.load(extras or {})
        self._train(self.module)

    def seed_noise(self, seed: int) -> None:
        """Seed the generators that the network holds and that of its dropout; without one, all that the process draws from.

        These are torch's, NumPy's and Python's.
        """
        if self._memento is not None:
            self._memento.seed(seed)
        if self.noise is not None:
            self.noise.manual_seed(seed)
            return
        seed_process(seed)
        # `torch.manual_seed` does this for every kind of accelerator, and keeps a stack trace forever for each that is not in use.
        if self.weights.device.type not in ("cpu", "cuda"):
            torch.manual_seed(seed)
            return
        torch.default_generator.manual_seed(seed)
        if self.weights.is_cuda:
            torch.cuda.default_generators[self.weights.device.index].manual_seed(seed)

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss (detached) and its gradient per parameter tensor on one batch, of any kind (``fedlight.core.layout``).

        It is zero where there is none, which ``reached`` says.
        """
        self.step += 1
        if self._mixed:
            torch.clear_autocast_cache()  # it holds low-precision copies of weights that have been changed in place since
        loss = self.objective(self.module, x, y)
        if loss.dim():
            if loss.numel() != 1:
                raise ConfigurationError(
                    f"Expected a loss of one number but got one of shape {list(loss.shape)}: reduce it, such as by `.mean()`"
                )
            loss = loss.reshape(())
        if self.first is None:
            self.first = loss.detach()
        found = derivatives(loss, self._seed, self._parameters)
        self.flat.take_over()
        self.reached = [gradient is not None for gradient in found]
        grads = tuple(torch.zeros_like(p.detach()) if g is None else g for g, p in zip(found, self._parameters, strict=True))
        return loss.detach(), grads

    @property
    def absent(self) -> list[slice]:
        """The parts of the flat vector that the last loss did not reach."""
        return absent(self.flat.layout, self.reached)

    def loss(self, x: Tensor, y: Tensor, batch_size: int = 1024) -> float:
        """Return the mean loss of the current weights over all samples, without dropout, and without changing buffers."""
        self.module.eval()
        with torch.no_grad():
            parts = zip(x.split(batch_size), torch.split(y, batch_size), strict=True)  # type: ignore[no-untyped-call]
            total = sum(float(self.objective(self.module, xb, yb)) * len(yb) for xb, yb in parts)
        self._train(self.module)
        return total / len(y)

    def attend(self, optimizer: Optimizer, schedulers: Sequence[Any]) -> None:  # (a plain network never asks)
        """Hear which optimizer steps the model in this round, and by which schedules."""

    def descend(self, grads: tuple[Tensor, ...], lr: float) -> None:
        """Take one plain SGD step without building a flat gradient: one fused pass over the weights."""
        torch._foreach_add_(self._pieces, [as_real(gradient) for gradient in grads], alpha=-lr)

    def update(self) -> Tensor:
        """Return the client's update ``start - weights`` ``[dim]`` as a new vector."""
        self.flat.take_over()
        for parameter in self._parameters:
            parameter.grad = None
        return self.start - self.weights

    def plan(self, x: Tensor, batch_size: int, epochs: int | None, steps: int | None) -> Visit:
        """Say how many batches the client is about to take, epoch by epoch."""
        settings = (batch_size, epochs, steps)
        self.visit = Visit(self.visit.round, x.lengths(*settings) if isinstance(x, Ordered) else epoch_lengths(len(x), *settings))
        return self.visit

    def epochs(
        self, x: Tensor, y: Tensor, batch_size: int, epochs: int | None, steps: int | None, generator: torch.Generator
    ) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
        """Yield the augmented batches of every epoch: of every pass, or of the whole round where the number of steps is given.

        Samples say their order themselves (``Ordered``), or are shuffled in every pass (``epoch_orders``).
        """
        self.plan(x, batch_size, epochs, steps)
        if isinstance(x, Ordered):
            orders = x.orders(batch_size, epochs, steps, self.visit.round, generator)
        else:
            orders = epoch_orders(len(y), batch_size, epochs, steps, generator)
        if steps is not None:
            yield self._batches(x, y, orders, steps, generator)
            return
        for one, count in zip(orders, self.visit.lengths, strict=True):
            yield self._batches(x, y, iter([one]), count, generator)

    def _batches(
        self, x: Tensor, y: Tensor, orders: Iterator[tuple[Tensor, int]], count: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the ``count`` batches of an epoch: what each pass takes is gathered once and then sliced."""
        number = 0
        for order, size in orders:
            index = order.to(y.device)
            xs, ys = x.index_select(0, index), y.index_select(0, index)  # copies rows: several times faster than x[index]
            if self.augment is not None:
                xs = self.augment(xs, generator)
            for batch in zip(xs.split(size), torch.split(ys, size), strict=True):  # type: ignore[no-untyped-call]
                number += 1
                self.ends_epoch = number == count
                yield batch

    def batches(
        self, x: Tensor, y: Tensor, batch_size: int, epochs: int | None, steps: int | None, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of all epochs."""
        for one in self.epochs(x, y, batch_size, epochs, steps, generator):
            yield from one


def ends_after(steps: int) -> type[LocalModel]:
    """Return a kind of model whose local training ends after a few steps."""

    class Short(LocalModel):
        def batches(self, *arguments: Any) -> Iterator[tuple[Tensor, Tensor]]:
            return islice(super().batches(*arguments), steps)

    return Short
