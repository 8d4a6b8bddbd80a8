"""The Trainer as a user's own module sees it: on the server with epochs that pass, on a client as one that trains this client alone."""

from __future__ import annotations

from types import NoneType, SimpleNamespace
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from torch import nn
from torch.optim import Optimizer

from fedlight.clients.local_model import LocalModel
from fedlight.core.orders import Visit


class Run(Protocol):
    """What user code's Trainer belongs to: a `FederatedModule`, or a node's part of its run."""

    _trainer: Any

    @property
    def network(self) -> nn.Module:
        """The user's module."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""

    @property
    def own_datamodule(self) -> LightningDataModule | None:
        """The user's own data module, None if the module loads its data itself."""


class OwnTrainer(Trainer):
    """The run's Trainer, which user code reads from `self.trainer`: it is asked for all that is not told otherwise here."""

    def __init__(self, run: Run) -> None:
        self.__dict__["run"] = run

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "run" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.run._trainer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.run._trainer, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return NoneType, ()  # like Lightning's modules, what is pickled or copied leaves its Trainer behind

    @property
    def datamodule(self) -> LightningDataModule | None:
        """The user's own data module, None if the module loads its data itself."""
        found: LightningDataModule | None = self.run.own_datamodule
        return found

    @property
    def train_dataloader(self) -> Any:
        """The user's own training loader, None before it is made."""
        return getattr(self.run.data.source, "loader", None)

    @property
    def current_epoch(self) -> int:
        """Rounds that are done, without the one that a validation belongs to: a round is the server's epoch."""
        trainer = self.run._trainer
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        return max(int(trainer.global_step) - fitting, 0)


class ClientTrainer(OwnTrainer):
    """The Trainer of one client's round: its steps, epochs, optimizer and schedules; one process, loggers that write nothing."""

    def __init__(self, run: Run, model: LocalModel) -> None:
        self.__dict__.update(run=run, local=model, begun=0, finished=0, stopped=False, used=[], scheduled=[], silent=[DummyLogger()])

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "should_stop":  # of this client's round
            self.__dict__["stopped"] = value
        else:
            super().__setattr__(name, value)

    @property
    def should_stop(self) -> bool:  # type: ignore[override]
        """Whether the client's round is to end after the current epoch."""
        return bool(self.stopped)

    @property
    def current_epoch(self) -> int:
        """Epochs that lie behind it, had it taken part in all rounds."""
        visit: Visit = self.local.visit
        return visit.round * len(visit.lengths) + int(self.finished)

    @property
    def global_step(self) -> int:
        """Local steps that lie behind the client, had it taken part in all rounds."""
        visit: Visit = self.local.visit
        return visit.round * visit.steps + int(self.begun)

    @property
    def num_training_batches(self) -> int:
        """Batches of the current epoch."""
        lengths: tuple[int, ...] = self.local.visit.lengths
        return lengths[min(int(self.finished), len(lengths) - 1)]

    @property
    def train_dataloader(self) -> Any:
        """The user's own training loader, but for its length, which is that of the client's epoch."""
        loader = super().train_dataloader
        return None if loader is None else _ClientLoader(loader, self.num_training_batches)

    @property
    def is_last_batch(self) -> bool:
        """Whether the current batch is the last one of its epoch."""
        return bool(self.local.ends_epoch)

    @property
    def max_steps(self) -> int:
        """Local steps of a client that takes part in all rounds; -1 if their number is not set."""
        rounds = int(self.run._trainer.max_steps)
        return rounds * int(self.local.visit.steps) if rounds > 0 else rounds

    @property
    def max_epochs(self) -> int:
        """Epochs of a client that takes part in all rounds; -1 if their number is not set."""
        rounds = int(self.run._trainer.max_steps)
        return rounds * len(self.local.visit.lengths) if rounds > 0 else -1

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Local steps of a client that takes part in all rounds."""
        return self.max_steps if self.max_steps > 0 else float("inf")

    @property  # type: ignore[misc]
    def optimizers(self) -> list[Optimizer]:
        """The optimizer of the client's round, if it is a torch optimizer."""
        return list(self.used)

    @property
    def strategy(self) -> Any:
        """The run's strategy, with the client's optimizer in place of the server's."""
        return _ClientStrategy(self.run._trainer.strategy, self.used)

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """The schedules of the client's optimizer."""
        return [SimpleNamespace(scheduler=scheduler) for scheduler in self.scheduled]

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """What the server's last validation logged."""
        return _ServerMetrics(super().callback_metrics)

    @property  # type: ignore[misc]
    def loggers(self) -> list[Logger]:
        """One that writes nothing: what a client logs stays with it."""
        return list(self.silent)

    @property  # type: ignore[misc]
    def logger(self) -> Logger | None:
        """One that writes nothing."""
        return self.loggers[0]

    world_size: int = 1  # a client trains by itself
    global_rank: int = 0


class _ServerMetrics(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        raise KeyError(
            f"{name}: what a client logs is discarded, so keep it in an attribute of the module; here are {sorted(self)} of the server"
        )


class _ClientLoader:
    def __init__(self, loader: Any, batches: int) -> None:
        self._loader = loader
        self._batches = batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)

    def __len__(self) -> int:
        return self._batches


class _ClientStrategy:
    def __init__(self, strategy: Any, used: list[Optimizer]) -> None:
        self._strategy = strategy
        self._used = used

    @property
    def _lightning_optimizers(self) -> list[LightningOptimizer]:
        """The client's optimizer as `self.optimizers()` shows it."""
        return [LightningOptimizer(optimizer) for optimizer in self._used]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_strategy"], name)

    def all_gather(self, tensor: Any, *_: Any, **__: Any) -> Any:
        """Return what there is: a client is alone."""
        return tensor

    reduce = all_gather

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return what there is."""
        return obj

    def barrier(self, *_: Any, **__: Any) -> None:
        """Wait for nobody."""


def attach(own: LightningModule, trainer: Trainer | None) -> None:
    """Let a module and all modules within it see this Trainer."""
    for part in own.modules():
        if isinstance(part, LightningModule):
            part._trainer = trainer
