"""One progress bar for a federated run, whose unit is the round."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from fedlight.core.errors import ConfigurationError
from fedlight.metrics.traffic import format_bytes

_BAR = 12  # characters
_LINES = 10  # plain lines in a run whose length is known
_ROUNDS_PER_LINE = 100  # where it is not

_METRICS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("sim/loss", "loss {:.3f}".format),
    ("val/loss", "val loss {:.3f}".format),
    ("val/accuracy", "val acc {:.1%}".format),
    ("bytes/uplink", lambda n_bytes: f"up {format_bytes(n_bytes)}"),
    ("bytes/ratio", "ratio {:.0f}x".format),
    ("bytes/downlink", lambda n_bytes: f"down {format_bytes(n_bytes)}"),
)
"""What is shown after the round, most wanted first: a narrow terminal cuts the end."""


@dataclass
class _Count:
    """How far something of a known or unknown ``total`` has come, and how fast."""

    name: str
    total: int | None
    done: int = 0
    start: float = field(default_factory=time.monotonic)
    first: int = field(init=False)

    def __post_init__(self) -> None:
        self.first = self.done

    def __str__(self) -> str:
        seconds = time.monotonic() - self.start
        parts = [f"{self.name} {self.done}" + (f"/{self.total}" if self.total else "")]
        if self.done > self.first and seconds > 0:
            rate = (self.done - self.first) / seconds
            parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
            if self.total and self.done < self.total:
                parts.append(f"{timedelta(seconds=math.ceil((self.total - self.done) / rate))} left")
            else:
                parts.append(f"{timedelta(seconds=int(seconds))} in all")
        return " · ".join(parts)

    def next_line(self) -> int:
        """Return the round after which the next plain line is due."""
        every = max(1, math.ceil(self.total / _LINES)) if self.total else _ROUNDS_PER_LINE
        return (self.done // every + 1) * every


class _LogsAboveBar:
    """Sends what loggers write to the terminal through rich, which prints it above the bar instead of into it.

    Rich replaces ``sys.stderr`` and ``sys.stdout`` while a bar lives; handlers made earlier still hold the originals.
    """

    def __init__(self) -> None:
        replaced = [proxy for proxy in (sys.stdout, sys.stderr) if isinstance(proxy, FileProxy)]
        proxies = {id(proxy.rich_proxied_file): proxy for proxy in replaced}
        loggers = [logging.root, *(entry for entry in logging.root.manager.loggerDict.values() if isinstance(entry, logging.Logger))]
        handlers = {handler for logger in loggers for handler in logger.handlers if isinstance(handler, logging.StreamHandler)}
        self._streams = [(handler, handler.stream) for handler in handlers if id(handler.stream) in proxies]
        for handler, stream in self._streams:
            handler.setStream(proxies[id(stream)])

    def restore(self) -> None:
        """Give every handler its own stream back."""
        for handler, stream in self._streams:
            handler.setStream(stream)


class RoundProgressBar(ProgressBar):
    """Shows rounds done, rounds per second, time left, losses, accuracy and bytes; in plain lines if stderr is no terminal.

    A round is a step of the trainer's one optimizer, so a round that must be repeated does not move the bar. Between refreshes a round
    costs a comparison: metrics are read from their tensors only to be shown. Validation has no bar of its own, testing has.

    Args:
        refresh_rate: most refreshes a second; 0 shows nothing.

    Raises:
        ConfigurationError: if ``refresh_rate`` is negative.
    """

    def __init__(self, refresh_rate: float = 5.0) -> None:
        super().__init__()
        if refresh_rate < 0:
            raise ConfigurationError(f"Expected `refresh_rate` >= 0 but got {refresh_rate}")
        self.refresh_rate = refresh_rate
        self._enabled = True
        self._progress: Progress | None = None
        self._count = _Count("", None)
        self._due = 0.0
        self._logs: _LogsAboveBar | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether anything is shown."""
        return self._enabled and self.refresh_rate > 0

    def disable(self) -> None:
        """Show nothing from now on."""
        self._enabled = False
        self._close()

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the rounds done so far, with the validation that followed the last one."""
        if self._progress is None:
            self._open(_Count("Round", _total_rounds(trainer), trainer.global_step))
        self._show_rounds(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Show the round just done, where it does not cost a line."""
        if self._live:
            self._show_rounds(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show where training ended and leave it on the screen."""
        self._show_rounds(trainer, last=True)
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar if validation is all that runs."""
        if trainer.state.fn == "validate":
            self._open(_Count("Validating", _total_batches(trainer.num_val_batches)))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Advance the bar of a validation that is all that runs."""
        if trainer.state.fn == "validate":
            self._show_batch()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar of a validation that is all that runs."""
        if trainer.state.fn == "validate":
            self._close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar for testing."""
        self._open(_Count("Testing", _total_batches(trainer.num_test_batches)))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Advance the bar of testing."""
        self._show_batch()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar of testing."""
        self._close()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar for prediction."""
        self._open(_Count("Predicting", _total_batches(trainer.num_predict_batches)))

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Advance the bar of prediction."""
        self._show_batch()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar of prediction."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back, with the bar as it was."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back, whatever happened."""
        self._close()

    @property
    def _live(self) -> bool:
        return self._progress is not None and not self._progress.disable

    def _make_console(self) -> Console:
        return Console(stderr=True)  # stdout is left to results

    def _open(self, count: _Count) -> None:
        if not self.is_enabled:
            return
        console = self._make_console()
        self._count, self._due = count, 0.0
        self._progress = Progress(
            BarColumn(bar_width=_BAR),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,  # no thread: the trainer's own hooks refresh
            redirect_stdout=sys.stdout.isatty(),
            disable=not console.is_interactive,
        )
        self._progress.add_task(str(count), total=count.total, completed=count.done)
        self._progress.start()
        if self._live:
            self._logs = _LogsAboveBar()
        else:
            self._due = count.next_line()

    def _show_rounds(self, trainer: Trainer, last: bool = False) -> None:
        if self._progress is None:
            return
        done = trainer.global_step
        if self._live:
            if last or time.monotonic() >= self._due:
                self._count.done = done
                self._refresh(trainer)
        elif done >= self._due or (last and done > self._count.done):
            self._count.done = done
            self._due = self._count.next_line()
            self._progress.console.print(self._text(trainer), soft_wrap=True, markup=False, highlight=False)

    def _show_batch(self) -> None:
        self._count.done += 1
        if self._live and (self._count.done == self._count.total or time.monotonic() >= self._due):
            self._refresh()

    def _refresh(self, trainer: Trainer | None = None) -> None:
        if self._progress is not None:
            self._due = time.monotonic() + 1 / self.refresh_rate
            text = Text(self._text(trainer))
            text.truncate(max(1, self._progress.console.width - _BAR - 1), overflow="ellipsis")
            self._progress.update(self._progress.task_ids[0], completed=self._count.done, description=text.plain, refresh=True)

    def _text(self, trainer: Trainer | None) -> str:
        return " · ".join([str(self._count), *(_metrics(trainer) if trainer else [])])

    def _close(self) -> None:
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.stop()
        if self._logs is not None:
            self._logs.restore()
            self._logs = None


def _metrics(trainer: Trainer) -> list[str]:
    logged = trainer.callback_metrics
    return [text(float(logged[name])) for name, text in _METRICS if name in logged]


def _total_rounds(trainer: Trainer) -> int | None:
    total = trainer.estimated_stepping_batches
    return int(total) if 0 < total < math.inf else None


def _total_batches(batches: Sequence[int | float]) -> int | None:
    total = sum(batches)
    return int(total) if total < math.inf else None
