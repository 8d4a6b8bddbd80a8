"""Local training with the model's own optimizer, or any other.

Reddi et al. 2021, "Adaptive Federated Optimization" (arXiv 2003.00295), Algorithm 1 (FedOpt): any ClientOpt instead of local SGD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedlight.clients.algorithms import Algorithm, LocalResult, Memory, check_local_steps, local_samples
from fedlight.clients.copying import require_own
from fedlight.clients.local_model import LocalModel
from fedlight.core.errors import ConfigurationError


@dataclass(eq=False)
class ClientOptimizer(Algorithm):
    """Local steps of any torch optimizer; every client creates a new one in every round, and never sends or keeps its state.

    Args:
        optimizer: creates the optimizer from parameters; the one that the network's `configure_optimizers` returns if not given.
            Its learning-rate schedules are ignored, because a client takes few steps per round.
        batch_size: samples in a local batch.
        epochs: local epochs per round; give this or ``steps``.
        steps: local steps per round; give this or ``epochs``.

    Raises:
        ConfigurationError: if a number is out of range, both or neither of ``epochs`` and ``steps`` are given, or (before training)
            there is not exactly one optimizer.
    """

    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None
    batch_size: int = 32
    epochs: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        check_local_steps(self.epochs, self.steps, self.batch_size)

    def work(self, samples: int) -> int:
        """Return how many samples a client with ``samples`` processes in a round."""
        return local_samples(samples, self.epochs, self.steps, self.batch_size)

    def check(self, model: LocalModel) -> None:
        """Refuse a network without exactly one optimizer."""
        self.make(model.module)

    def run(
        self, model: LocalModel, x: Tensor, y: Tensor, round: int, generator: torch.Generator, memory: Memory | None = None
    ) -> LocalResult:
        """Train from ``model.start`` and return the update."""
        optimizer = self.make(model.module)
        total, steps = torch.zeros((), device=y.device), 0
        for xb, yb in model.batches(x, y, self.batch_size, self.epochs, self.steps, generator):
            loss, grads = model.gradients(xb, yb)
            for parameter, gradient, reached in zip(model.flat.parameters, grads, model.reached, strict=True):
                parameter.grad = gradient if reached else None
            optimizer.step()
            total += loss
            steps += 1
        optimizer.zero_grad()
        return LocalResult(model.update(), total / max(steps, 1), steps)

    def make(self, network: nn.Module) -> Optimizer:
        """Return a new optimizer of the network's parameters; raises ``ConfigurationError`` unless there is exactly one."""
        if self.optimizer is not None:
            return self.optimizer([p for p in network.parameters() if p.requires_grad])
        if not hasattr(network, "configure_optimizers"):
            raise ConfigurationError(
                f"Expected a LightningModule with `configure_optimizers` but got {type(network).__name__}: give `optimizer`, or use FedAvg"
            )
        optimizer = only_optimizer(network.configure_optimizers(), type(network).__name__)  # type: ignore[operator]
        require_own(optimizer, network)
        return optimizer


def only_optimizer(returned: Any, owner: str) -> Optimizer:
    """Return the optimizer in the result of a `configure_optimizers`, in any form that Lightning allows.

    Raises:
        ConfigurationError: if there is none, or several.
    """
    if isinstance(returned, (list, tuple)) and len(returned) == 2 and isinstance(returned[0], (list, tuple)):
        returned = returned[0]  # ([optimizers], [schedules])
    found = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    found = [one.get("optimizer") if isinstance(one, dict) else one for one in found]
    if len(found) == 1 and isinstance(found[0], Optimizer):
        return found[0]
    raise ConfigurationError(
        f"Expected `configure_optimizers` of {owner} to return one optimizer for the clients but got {len(found)} "
        f"({', '.join(type(one).__name__ for one in found)}): federate each network separately, or set `algorithm`, such as FedAvg, "
        "which uses none of them"
    )
