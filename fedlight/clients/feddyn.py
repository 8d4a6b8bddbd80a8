"""FedDyn: dynamic regularization (Acar et al. 2021, arXiv 2111.04263)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedlight.clients.algorithms import FedProx, LocalResult, Memory
from fedlight.clients.local_model import LocalModel
from fedlight.core.codec import State
from fedlight.core.errors import require


class FedDyn(FedProx):
    """Local SGD on ``F_i(w) - <g_i, w> + alpha / 2 ||w - w_t||^2`` with a client's own linear term (Algorithm 1).

    Afterwards ``g_i`` becomes ``g_i - alpha (w_i - w_t)``; the server adds up the updates of all rounds, weighted by the share of clients
    that took part, and steps along the mean update plus this sum (its ``h / alpha``). Meant for a server optimizer of learning rate 1.

    Args:
        alpha: weight of the regularizer; 0 is FedAvg.
        local: options of local SGD, those of `FedAvg`, without momentum.
    """

    client_state = True
    replayable = False
    shared = True

    def __init__(self, alpha: float = 0.1, **local: Any) -> None:
        require(alpha >= 0, f"Expected `alpha` >= 0 but got {alpha}")
        super().__init__(mu=alpha, momentum=0.0, **local)
        self.alpha = alpha

    def correction(self, memory: Memory) -> Tensor | None:
        """Return ``-g_i`` ``[dim]``, None in the client's first round."""
        own = memory.own.get("gradient")
        return None if own is None else -own

    def run(
        self, model: LocalModel, x: Tensor, y: Tensor, round: int, generator: torch.Generator, memory: Memory | None = None
    ) -> LocalResult:
        """Run local SGD and update the client's linear term."""
        memory = memory or Memory()
        if "gradient" in memory.own:
            memory.own["gradient"] = memory.own["gradient"].to(model.weights)
        result = super().run(model, x, y, round, generator, memory)
        if self.alpha:
            moved = self.alpha * result.update
            memory.own["gradient"] = (memory.own.get("gradient", 0) + moved).cpu()
        return result

    def step(self, mean: Tensor, share: float, state: State) -> Tensor:
        """Return the mean update plus the weighted sum of all rounds' updates."""
        if not self.alpha:
            return mean
        state["drift"] = state["drift"].to(mean) + share * mean if "drift" in state else share * mean
        total: Tensor = mean + state["drift"]
        return total
