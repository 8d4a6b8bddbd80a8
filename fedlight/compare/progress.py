"""One progress bar that counts runs; plain lines if there is no terminal."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fedlight.compare.execute import Outcome
from fedlight.core.progress import Lines, heartbeat

_BAR, _CLOCK = 12, 7  # characters


class RunProgress:
    """Shows finished runs, the last outcome and the time left on stderr; stdout is for results.

    Args:
        total: number of runs.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._done = 0
        self._known = 0
        self._start = time.monotonic()
        self._streams = ExitStack()
        self._lines = Lines()
        self._console = Console(stderr=True)
        self._progress = Progress(
            BarColumn(bar_width=_BAR),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            redirect_stdout=False,
            disable=not self._console.is_interactive,
        )

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._task = self._progress.add_task(f"Run 0/{self.total}", total=self.total)
        self._progress.start()
        if self._progress.disable:
            self._streams.enter_context(heartbeat(self._lines, lambda: f"Run {self._done}/{self.total} done{self._left()}"))
        return self

    def __exit__(self, *error: object) -> None:
        self._streams.close()
        self._progress.stop()

    def expect_fewer(self, runs: int) -> None:
        """Subtract runs that will not happen from the total."""
        self.total -= runs

    def show(self, outcome: Outcome) -> None:
        """Count a run; print a line for a failed one."""
        self._done += 1
        self._known += outcome.again
        text = f"{outcome.run}: {_result(outcome)}"
        if self._progress.disable:
            self._lines.say(f"Run {self._done}/{self.total} · {text}{self._left()}")
            return
        if not outcome.ok:
            self._print(text)
        line = Text(f"Run {self._done}/{self.total} · {text}{self._left()}")
        line.truncate(max(1, self._console.width - _BAR - _CLOCK - 2), overflow="ellipsis")
        self._progress.update(self._task, completed=self._done, total=self.total, description=line.plain)

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def _left(self) -> str:
        """Return the time left at the rate so far, if there is one; runs finished earlier do not count."""
        ran, remaining = self._done - self._known, self.total - self._done
        if not ran or not remaining:
            return ""
        return f" · {timedelta(seconds=math.ceil((time.monotonic() - self._start) / ran * remaining))} left"


def _result(outcome: Outcome) -> str:
    if not outcome.ok:
        return f"failed: {outcome.error}"
    accuracy = f"{outcome.summary['test_accuracy']:.1%}"
    return f"{accuracy}, finished before" if outcome.again else f"{accuracy} in {outcome.seconds:.0f} s"
