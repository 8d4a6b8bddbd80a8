"""Local training with the model's own optimizer, or any other.

Reddi et al. 2021, "Adaptive Federated Optimization" (arXiv 2003.00295), Algorithm 1 (FedOpt): any ClientOpt instead of local SGD.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fedlight.clients.algorithms import Algorithm, FedAvg, LocalResult, Memory, check_local_steps, local_samples
from fedlight.clients.copying import require_own
from fedlight.clients.local_model import LocalModel
from fedlight.clients.memento import Memento
from fedlight.core.errors import ConfigurationError
from fedlight.core.orders import Visit


@dataclass
class LocalSchedule:
    """A schedule and when it is stepped: every ``frequency`` steps or epochs, as Lightning counts them."""

    scheduler: Any
    interval: str = "epoch"
    frequency: int = 1

    @classmethod
    def parse(cls, config: Any, owner: str) -> LocalSchedule:
        """Return a schedule as `configure_optimizers` gives it, bare or in a dict; raises ``ConfigurationError`` if it needs a metric."""
        settings = config if isinstance(config, dict) else {"scheduler": config}
        scheduler = settings.get("scheduler")
        if isinstance(scheduler, ReduceLROnPlateau) or settings.get("reduce_on_plateau"):
            raise ConfigurationError(
                f"Expected `configure_optimizers` of {owner} to return a schedule of steps but got {type(scheduler).__name__}, which waits "
                "for a metric that no client has: choose another, such as CosineAnnealingLR, or lower the rate with `server_scheduler`"
            )
        if settings.get("interval", "epoch") not in ("epoch", "step"):
            raise ConfigurationError(
                f"Expected `configure_optimizers` of {owner} to return a schedule with the `interval` 'epoch' or 'step' but got "
                f"{settings['interval']!r}: choose one of them"
            )
        return cls(scheduler, settings.get("interval", "epoch"), int(settings.get("frequency", 1)))


class LocalSchedules:
    """All schedules of one optimizer in one client's round.

    Local training makes its optimizer anew in every round. Its schedules start where they would be had the client taken part in all
    rounds before: a function of the round alone (law 5).
    """

    def __init__(self, optimizer: Optimizer, schedules: list[LocalSchedule], visit: Visit) -> None:
        self.optimizer = optimizer
        self.schedules = schedules
        self.visit = visit
        self.epochs, self.taken = 0, 0

    def resume(self, model: LocalModel) -> None:
        """Go to the beginning of the client's round, from where such a client's last round ended if this process has seen one."""
        if not self.schedules:
            return
        round, kept = model.schedules.get(self.visit.lengths, (0, None))
        if round > self.visit.round:
            round, kept = 0, None
        if kept is not None:
            groups, states = copy.deepcopy(kept)
            for group, values in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(values)
            for schedule, state in zip(self.schedules, states, strict=True):
                schedule.scheduler.load_state_dict(state)
        with warnings.catch_warnings():  # torch warns of schedules that step before their optimizer does
            warnings.simplefilter("ignore")
            for number in range(round, self.visit.round):
                self.epochs, self.taken = number * len(self.visit.lengths), 0
                for length in self.visit.lengths:
                    for position in range(1, length + 1):
                        self.step(position == length)
        self.epochs, self.taken = self.visit.round * len(self.visit.lengths), 0
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups]
        states = [schedule.scheduler.state_dict() for schedule in self.schedules]
        model.schedules[self.visit.lengths] = (self.visit.round, copy.deepcopy((groups, states)))

    def step(self, ends_epoch: bool) -> None:
        """Take note of a local step: step the schedules of steps, and at the end of an epoch those of epochs."""
        self.taken += 1
        for schedule in self.schedules:
            if schedule.interval == "step" and self.taken % schedule.frequency == 0:
                schedule.scheduler.step()
        if ends_epoch:
            self.epochs, self.taken = self.epochs + 1, 0
            for schedule in self.schedules:
                if schedule.interval == "epoch" and self.epochs % schedule.frequency == 0:
                    schedule.scheduler.step()


def configured(returned: Any, owner: str) -> tuple[Optimizer, list[LocalSchedule]]:
    """Return the one optimizer and its schedules in what `configure_optimizers` returned; raises ``ConfigurationError`` for others."""
    schedules: list[Any] = []
    if isinstance(returned, (list, tuple)) and len(returned) == 2 and isinstance(returned[0], (list, tuple)):
        schedules = list(returned[1]) if isinstance(returned[1], (list, tuple)) else [returned[1]]
        returned = returned[0]
    found = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    schedules += [one["lr_scheduler"] for one in found if isinstance(one, dict) and one.get("lr_scheduler") is not None]
    found = [one.get("optimizer") if isinstance(one, dict) else one for one in found]
    found = [one for one in found if one is not None]
    if not found:
        raise ConfigurationError(
            f"Expected `configure_optimizers` of {owner} to return one optimizer for the clients but it returns none: return one, or set "
            "`algorithm`, such as FedAvg, which has its own"
        )
    kinds = ", ".join(type(one).__name__ for one in found)
    if len(found) != 1 or not isinstance(found[0], Optimizer):
        raise ConfigurationError(
            f"Expected `configure_optimizers` of {owner} to return one optimizer for the clients but got {kinds}: federate each network "
            "separately, or set `algorithm`, such as FedAvg, which uses none of them"
        )
    return steppable(found[0]), [LocalSchedule.parse(one, owner) for one in schedules]


def steppable(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer; raises ``ConfigurationError`` if its step calls for several gradients of a batch (LBFGS)."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigurationError(
            f"Expected an optimizer that takes one gradient a step but got {type(optimizer).__name__}, which evaluates the loss several "
            "times and lives on what it remembers of earlier steps, which a client forgets after its round: choose SGD or Adam"
        )
    return optimizer


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
        """Return a new optimizer and its schedules; raises ``ConfigurationError`` unless there is one that takes one gradient a step."""
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
