"""SIGTERM and Ctrl-C end a run after the round, on all of its processes; nobody waits for a process that stands still for ever."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from datetime import timedelta
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed
from torch.distributed.constants import default_pg_timeout

from fedlight.rounds.stop import Stop

PATIENCE = timedelta(minutes=5)
"""How long a process waits for the others of its run, unless a DDPStrategy says otherwise."""


class StopSignals(_SignalConnector):
    """Notes SIGTERM and Ctrl-C while rounds run, and ends the run when all processes know; at other times they end the process at once.

    But for processes that wait for the first one to pretrain: these note them too, or it would lose its work to a signal for another.

    Lightning's own handler takes part in a collective operation wherever the signal strikes, while the other processes are in another one.
    A second Ctrl-C does not wait for the round.
    """

    def __init__(self, trainer: Trainer, stop: Stop) -> None:
        self.stop = stop
        self.rounds = False
        self.workers: list[subprocess.Popen[Any]] = []  # that Lightning started for this run, from when it is about to stop
        self._before: dict[int, Any] = {}
        super().__init__(trainer)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.is_global_zero:
            self._take_over()

    @property
    def received_sigterm(self) -> bool:
        """Whether to stop here and now, on which all processes agree: not within a validation, which some may have just finished."""
        known = self.stop.agreed if self.trainer.world_size > 1 else self.stop.asked
        return self.rounds and known is not None and not self.trainer.validating

    @received_sigterm.setter
    def received_sigterm(self, value: bool) -> None:
        """Leave it to the signals."""

    def register_signal_handlers(self) -> None:
        """Take over from Lightning, whose other handlers (SLURM's) stay."""
        self._give_back()
        super().register_signal_handlers()
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._take_over()

    def teardown(self) -> None:
        """Give the handlers back."""
        self._give_back()
        super().teardown()

    def _take_over(self) -> None:
        self.rounds = True
        for number, ours in ((signal.SIGTERM, (stop_now, signal.SIG_DFL)), (signal.SIGINT, (signal.default_int_handler,))):
            found = self._original_handlers.get(number, signal.getsignal(number))
            if found in ours:  # Ctrl-C stays ignored where it is; Lightning calls somebody's own handler of SIGTERM after its own
                self._before[number] = found
                self._register_signal(number, self._sigterm_notifier_fn)

    def _give_back(self) -> None:
        self.rounds = False
        for number, handler in self._before.items():
            self._register_signal(signal.Signals(number), handler)
        self._before = {}

    def _sigterm_notifier_fn(self, number: int, frame: FrameType | None) -> None:
        if not self.rounds or (number == signal.SIGINT and self.stop.asked == number):
            self.release_workers()
            for worker in self.workers if number == signal.SIGTERM else ():  # a terminal sends Ctrl-C to all processes
                worker.terminate()
            stop_now(number, frame)
        self.stop.asked = signal.Signals(number)
        if number == signal.SIGINT and self.trainer.is_global_zero:
            os.write(2, b"\nfedlight: stopping after this round; Ctrl-C again stops at once\n")  # print is not safe in a handler

    def release_workers(self) -> None:
        """Keep Lightning from watching the processes that it started: it kills this one if one of them ends a little earlier."""
        watched: list[subprocess.Popen[Any]] = getattr(self.trainer.strategy.launcher, "procs", [])
        self.workers += watched
        watched.clear()

    def end_workers(self, patience: float) -> None:
        """Wait for the released processes to end, at most ``patience`` seconds in all, and kill those that do not."""
        limit = time.monotonic() + patience
        for worker in self.workers:
            try:
                worker.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()


def stop_now(number: int, frame: FrameType | None = None) -> NoReturn:
    """End the process as these signals do, by an exception."""
    raise KeyboardInterrupt if number == signal.SIGINT else SIGTERMException


def watch_signals(trainer: Trainer, stop: Stop) -> None:
    """Let signals end a Trainer's runs between rounds, and its processes wait for each other for minutes instead of half an hour."""
    trainer._signal_connector = StopSignals(trainer, stop)
    if isinstance(trainer.strategy, DDPStrategy) and trainer.strategy._timeout == default_pg_timeout:
        trainer.strategy._timeout = PATIENCE


def signals_of(trainer: Trainer) -> StopSignals | None:
    """Return the handlers that ``watch_signals`` gave a Trainer, if it did."""
    found = trainer._signal_connector
    return found if isinstance(found, StopSignals) else None


_waits = itertools.count()


def await_first(trainer: Trainer) -> None:
    """Wait until the first process calls this as well, however long it works before.

    A collective operation would wait for as long as a process may stand still, and no longer. The first process keeps the store that is
    asked, so that nobody waits for one that has ended.
    """
    store, key = distributed.distributed_c10d._get_default_store(), f"fedlight/first/{next(_waits)}"
    if trainer.is_global_zero:
        store.set(key, "")
    while not store.check([key]):
        time.sleep(0.05)
