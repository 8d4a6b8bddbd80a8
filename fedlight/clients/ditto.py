"""Ditto: a personal model beside the global one (Li et al. 2021, arXiv 2012.04221)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlight.clients.algorithms import FedAvg, FedProx, LocalResult, Memory
from fedlight.clients.local_model import LocalModel
from fedlight.clients.schedule import Schedule
from fedlight.core.codec import State


class Ditto(FedAvg):
    """FedAvg, after which each client trains a model of its own that is held near the global one (Algorithm 1).

    The personal model follows the local gradient plus ``lam (v - w_t)``; it never leaves the client. The global model is FedAvg's,
    whatever ``lam``; 0 is local training alone.

    Args:
        lam: how strongly the personal model is pulled to the global one.
        lr: client learning rate, of both models.
        batch_size: samples in a local batch.
        epochs: local epochs a round, of both models; give this or ``steps``.
        steps: local steps a round, of both models; give this or ``epochs``.
        momentum: heavy-ball momentum of the client's SGD, started anew each round.
        weight_decay: L2 penalty added to the gradient.
        max_grad_norm: bound on the norm of each local gradient; none if not given.
        schedule: factor on ``lr`` that changes over rounds; constant if not given.
    """

    client_state = True

    def __init__(
        self,
        lam: float = 0.1,
        lr: float = 0.05,
        batch_size: int = 32,
        epochs: int | None = None,
        steps: int | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(lr, batch_size, epochs, steps, momentum, weight_decay, max_grad_norm, schedule)
        self.lam = lam
        self._pulled = FedProx(lam, lr, batch_size, epochs, steps, momentum, weight_decay, max_grad_norm, schedule)

    def run(
        self, model: LocalModel, x: Tensor, y: Tensor, round: int, generator: torch.Generator, memory: Memory | None = None
    ) -> LocalResult:
        """Run FedAvg, then train the personal model; nobody would remember that of a client without ``memory``."""
        result = super().run(model, x, y, round, generator)
        if memory is None:
            return result
        weights, buffers = model.weights.clone(), model.buffers.clone()
        own = memory.own
        model.weights.copy_(own["weights"] if own else model.start)
        if own:
            model.buffers.copy_(own["buffers"])
        self._pulled.run(model, x, y, round, generator)
        own["weights"], own["buffers"] = model.weights.cpu().clone(), model.buffers.cpu().clone()
        model.weights.copy_(weights)
        model.buffers.copy_(buffers)
        return result

    def personal(self, own: State) -> tuple[Tensor, Tensor] | None:
        """Return the personal model, once the client has trained one."""
        return (own["weights"], own["buffers"]) if own else None
