"""SCAFFOLD: control variates against client drift (Karimireddy et al. 2020, arXiv 1910.06378)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlight.clients.algorithms import FedAvg, LocalResult, Memory
from fedlight.clients.local_model import LocalModel
from fedlight.clients.schedule import Schedule
from fedlight.core.codec import State


class Scaffold(FedAvg):
    """Local SGD along ``g_i(y) - c_i + c``, where ``c_i`` is the client's and ``c`` the server's mean gradient (Algorithm 1, option II).

    After ``K`` steps ``c_i`` becomes ``c_i - c + (w_t - w_i) / (K lr)``. The client uploads its update and, in the update's units,
    ``K lr`` times the change of ``c_i``: two vectors, each encoded. Every client downloads ``c``, and its bytes count.
    All clients take equally many steps, as in the paper.

    Args:
        lr: client learning rate.
        batch_size: samples in a local batch.
        steps: local steps per round (K).
        weight_decay: L2 penalty added to the gradient.
        schedule: factor on ``lr`` that changes over rounds; constant if not given.
    """

    vectors = 2
    scalars = 1  # K lr, which the schedule may change
    client_state = True
    replayable = False
    shared = True

    def __init__(
        self, lr: float = 0.05, batch_size: int = 32, steps: int = 10, weight_decay: float = 0.0, schedule: Schedule | None = None
    ) -> None:
        super().__init__(lr, batch_size, steps=steps, weight_decay=weight_decay, schedule=schedule)

    def correction(self, memory: Memory) -> Tensor | None:
        """Return ``c - c_i`` ``[dim]``, or None while both are zero."""
        common: Tensor | None = memory.server.get("control")
        own: Tensor | None = memory.own.get("control")
        if common is None:
            return None
        return common.clone() if own is None else common - own.to(common)

    def run(
        self, model: LocalModel, x: Tensor, y: Tensor, round: int, generator: torch.Generator, memory: Memory | None = None
    ) -> LocalResult:
        """Run corrected local SGD and update the client's control variate."""
        memory = memory or Memory()
        memory = Memory(memory.own, {name: kept.to(model.weights) for name, kept in memory.server.items()})
        result = super().run(model, x, y, round, generator, memory)
        reach = result.steps * self.lr * self.schedule.factor(round)
        common = memory.server.get("control")
        change = result.update / reach if common is None else result.update / reach - common
        own = memory.own.get("control")
        memory.own["control"] = (change if own is None else own.to(change) + change).cpu()
        return LocalResult(result.update, result.loss, result.steps, (reach * change,), (reach,))

    def broadcast(self, state: State) -> State:
        """Return the server's control variate ``c``, if there is one."""
        return {"control": state["control"]} if "control" in state else {}

    def step(self, mean: Tensor, share: float, state: State) -> Tensor:
        """Move ``c`` by the mean change times the share of clients that took part; return the mean update."""
        dim = (len(mean) - 1) // 2
        update, change, reach = mean[:dim], mean[dim : 2 * dim], float(mean[-1])
        moved = change * (share / reach) if reach > 0 else torch.zeros_like(change)
        state["control"] = state["control"].to(moved) + moved if "control" in state else moved
        return update
