"""Lightning's defaults, which are meant for batches, as rounds need them."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from fedlight.callbacks.progress import RoundProgressBar

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
    if settings.check_val_every_n_epoch == 1 and settings.val_check_interval == 1.0 and isinstance(settings.val_check_interval, float):
        settings.check_val_every_n_epoch = None
        settings.val_check_interval = max(1, settings.max_steps // _VALIDATIONS) if settings.max_steps > 0 else _VALIDATIONS
    callbacks: list[Any] = settings.callbacks
    for place, callback in enumerate(callbacks):
        if any(type(callback) is kind and callback.refresh_rate == kind().refresh_rate for kind in (RichProgressBar, TQDMProgressBar)):
            callbacks[place] = RoundProgressBar()  # it was Lightning's own choice
