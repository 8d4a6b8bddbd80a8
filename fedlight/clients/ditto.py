"""Ditto: a personal model beside the global one (Li et al. 2021, arXiv 2012.04221)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedlight.clients.algorithms import FedAvg, FedProx, LocalResult, Memory
from fedlight.clients.local_model import LocalModel
from fedlight.core.codec import State


class Ditto(FedAvg):
    """FedAvg, after which each client trains a model of its own that is held near the global one (Algorithm 1).

    The personal model follows the local gradient plus ``lam (v - w_t)``; it never leaves the client. The global model is FedAvg's,
    whatever ``lam``; 0 is local training alone.

    Args:
        lam: how strongly the personal model is pulled to the global one.
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
