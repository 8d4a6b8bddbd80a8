"""One progress bar for a federated run, whose unit is the round."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, TQDMProgressBar
from tqdm.contrib import DummyTqdmFile

from fedlight.core.errors import require
from fedlight.core.figures import format_bytes
from fedlight.core.progress import Lines, heartbeat, is_terminal, progress

_LINES = 10  # plain lines in a run whose length is known
_ROUNDS_PER_LINE = 100  # where it is not
_SECONDS = 0.2  # between refreshes of a bar, at the least

_METRICS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("val/accuracy", "val acc {:.1%}".format),
    ("bytes/ratio", "ratio {:.0f}x".format),
    ("sim/loss", "loss {:.3f}".format),
    ("bytes/uplink", lambda n_bytes: f"up {format_bytes(n_bytes)}"),
    ("bytes/downlink", lambda n_bytes: f"down {format_bytes(n_bytes)}"),
    ("val/loss", "val loss {:.3f}".format),
)
"""What is shown after the round, most wanted first: a narrow terminal cuts the end."""


class RoundProgressBar(TQDMProgressBar):
    """Shows rounds done, their rate, time left, losses, accuracy and bytes; in plain lines if stderr is no terminal.

    A round is a step of the trainer's one optimizer, so a round that must be repeated does not move the bar. Between refreshes, five a
    second at the most, a round costs a comparison. Validation has no bar of its own in a fit; testing and predicting have Lightning's.

    Args:
        refresh_rate: least rounds between refreshes; 0 shows nothing.
        label: name of the run, where there are several.

    Raises:
        ConfigurationError: if ``refresh_rate`` is negative.
    """

    def __init__(self, refresh_rate: int = 1, label: str = "") -> None:
        require(refresh_rate >= 0, f"Expected `refresh_rate` >= 0 but got {refresh_rate}")
        super().__init__(refresh_rate)
        self._evaluation = ExitStack()
        self._rounds: _Rounds | None = None
        self._label = f"{label} · " if label else ""
        self._validated = 0

    def init_sanity_tqdm(self) -> Tqdm:
        """Return no bar."""
        return Tqdm(disable=True)

    init_train_tqdm = init_sanity_tqdm  # that of the rounds is made before the first one, when pretraining is over

    def init_validation_tqdm(self) -> Tqdm:
        """Return a bar if validation is all that runs."""
        return self._batches(self.trainer.state.fn == "validate")

    def init_test_tqdm(self) -> Tqdm:
        """Return a bar for testing, or for prediction."""
        return self._batches()

    init_predict_tqdm = init_test_tqdm

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a bar, or lines."""
        super().on_test_start(trainer, pl_module)
        self._tell("Testing")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End it."""
        self._evaluation.close()
        super().on_test_end(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show a bar, or lines."""
        super().on_predict_start(trainer, pl_module)
        self._tell("Predicting")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End it."""
        self._evaluation.close()
        super().on_predict_end(trainer, pl_module)

    def _tell(self, what: str) -> None:
        if self.is_enabled and not is_terminal(sys.stderr):
            self._evaluation.enter_context(progress(what))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the rounds done so far, with the validation that followed the last one."""
        if self._rounds is None and self.is_enabled:
            self._rounds = _Rounds(trainer, self.refresh_rate, self._label, lambda: self._validated)
        if self._rounds is not None and self.is_enabled:
            self._rounds.update(trainer.global_step - self._rounds.n)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Wait for the validation that may follow."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the round that what was measured belongs to."""
        super().on_validation_end(trainer, pl_module)
        self._validated = trainer.global_step

    def on_train_end(self, *_: Any) -> None:
        """Show where training ended and leave it on the screen."""
        if self._rounds is not None:
            self._rounds.update(self.trainer.global_step - self._rounds.n)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back, with the bar as it was."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back, whatever happened."""
        self._close()

    def _batches(self, shown: bool = True) -> Tqdm:
        hidden = self.is_disabled or not shown or not is_terminal(sys.stderr)
        return Tqdm(disable=hidden, file=sys.stderr, dynamic_ncols=True, bar_format=self.BAR_FORMAT)

    def _close(self) -> None:
        self._evaluation.close()
        rounds, self._rounds = self._rounds, None
        if rounds is not None:
            rounds.close()


