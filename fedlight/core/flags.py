"""Flags of a Trainer that mean something else in a federated run, and what to set instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NO_ROUNDS = (
    "Expected `trainer.max_steps` (the number of rounds) but it is not set: a federated run is one endless epoch. "
    "Set e.g. `--trainer.max_steps 100`, or `Trainer(max_steps=100)`, and leave `trainer.max_epochs` alone"
)


FLAGS = (
    "gradient_clip_val",
    "accumulate_grad_batches",
    "overfit_batches",
    "limit_train_batches",
    "max_epochs",
    "max_steps",
    "min_epochs",
    "min_steps",
    "val_check_interval",
)
"""What ``refused_flag`` looks at."""


def refused_flag(flags: Mapping[str, Any]) -> str | None:
    """Return the sentence that refuses one of a Trainer's flags, or None: those that are not among ``flags`` are as they are by default."""
    if flags.get("gradient_clip_val"):
        return (
            f"Expected no `trainer.gradient_clip_val` but got {flags['gradient_clip_val']}: the server takes one step a round with the "
            "aggregated update. To clip clients' local gradients set `max_grad_norm` of `algorithm` (FedAvg has one), or call "
            "`self.clip_gradients` in `on_before_optimizer_step` of your own module"
        )
    if flags.get("accumulate_grad_batches") not in (None, 1):
        return (
            f"Expected `trainer.accumulate_grad_batches` 1 but got {flags['accumulate_grad_batches']}: a round is one server step. "
            "For larger local batches set `model.algorithm.init_args.batch_size`, for larger cohorts `data.sampler`"
        )
    if flags.get("overfit_batches"):
        return (
            f"Expected no `trainer.overfit_batches` but got {flags['overfit_batches']}: a round draws a cohort and has no batch of its "
            "own. To overfit few samples give a data set of few, with one client"
        )
    share = flags.get("limit_train_batches")
    if isinstance(share, float) and 0 < share < 1:
        return (
            f"Expected no `trainer.limit_train_batches` but got {share}: a federated run is one endless epoch of rounds. Set "
            "`trainer.max_steps` for fewer rounds, `steps` of `algorithm` for fewer local batches, or give a smaller training set"
        )
    epochs, rounds = flags.get("max_epochs"), flags.get("max_steps")
    if isinstance(rounds, int) and rounds > 0 and epochs not in (None, -1) and not isinstance(share, int):
        return (
            f"Expected no `trainer.max_epochs` beside `trainer.max_steps` {rounds} but got {epochs}: a federated run is one endless epoch, "
            "and its number of rounds is `trainer.max_steps`"
        )
    if isinstance(epochs := flags.get("min_epochs"), int) and epochs > 1 and not isinstance(share, int):
        return (
            f"Expected no `trainer.min_epochs` but got {epochs}: a federated run is one endless epoch. Set `trainer.min_steps` to the "
            "least number of rounds"
        )
    least = flags.get("min_steps")
    if isinstance(least, int) and isinstance(rounds, int) and 0 < rounds < least:
        return f"Expected `trainer.min_steps` of at most `trainer.max_steps` {rounds} but got {least}: raise the one or lower the other"
    interval = flags.get("val_check_interval")
    if isinstance(interval, float) and interval != 1.0 and not isinstance(share, int):
        return (
            f"Expected `trainer.val_check_interval` to be a number of rounds but got {interval}: a federated run is one endless epoch, "
            "which has no parts. Set e.g. 10"
        )
    return None
