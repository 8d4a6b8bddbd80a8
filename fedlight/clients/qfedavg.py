"""q-FedAvg: fair resource allocation (Li et al. 2020, arXiv 1905.10497)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedlight.clients.algorithms import FedAvg, LocalResult, Memory
from fedlight.clients.local_model import LocalModel
from fedlight.core.codec import State
from fedlight.core.errors import require

_LEAST_LOSS = 1e-6


class QFedAvg(FedAvg):
    """FedAvg in which clients with higher loss ``F_i`` at the global model count more, by ``F_i ** q`` (Algorithm 2).

    With ``L = 1 / lr`` a client uploads ``F_i^q u_i``, its part ``q F_i^(q-1) L ||u_i||^2 + F_i^q`` of the step's denominator and ``F_i``;
    the server divides the means of the first two. It needs only sums, but clients send their numbers in the clear: SecureAggregator
    refuses this algorithm. Losses are relative to the mean of the last round, which the server broadcasts: the step is the same, and
    the numbers keep their size.

    Args:
        q: extra weight of clients with high loss; 0 is FedAvg.
        local: options of local SGD, those of `FedAvg`.
    """

    scalars = 2
    replayable = False

    def __init__(self, q: float = 1.0, **local: Any) -> None:
        super().__init__(**local)
        require(q >= 0, f"Expected `q` >= 0 but got {q}")
        self.q = q

    def work(self, samples: int) -> int:
        """Return how many samples a client with so many goes through in a round: all of its own once more, for the global model's loss."""
        return samples + super().work(samples)

    def run(
        self, model: LocalModel, x: Tensor, y: Tensor, round: int, generator: torch.Generator, memory: Memory | None = None
    ) -> LocalResult:
        """Measure the loss of the global model, run local SGD and weight the update."""
        level = float((memory or Memory()).server.get("level", 1.0))
        loss = max(model.loss(x, y), _LEAST_LOSS)
        result = super().run(model, x, y, round, generator, memory)
        relative = loss / level
        square = float(result.update.square().sum()) / (self.lr * self.schedule.factor(round) * level)
        part = self.q * relative ** (self.q - 1) * square + relative**self.q
        return LocalResult(result.update * relative**self.q, result.loss, result.steps, scalars=(part, loss))

    def broadcast(self, state: State) -> State:
        """Return the last round's mean loss, if there is one."""
        return {"level": state["level"]} if "level" in state else {}

    def step(self, mean: Tensor, share: float, state: State) -> Tensor:
        """Return the mean of the weighted updates divided by the mean of the denominators."""
        state["level"] = max(float(mean[-1]), _LEAST_LOSS)
        return mean[:-2] / mean[-2].clamp(min=_LEAST_LOSS)
