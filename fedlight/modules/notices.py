"""What a Trainer and its parts may be in a federated run: refused, put on rounds, or told of before training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from torch import nn
from torch.nn.parameter import is_lazy

from fedlight.callbacks.base import FederatedCallback, tell
from fedlight.callbacks.progress import RoundProgressBar
from fedlight.codecs.chain import ChainCodec
from fedlight.codecs.stacked import StackedCodec
from fedlight.codecs.two_sided import TwoSidedOptions
from fedlight.core.codec import Codec
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

UNCALLED = ("on_before_zero_grad", "on_before_backward", "on_after_backward")
"""Hooks of callbacks that Lightning calls in automatic optimization alone."""

OF_THE_SERVER: Mapping[str, str] = {
    "on_train_batch_start": "once a round, on the global model",
    "on_train_batch_end": "once a round, on the global model",
    "on_train_epoch_start": "once a run, which is one endless epoch",
    "on_train_epoch_end": "once a run, which is one endless epoch",
}
"""Hooks of callbacks that a user's module would take for a client's, and when they are called."""

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


def silent_flags(trainer: Trainer, validates: bool, own: bool = False) -> list[str]:
    """Return what a run with these flags will not do although it could, a sentence each.

    ``validates`` says if it has a validation, ``own`` if the network is a LightningModule.
    """
    given: Any = trainer
    told = []
    rounds = trainer.max_steps
    if given.fast_dev_run:
        told.append(
            f"`trainer.fast_dev_run` tries the code with {rounds} round{'s' * (rounds > 1)}, pretrains a codec on 6 recorded rounds for 10 "
            "steps at most, and writes no files: its figures tell nothing of a run without it"
        )
    interval, endless = getattr(given, "val_check_interval", None), isinstance(given.limit_train_batches, float)
    by_time = getattr(given, "_val_check_time_interval", None) is not None
    never = (isinstance(interval, float) and endless) or (isinstance(interval, int) and 0 < rounds < interval)
    never = never and not by_time
    if validates and never and given.limit_val_batches and isinstance(interval, int):
        told.append(
            f"`trainer.max_steps` ({rounds}) is below `trainer.val_check_interval` ({interval}): nothing will be validated; set "
            "`trainer.val_check_interval` to fewer rounds"
        )
    elif validates and never and given.limit_val_batches:
        told.append(
            "Nothing will be validated, because a federated run is one endless epoch: set `trainer.val_check_interval` to a number of "
            "rounds and `trainer.check_val_every_n_epoch` to None"
        )
    unseen = never or not validates or not given.limit_val_batches
    way_out = (
        "set `trainer.val_check_interval` to a number of rounds"
        if never
        else "give it something to validate (what clients log stays with them)"
    )
    for callback in given.callbacks:
        monitor = getattr(callback, "monitor", None)
        monitors = isinstance(callback, ModelCheckpoint) and monitor is not None and not monitor.startswith(OF_ROUNDS)
        if monitors and (never or (own and unseen)):
            told.append(f"ModelCheckpoint(monitor={monitor!r}) saves nothing, because nothing is validated: {way_out}")
        if isinstance(callback, EarlyStopping) and unseen and not callback._check_on_train_epoch_end:
            told.append(f"EarlyStopping(monitor={monitor!r}) never looks, because nothing is validated: {way_out}")
        for hook in UNCALLED:
            if _writes(callback, hook):
                told.append(
                    f"{type(callback).__name__}.{hook} is never called, because clients' training has no callbacks: write it as a hook of "
                    "your own LightningModule"
                )
    told += _of_clients(given) if own else []
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


def _writes(callback: Callback, hook: str) -> bool:
    """Whether a user has written a hook of a callback, which Lightning's own leave as it is or mean for steps of any kind."""
    written: Any = getattr(callback, hook)
    return getattr(written, "__module__", "").partition(".")[0] not in ("lightning", "fedlight")


def _of_clients(given: Any) -> list[str]:
    """Return which flags and callbacks a user's module would take for a client's, and are the server's."""
    told = []
    if given.limit_train_batches not in (0, 1.0) and not given.fast_dev_run:
        told.append(
            "`trainer.limit_train_batches` counts rounds, not a client's batches: for fewer of these set `steps` of `algorithm`, or give "
            "a smaller training set"
        )
    told += [
        f"{type(callback).__name__}.{hook} is called {when}: what belongs to a client's batches or epochs is a hook of your own "
        "LightningModule"
        for callback in given.callbacks
        for hook, when in OF_THE_SERVER.items()
        if _writes(callback, hook) and not isinstance(callback, FederatedCallback)
    ]
    if any(isinstance(callback, LearningRateMonitor) for callback in given.callbacks):
        told.append("LearningRateMonitor logs the learning rate of the server's optimizer, not that of the clients' own")
    return told


def tell_ratio(codec: Codec, within: str = "") -> None:
    """Warn of a fitted codec whose messages are more than 1.25 times smaller than was asked for, and of what limits them."""
    one = codec.codec if isinstance(codec, StackedCodec) else codec
    if isinstance(one, ChainCodec):
        for stage in one.codecs:
            tell_ratio(stage, within=" within the chain")
    if not isinstance(one, TwoSidedOptions) or one.fitted_ratio() <= 1.25 * one.ratio:
        return
    limit = (
        f"`encoder_share` ({one.encoder_share:g}) pays for no more: raise it for larger messages and a smaller error"
        if one.factors_full
        else f"recorded updates have energy in no more directions (`rank` allows {one.rank} a side) that more bits would serve"
    )
    made, reached = "codes" if within else "messages", one.fitted_ratio()
    tell(f"`ratio` {one.ratio:g} of {type(one).__name__}{within} was asked for but its {made} are {reached:.1f}x smaller: {limit}")


_VALIDATIONS = 10  # in a run, where nobody says how many
_EVERY_N_STEPS = 50  # Lightning's default


_OF_BATCHES = ("Using ModelCheckpoint with manual optimization", "Total length of `list` across ranks is zero")
# Warnings of Lightning's that advise what makes no sense for rounds: a checkpoint between them, loaders where there is nothing to evaluate.


def suit_rounds(trainer: Trainer) -> None:
    """Put what a Trainer was not told otherwise on rounds: log every round, validate ten times a run, show rounds in the bar.

    A round is no batch: it takes seconds, and the endless epoch has no end to validate at. What was set is left: an interval of
    validation, another `log_every_n_steps` than Lightning's 50, a bar of one's own.
    """
    for sentence in _OF_BATCHES:
        warnings.filterwarnings("ignore", message=sentence)
    settings: Any = trainer
    if settings.log_every_n_steps == _EVERY_N_STEPS:
        settings.log_every_n_steps = 1
    if not isinstance(settings.limit_train_batches, int):  # an endless epoch: `min_steps` makes it 1, and the run would never stop early
        settings.fit_loop.min_epochs = 0
    interval = getattr(settings, "val_check_interval", None)  # there is none where validations are timed
    if settings.check_val_every_n_epoch == 1 and interval == 1.0 and isinstance(interval, float):
        settings.check_val_every_n_epoch = None
        settings.val_check_interval = max(1, settings.max_steps // _VALIDATIONS) if settings.max_steps > 0 else _VALIDATIONS
    callbacks: list[Any] = settings.callbacks
    for place, callback in enumerate(callbacks):
        if any(type(callback) is kind and callback.refresh_rate == kind().refresh_rate for kind in (RichProgressBar, TQDMProgressBar)):
            callbacks[place] = RoundProgressBar()  # it was Lightning's own choice
