"""Progress of long work on stderr: a bar on a terminal, else plain lines, at least one every ten seconds."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TextIO

SECONDS = 10.0
"""Longest silence."""


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream can show a bar."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Lines:
    """Prints lines, and knows when the last one was.

    Args:
        seconds: longest silence.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line."""
        self.heard()
        print(text, file=sys.stderr, flush=True)

    def heard(self) -> None:
        """Take note of a line that somebody else printed."""
        self._last = time.monotonic()

    def silent_for(self) -> float:
        """Return the seconds since the last line."""
        return time.monotonic() - self._last


@contextmanager
def heartbeat(lines: Lines, text: Callable[[], str]) -> Iterator[None]:
    """Say ``text()`` whenever nothing was said for long while the block runs, from a thread of its own: the work need not know."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(max(lines.seconds - lines.silent_for(), lines.seconds / 20)):
            if lines.silent_for() >= lines.seconds:
                lines.say(text())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def waiting(what: str, seconds: float = SECONDS) -> Iterator[Lines]:
    """Say what is being waited for, at once and whenever nothing was said for long: in lines, where others write to the terminal too."""
    start, lines = time.monotonic(), Lines(seconds)
    lines.say(f"{what} ...")
    with heartbeat(lines, lambda: f"{what}: {_clock(time.monotonic() - start)} so far"):
        yield lines


Advance = Callable[..., None]
"""Takes a text, how many steps are ``done`` with it (one if not given) and whether they took the time that others will (``timed``)."""


@contextmanager
def progress(what: str, total: int | None = None, show: bool = True, seconds: float = SECONDS) -> Iterator[Advance]:
    """Show how far ``what`` is; the block is given what counts one of ``total`` steps, or of an unknown number, as done and says a text."""
    if not show:
        yield lambda *_, **__: None
    elif is_terminal(sys.stderr):
        with _bar(what, total) as advance:
            yield advance
    else:
        count, quick, last, start, lines = 0, 0, "", time.monotonic(), Lines(seconds)

        def so_far() -> str:
            return f"{what} {count}/{total}" if total else f"{what} {count}" if count else what

        def left() -> str:
            worked = count - quick
            return f"{_clock((time.monotonic() - start) / worked * (total - count))} left" if total and worked and count < total else ""

        def advance(text: str = "", done: int = 1, timed: bool = True) -> None:
            nonlocal count, quick, last
            count, quick = count + done, quick + done * (not timed)
            if text and text != last:
                lines.say(" · ".join(filter(None, (so_far(), text, left()))))
            last = text or last

        with heartbeat(lines, lambda: ", ".join(filter(None, (f"{so_far()}: {_clock(time.monotonic() - start)} so far", left())))):
            yield advance


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    words = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    clock = TimeElapsedColumn() if total is None else TimeRemainingColumn()
    with Progress(BarColumn(12), words, clock, console=Console(stderr=True), transient=True, expand=True) as bar:
        task, last = bar.add_task(what, total=total), ""

        def advance(text: str = "", done: int = 1, timed: bool = True) -> None:
            nonlocal last
            bar.advance(task, done)
            last = f" · {text}" if text else last
            bar.update(task, description=f"{what} {bar.tasks[task].completed:.0f}/{total}{last}" if total else what + last)

        yield advance


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=math.ceil(seconds)))
