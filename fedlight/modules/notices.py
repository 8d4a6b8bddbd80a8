"""Trainers and parts that a federated run cannot have, and flags that leave a run without figures, told before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.nn.parameter import is_lazy

from fedlight.core.errors import ConfigurationError

REFUSED: Mapping[type[Callback], str] = {
    StochasticWeightAveraging: "it anneals the server's learning rate, not the clients': use WeightAveraging or EMAWeightAveraging",
    LearningRateFinder: "it would search the server's learning rate: search with your own module and a plain Trainer, or compare runs with "
    "several rates of `algorithm` (`fedlight compare`)",
    BatchSizeFinder: "a round has no batch of its own: set `batch_size` of `algorithm`",
    GradientAccumulationScheduler: "a round is one server step: set `batch_size` of `algorithm`, or a larger cohort",
    BaseFinetuning: "clients and server must agree on what is trained for the whole run: set `requires_grad` before it, and train in two "
    "runs where layers thaw",
    ModelPruning: "masks that change within a run reach no client: prune before it or after it",
}
"""Callbacks that change what is trained, and what to do instead."""

OF_ROUNDS = ("round/", "bytes/", "sim/", "privacy/")
"""How names of what every round logs begin."""


def check_callbacks(callbacks: list[Any]) -> None:
    """Raise ``ConfigurationError`` for a callback, such as those of Lightning's Tuner, that cannot do in a federated run what it says."""
    for callback in callbacks:
        for kind, reason in REFUSED.items():
            if isinstance(callback, kind):
                raise ConfigurationError(f"Expected no {type(callback).__name__} in a federated run but got one: {reason}")


def check_network(network: nn.Module) -> None:
    """Raise ``ConfigurationError`` for a network whose layers have no weights yet."""
    for name, parameter in network.named_parameters():
        lazy: bool = is_lazy(parameter)
        if lazy:
            owner = type(network.get_submodule(name.rpartition(".")[0])).__name__
            raise ConfigurationError(
                f"Expected a `network` whose parameters have shapes but {name} of {owner} has none: run one batch through the network "
                "before it is given, or name the number of inputs"
            )


def silent_flags(trainer: Trainer, validates: bool) -> list[str]:
    """Return what a run with these flags will not do although it could, a sentence each; ``validates`` says if it has a validation."""
    given: Any = trainer
    told = []
    rounds = trainer.max_steps
    interval, endless = given.val_check_interval, isinstance(given.limit_train_batches, float)
    by_time = getattr(given, "_val_check_time_interval", None) is not None
    never = (isinstance(interval, float) and endless) or (isinstance(interval, int) and 0 < rounds < interval)
    never = never and not by_time
    if validates and never and given.limit_val_batches:
        told.append(
            "Nothing will be validated, because a federated run is one endless epoch: set `trainer.val_check_interval` to a number of "
            "rounds and `trainer.check_val_every_n_epoch` to None"
        )
    for callback in given.callbacks:
        monitor = callback.monitor if isinstance(callback, ModelCheckpoint) else None
        if monitor is not None and not monitor.startswith(OF_ROUNDS) and never:
            told.append(
                f"ModelCheckpoint(monitor={monitor!r}) saves nothing, because nothing is validated: set `trainer.val_check_interval` to "
                "a number of rounds"
            )
    if given.reload_dataloaders_every_n_epochs and endless:
        told.append(
            "No loader will be made again by `trainer.reload_dataloaders_every_n_epochs`, because a federated run is one endless epoch and "
            "clients keep their samples: leave it out"
        )
    every = given.log_every_n_steps
    if given.loggers and every and 0 < rounds < every:
        told.append(
            f"No round will be logged, because there are {rounds} and `trainer.log_every_n_steps` is {every}: set it to 1, or to less "
            "than the number of rounds"
        )
    return told


def tell_flags(trainer: Trainer, validates: bool) -> None:
    """Warn once of each flag that leaves the run without figures."""
    for sentence in silent_flags(trainer, validates):
        rank_zero_warn(sentence)
