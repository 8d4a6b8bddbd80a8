"""A round as the Trainer's callbacks and its profiler see it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.profilers import PassThroughProfiler

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
        self.trainer = module.trainer
        self.timed = type(self.trainer.profiler) is not PassThroughProfiler  # type: ignore[attr-defined]
        self._on_round_start = self.listeners("on_round_start")
        self._on_client_update = self.listeners("on_client_update")
        self._on_client_message = self.listeners("on_client_message")
        self._on_cohort_end = self.listeners("on_cohort_end")
        self._on_round_end = self.listeners("on_round_end")

    def section(self, step: str) -> AbstractContextManager[object]:
        """Return a section of the Trainer's profiler."""
        return section(self.trainer, step) if self.timed else super().section(step)

    def listeners(self, hook: str) -> list[FederatedCallback]:
        """Return the callbacks that have something to do in a hook."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        federated = [callback for callback in callbacks if isinstance(callback, FederatedCallback)]
        return [callback for callback in federated if getattr(type(callback), hook) is not getattr(FederatedCallback, hook)]

    def on_round_start(self, call: Call) -> None:
        """Pass on."""
        for callback in self._on_round_start:
            callback.on_round_start(self.trainer, self.module, call)

    def on_client_update(self, context: Context, update: ClientUpdate) -> None:
        """Pass on."""
        for callback in self._on_client_update:
            callback.on_client_update(self.trainer, self.module, context, update)

    def on_client_message(self, call: Call, reply: Reply) -> None:
        """Pass on."""
        for callback in self._on_client_message:
            callback.on_client_message(self.trainer, self.module, call, reply)

    def on_cohort_end(self, call: Call) -> None:
        """Pass on."""
        for callback in self._on_cohort_end:
            callback.on_cohort_end(self.trainer, self.module, call)

    def on_round_end(self, call: Call) -> None:
        """Pass on."""
        for callback in self._on_round_end:
            callback.on_round_end(self.trainer, self.module, call)
