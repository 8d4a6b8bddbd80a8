"""The model that a client trains: one flat vector of weights, changed in place and reused for every client of a process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fedlight.core.layout import FlatModel

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Maps (model, inputs ``[n, ...]``, targets ``[n]``) to a scalar mean loss."""

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""Maps (inputs ``[n, ...]``, the client's generator) to changed inputs."""


class LocalModel:
    """A private copy of the global model with flat weights, and the operations of local training.

    Attributes:
        weights: the current weights ``[dim]``, a view of the model's parameters.
        start: the weights ``[dim]`` at the start of the round.
        buffers: floating-point buffers ``[buffer_dim]`` (BatchNorm statistics), also a view.
        noise: the generator of its dropout; None for the device's own.
    """

    def __init__(
        self, network: nn.Module, objective: Objective, device: torch.device | None = None, augment: Augment | None = None
    ) -> None:
        module = copy.deepcopy(network)
        self.flat = FlatModel(module.to(device) if device is not None else module)
        self.module = self.flat.module.train()
        self.objective = objective
        self.augment = augment
        self.noise: torch.Generator | None = None
        self.weights = self.flat.weights
        self._pieces = self.flat.layout.split(self.weights)  # the parameters again, as tensors outside autograd
        self._parameters = tuple(self.flat.parameters)
        self._seed = torch.ones((), device=self.weights.device)  # the loss's derivative by itself
        self.start = torch.empty_like(self.weights)
        self.buffers = self.flat.buffers
        self._mixed = False  # whether local training runs under autocast: set in `load`, once per client
        # Counters (BatchNorm's batches seen) are not part of the global state: every client starts from the same ones.
        self._counters = [(b, b.clone()) for b in self.module.buffers() if not b.is_floating_point()]

    def load(self, weights: Tensor, buffers: Tensor) -> None:
        """Start from global weights ``[dim]`` and buffers ``[buffer_dim]``."""
        self.start = weights
        self.weights.copy_(weights)
        self._mixed = torch.is_autocast_enabled(weights.device.type)
        if len(self.buffers):
            self.buffers.copy_(buffers)
        for counter, first in self._counters:
            counter.copy_(first)

    def seed_noise(self, seed: int) -> None:
        """Seed the generators of dropout on the model's device."""
        if self.noise is not None:
            self.noise.manual_seed(seed)
            return
        # `torch.manual_seed` does this for every kind of accelerator, and keeps a stack trace forever for each that is not in use.
        if self.weights.device.type not in ("cpu", "cuda"):
            torch.manual_seed(seed)
            return
        torch.default_generator.manual_seed(seed)
        if self.weights.is_cuda:
            torch.cuda.default_generators[self.weights.device.index].manual_seed(seed)

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss (detached) and its gradient per parameter tensor on one batch."""
        if self._mixed:
            torch.clear_autocast_cache()  # it holds low-precision copies of weights that have been changed in place since
        loss = self.objective(self.module, x, y)
        grads = _derivatives(loss, self._seed, self._parameters)
        if any(grad is None for grad in grads):  # of a parameter that the loss does not depend on
            grads = tuple(torch.zeros_like(p) if g is None else g for g, p in zip(grads, self._pieces, strict=True))
        return loss.detach(), grads

    def loss(self, x: Tensor, y: Tensor, batch_size: int = 1024) -> float:
        """Return the mean loss of the current weights over all samples, without dropout, and without changing buffers."""
        self.module.eval()
        with torch.no_grad():
            parts = zip(x.split(batch_size), torch.split(y, batch_size), strict=True)  # type: ignore[no-untyped-call]
            total = sum(float(self.objective(self.module, xb, yb)) * len(yb) for xb, yb in parts)
        self.module.train()
        return total / len(y)

    def descend(self, grads: tuple[Tensor, ...], lr: float) -> None:
        """Take one plain SGD step without building a flat gradient: one fused pass over the weights."""
        torch._foreach_add_(self._pieces, grads, alpha=-lr)

    def update(self) -> Tensor:
        """Return the client's update ``start - weights`` ``[dim]`` as a new vector."""
        return self.start - self.weights

    def batches(
        self, x: Tensor, y: Tensor, batch_size: int, epochs: int | None, steps: int | None, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield shuffled, augmented batches: each epoch is gathered once and then sliced (see ``epoch_orders``)."""
        for order, size in epoch_orders(len(y), batch_size, epochs, steps, generator):
            index = order.to(y.device)
            xs, ys = x.index_select(0, index), y.index_select(0, index)  # copies rows: several times faster than x[index]
            if self.augment is not None:
                xs = self.augment(xs, generator)
            yield from zip(xs.split(size), torch.split(ys, size), strict=True)  # type: ignore[no-untyped-call]


def _derivatives(loss: Tensor, seed: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the result of ``torch.autograd.grad``, with None where the loss does not depend on a parameter.

    Calls autograd's engine directly: the checks of ``grad`` in Python take a sixth of a small model's step.
    """
    engine = torch.autograd.Variable._execution_engine
    return engine.run_backward((loss,), (seed,), False, False, parameters, allow_unreachable=True, accumulate_grad=False)


def epoch_orders(
    n: int, batch_size: int, epochs: int | None, steps: int | None, generator: torch.Generator
) -> Iterator[tuple[Tensor, int]]:
    """Yield (order ``[<= n]``, batch size) for every pass over ``n`` samples, for a number of epochs or of steps.

    With epochs, the last batch of each may be smaller. With steps, all batches are full (or the whole data set, if it is
    smaller than a batch), and samples are reshuffled whenever fewer than a batch are left.
    """
    if steps is None:
        for _ in range(epochs or 1):
            yield torch.randperm(n, generator=generator), batch_size
        return
    size = min(batch_size, n)
    while steps > 0:
        now = min(steps, n // size)
        yield torch.randperm(n, generator=generator)[: now * size], size
        steps -= now
