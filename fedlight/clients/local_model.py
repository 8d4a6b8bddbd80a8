"""The model a client trains: one flat vector of weights that is changed in place, reused for every client of a process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fedlight.core.layout import FlatModel

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Maps (model, inputs ``[n, ...]``, targets ``[n]``) to a scalar mean loss."""


class LocalModel:
    """A private copy of the global model with flat weights, and the few operations that local training is made of.

    Attributes:
        weights: the current weights ``[dim]``, a view that the model computes with.
        start: the weights ``[dim]`` that the round started from.
        buffers: floating-point buffers ``[buffer_dim]`` (BatchNorm statistics), also a view.
    """

    def __init__(self, network: nn.Module, objective: Objective, device: torch.device | None = None) -> None:
        module = copy.deepcopy(network)
        self.flat = FlatModel(module.to(device) if device is not None else module)
        self.module = self.flat.module.train()
        self.objective = objective
        self.weights = self.flat.weights
        self.start = torch.empty_like(self.weights)
        self.buffers = self.flat.buffers

    def load(self, weights: Tensor, buffers: Tensor) -> None:
        """Start from global weights ``[dim]`` and buffers ``[buffer_dim]``."""
        self.start = weights
        self.weights.copy_(weights)
        if len(self.buffers):
            self.buffers.copy_(buffers)

    def gradients(self, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss (detached) and its gradient per parameter tensor on one batch."""
        loss = self.objective(self.module, x, y)
        grads = torch.autograd.grad(loss, self.flat.parameters, allow_unused=True, materialize_grads=True)
        return loss.detach(), grads

    def descend(self, grads: tuple[Tensor, ...], lr: float) -> None:
        """Take one plain SGD step without building a flat gradient: one fused pass over the weights."""
        with torch.no_grad():
            torch._foreach_add_(self.flat.parameters, grads, alpha=-lr)

    def update(self) -> Tensor:
        """Return the client's update ``start - weights`` ``[dim]`` as a new vector."""
        return self.start - self.weights


def minibatches(
    x: Tensor, y: Tensor, batch_size: int, epochs: int | None, steps: int | None, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches for a number of epochs (the last batch of each may be smaller) or of steps.

    Counting steps, only full batches are taken (or the whole data set, where it is smaller than a batch), reshuffled
    whenever fewer samples than a batch are left. Each epoch is gathered once and then sliced.
    """
    n = len(y)
    if steps is None:
        for _ in range(epochs or 1):
            order = torch.randperm(n, generator=generator).to(y.device)
            xs, ys = x[order], y[order]
            for first in range(0, n, batch_size):
                yield xs[first : first + batch_size], ys[first : first + batch_size]
        return
    size = min(batch_size, n)
    while steps > 0:
        now = min(steps, n // size)
        order = torch.randperm(n, generator=generator)[: now * size].to(y.device)
        xs, ys = x[order], y[order]
        for first in range(0, now * size, size):
            yield xs[first : first + size], ys[first : first + size]
        steps -= now
