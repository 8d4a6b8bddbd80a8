"""Ditto: a personal model in addition to the global one (Li et al. 2021, arXiv 2012.04221)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedlight.clients.algorithms import FedAvg, FedProx, LocalResult, Memory
from fedlight.clients.local_model import LocalModel
from fedlight.core.codec import State


class Ditto(FedAvg):
    """FedAvg; then each client trains a personal model that is regularized toward the global one (Algorithm 1).

    The personal model follows the local gradient plus ``lam (v - w_t)``; it never leaves the client. The global model is FedAvg's
    for any ``lam``; with 0 the personal model is trained only locally.

    Args:
        lam: strength of the regularization toward the global model.
        local: options of local SGD, those of `FedAvg`, for both models.
    """

    client_state = True
    personal_models = True

    def __init__(self, lam: float = 0.1, **local: Any) -> None:
        super().__init__(**local)
        self.lam = lam
        self._pulled = FedProx(lam, **local)

    def work(self, samples: int) -> int:
        """Return how many samples a client with so many goes through in a round: once for each of its models."""
        return super().work(samples) + self._pulled.work(samples)

    def run(
        self, model: LocalModel, x: Tensor, y: Tensor, round: int, generator: torch.Generator, memory: Memory | None = None
    ) -> LocalResult:
        """Run FedAvg, then train the personal model; without ``memory`` there is nowhere to store one."""
        result = super().run(model, x, y, round, generator)
        if memory is None:
            return result
        weights, buffers, extras = model.weights.clone(), model.buffers.clone(), model.extras.changed()
        own = memory.own
        model.weights.copy_(own["weights"] if own else model.start)
        if own:
            model.buffers.copy_(own["buffers"])
        self._pulled.run(model, x, y, round, generator)
        own["weights"], own["buffers"] = model.weights.cpu().clone(), model.buffers.cpu().clone()
        model.weights.copy_(weights)
        model.buffers.copy_(buffers)
        model.extras.rewind(extras)
        return result

    def personal(self, own: State) -> tuple[Tensor, Tensor] | None:
        """Return the personal model, if the client has trained one."""
        return (own["weights"], own["buffers"]) if own else None
