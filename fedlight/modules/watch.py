"""A round as the Trainer's callbacks and its profiler see it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import LightningModule

from fedlight.callbacks.base import FederatedCallback, section
from fedlight.core.codec import Context
from fedlight.rounds.call import Call
from fedlight.rounds.messages import ClientUpdate, Reply
from fedlight.rounds.server import Watch


class CallbackWatch(Watch):
    """Calls the hooks of `FederatedCallback` on every callback of that class, and times steps with the Trainer's profiler.

    Args:
        module: the module that runs the rounds.
    """

    def __init__(self, module: LightningModule) -> None:
        self.module = module
        callbacks: list[Any] = module.trainer.callbacks  # type: ignore[attr-defined]
        self.callbacks = [callback for callback in callbacks if isinstance(callback, FederatedCallback)]

    def section(self, step: str) -> AbstractContextManager[object]:
        """Return a section of the Trainer's profiler."""
        return section(self.module.trainer, step)

    def on_round_start(self, call: Call) -> None:
        """Pass on."""
        for callback in self.callbacks:
            callback.on_round_start(self.module.trainer, self.module, call)

    def on_client_update(self, context: Context, update: ClientUpdate) -> None:
        """Pass on."""
        for callback in self.callbacks:
            callback.on_client_update(self.module.trainer, self.module, context, update)

    def on_client_message(self, call: Call, reply: Reply) -> None:
        """Pass on."""
        for callback in self.callbacks:
            callback.on_client_message(self.module.trainer, self.module, call, reply)

    def on_cohort_end(self, call: Call) -> None:
        """Pass on."""
        for callback in self.callbacks:
            callback.on_cohort_end(self.module.trainer, self.module, call)

    def on_round_end(self, call: Call) -> None:
        """Pass on."""
        for callback in self.callbacks:
            callback.on_round_end(self.module.trainer, self.module, call)
