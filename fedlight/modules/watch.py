"""A round as the Trainer's callbacks and its profiler see it."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.profilers import PassThroughProfiler

from fedlight.callbacks.base import FederatedCallback, section
from fedlight.rounds.server import Watch

HOOKS = ("on_round_start", "on_client_update", "on_client_message", "on_cohort_end", "on_round_end")


class CallbackWatch(Watch):
    """Calls the hooks of `FederatedCallback` on every callback of that class, and times steps with the Trainer's profiler.

    Hooks that no callback has, and sections without a profiler, stay those that do nothing.

    Args:
        module: the module that runs the rounds.
    """

    def __init__(self, module: LightningModule) -> None:
        trainer: Any = module.trainer
        callbacks = [callback for callback in trainer.callbacks if isinstance(callback, FederatedCallback)]
        for hook in HOOKS:
            own = [getattr(one, hook) for one in callbacks if getattr(type(one), hook) is not getattr(FederatedCallback, hook)]
            if own:
                setattr(self, hook, partial(_call_each, [partial(method, trainer, module) for method in own]))
        if type(trainer.profiler) is not PassThroughProfiler:
            vars(self)["section"] = partial(section, trainer)


def _call_each(methods: list[partial[None]], *given: Any) -> None:
    for method in methods:
        method(*given)