class _Rounds(Tqdm):
    """Rounds done, on stderr (stdout is left to results): a bar, or plain lines, at least one every ten seconds."""

    monitor_interval = 0  # no thread for a bar: the trainer's own hooks refresh it

    def __init__(self, trainer: Trainer, refresh_rate: int, label: str, validated: Callable[[], int]) -> None:
        self._trainer = trainer
        self._validated = validated
        self._streams = ExitStack()
        total = trainer.estimated_stepping_batches
        known = 0 < total < math.inf
        every = max(1, math.ceil(total / _LINES)) if known else _ROUNDS_PER_LINE
        live = is_terminal(sys.stderr)
        super().__init__(
            initial=trainer.global_step,
            total=int(total) if known else None,
            file=sys.stderr,
            gui=not live,  # then tqdm prints nothing by itself
            mininterval=_SECONDS if live else 0.0,
            maxinterval=math.inf,  # else the thread of Lightning's bars makes a line of every round, once rounds are slow
            miniters=refresh_rate if live else every,
            dynamic_ncols=True,
            unit="",
            bar_format=("{bar:8} " if live else "") + label + ("Round {n_fmt}/{total_fmt}" if known else "Round {n_fmt}"),
        )
        self._lines = Lines()
        if live:
            self._streams.enter_context(_printed_above())
        else:
            self._streams.enter_context(heartbeat(self._lines, self.__str__))
            self.last_print_n -= self.initial % every  # lines come after the same rounds in a resumed run

    def __str__(self) -> str:
        told = self.format_dict
        parts = [self.format_meter(**{**told, "ncols": None})]
        done, seconds = told["n"] - told["initial"], told["elapsed"]
        if done > 0 and seconds > 0:
            rate = done / seconds
            parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
            left = (told["total"] - told["n"]) / rate if told["total"] else 0
            parts.append(f"{self.format_interval(math.ceil(left))} left" if left > 0 else f"{self.format_interval(seconds)} in all")
        text = " · ".join([*parts, *_metrics(self._trainer, self._validated())])
        width = math.inf if self.gui else max(told["ncols"] or 0, 0) or shutil.get_terminal_size().columns - 1
        return text if len(text) <= width else text[: int(width) - 1] + "…"

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.gui:
            self._lines.say(str(self))
        else:
            super().display(msg, pos)

    def close(self) -> None:
        if self.gui and not self.disable and self.n > self.last_print_n:
            self.display()
        super().close()
        self._streams.close()


@contextmanager
def _printed_above() -> Iterator[None]:
    """Send what loggers write to the terminal through tqdm, which prints it above the bar instead of into it."""
    terminals = {id(stream): DummyTqdmFile(stream) for stream in (sys.stdout, sys.stderr) if is_terminal(stream)}
    loggers = [logging.root, *(entry for entry in logging.root.manager.loggerDict.values() if isinstance(entry, logging.Logger))]
    handlers = {handler for logger in loggers for handler in logger.handlers if isinstance(handler, logging.StreamHandler)}
    streams = [(handler, handler.stream) for handler in handlers if id(handler.stream) in terminals]
    for handler, stream in streams:
        handler.setStream(terminals[id(stream)])
    try:
        yield
    finally:
        for handler, stream in streams:
            handler.setStream(stream)


def _metrics(trainer: Trainer, validated: int) -> list[str]:
    """Return the metrics in words: the user's own with `prog_bar=True` first, then ours; those of an earlier round say which."""
    earlier = f" after {validated}" if validated < trainer.global_step else ""
    logged, wanted = trainer.callback_metrics, dict(_METRICS)
    own = [f"{name} {float(value):.3g}" for name, value in trainer.progress_bar_metrics.items() if name not in wanted and name != "v_num"]
    ours = [(name, text(float(logged[name]))) for name, text in _METRICS if name in logged]
    return own + [text + (earlier if name.startswith("val/") else "") for name, text in ours]
