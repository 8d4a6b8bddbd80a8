"""FedNova: averaging of normalized updates (Wang et al. 2020, arXiv 2007.07481)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlight.clients.algorithms import FedAvg, LocalResult, Memory
from fedlight.clients.local_model import LocalModel
from fedlight.core.codec import State


class FedNova(FedAvg):
    """FedAvg in which clients that take more local steps do not count more: updates are averaged by step (Eq. 5).

    A client uploads its update divided by its effective number of steps ``a_i``, and ``a_i``; the server multiplies the two
    means. It needs no single client's number of steps, but clients send it in the clear: SecureAggregator refuses this algorithm.
    """

    scalars = 1
    replayable = False

    def run(
        self, model: LocalModel, x: Tensor, y: Tensor, round: int, generator: torch.Generator, memory: Memory | None = None
    ) -> LocalResult:
        """Run local SGD and return the update per effective step."""
        result = super().run(model, x, y, round, generator, memory)
        effective = effective_steps(result.steps, self.momentum)
        return LocalResult(result.update / effective, result.loss, result.steps, scalars=(effective,))

    def step(self, mean: Tensor, share: float, state: State) -> Tensor:
        """Return the mean normalized update times the mean number of effective steps."""
        return mean[:-1] * mean[-1]


def effective_steps(steps: int, momentum: float) -> float:
    """Return the total weight of a round's gradients in the update: ``||a||_1`` of the paper's section 4.2.

    >>> effective_steps(3, 0.0), effective_steps(2, 0.5)
    (3.0, 2.5)
    """
    if not momentum:
        return float(steps)
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
