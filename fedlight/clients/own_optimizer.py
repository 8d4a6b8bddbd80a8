"""Local training with the model's own optimizer, or any other.

Reddi et al. 2021, "Adaptive Federated Optimization" (arXiv 2003.00295), Algorithm 1 (FedOpt): any ClientOpt instead of local SGD.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedlight.clients.algorithms import Algorithm, FedAvg, LocalResult, Memory, check_local_steps, local_samples
from fedlight.clients.copying import require_own
from fedlight.clients.graph import Memento
from fedlight.clients.local_model import LocalModel
from fedlight.clients.own_schedule import LocalSchedule, LocalSchedules, configured, steppable
from fedlight.core.errors import ConfigurationError


@dataclass(eq=False)
class ClientOptimizer(Algorithm):
    """Local steps of any torch optimizer; every client creates a new one in every round, and never sends or keeps its state.

    Args:
        optimizer: creates the optimizer from parameters; the one that the network's `configure_optimizers` returns if not given.
            Its learning-rate schedules are stepped too, and go on from round to round: local steps and epochs count as if a client
            had taken part in all rounds before. With ``epochs`` every pass is an epoch, with ``steps`` a round is.
        batch_size: samples in a local batch.
        epochs: local epochs per round; give this or ``steps``.
        steps: local steps per round; give this or ``epochs``.

    Raises:
        ConfigurationError: if a number is out of range, both or neither of ``epochs`` and ``steps`` are given, or (before training)
            there is not exactly one optimizer, or it or its schedule needs more than a gradient (LBFGS, ReduceLROnPlateau).
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
        before = Memento(model.module)
        self.make(model.module)
        before.put_back()

    def run(
        self, model: LocalModel, x: Tensor, y: Tensor, round: int, generator: torch.Generator, memory: Memory | None = None
    ) -> LocalResult:
        """Train from ``model.start`` and return the update."""
        visit = model.plan(x, self.batch_size, self.epochs, self.steps)
        optimizer, found = self.make(model.module)
        schedules = LocalSchedules(optimizer, found, visit)
        schedules.resume(model)
        model.attend(optimizer, [one.scheduler for one in found])
        takes_closure = len(inspect.signature(type(optimizer).step).parameters) > 1
        total, steps = torch.zeros((), device=y.device), 0
        for xb, yb in model.batches(x, y, self.batch_size, self.epochs, self.steps, generator):
            loss = torch.zeros(())

            @torch.enable_grad()
            def closure(xb: Tensor = xb, yb: Tensor = yb) -> Tensor:  # as Lightning does: some optimizers call it twice
                nonlocal loss
                loss, _ = model.gradients(xb, yb)  # which lie in the parameters
                return loss

            if takes_closure:
                optimizer.step(closure)  # type: ignore[arg-type]
            else:
                closure()
                optimizer.step()
            schedules.step(model.ends_epoch)
            total += loss
            steps += 1
        return LocalResult(model.update(), total / max(steps, 1), steps)

    def make(self, network: nn.Module) -> tuple[Optimizer, list[LocalSchedule]]:
        """Return a new optimizer of the network's parameters, and its schedules.

        Raises:
            ConfigurationError: unless there is exactly one, that takes one gradient a step.
        """
        if self.optimizer is not None:
            return steppable(self.optimizer([p for p in network.parameters() if p.requires_grad])), []
        if not hasattr(network, "configure_optimizers"):
            raise ConfigurationError(
                f"Expected a LightningModule with `configure_optimizers` but got {type(network).__name__}: give `optimizer`, or use FedAvg"
            )
        optimizer, schedules = configured(network.configure_optimizers(), type(network).__name__)  # type: ignore[operator]
        require_own(optimizer, network)
        return optimizer, schedules


def default_algorithm(own: bool) -> Algorithm:
    """Return local training for those who chose none; ``own``: of a LightningModule, with its own optimizer."""
    return ClientOptimizer(steps=10, batch_size=32) if own else FedAvg(lr=0.05, steps=10, batch_size=32)
