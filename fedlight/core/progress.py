"""Progress of long work on stderr: a bar on a terminal, else plain lines, at least one every ten seconds."""

from __future__ import annotations

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


@contextmanager
def progress(what: str, total: int | None = None, show: bool = True, seconds: float = SECONDS) -> Iterator[Callable[[], None]]:
    """Show how far ``what`` is; the block is given what counts one of ``total`` steps, or of an unknown number, as done."""
    if not show:
        yield lambda: None
    elif is_terminal(sys.stderr):
        with _bar(what, total) as step:
            yield step
    else:
        done, start = 0, time.monotonic()

        def text() -> str:
            spent = time.monotonic() - start
            count = f" {done}/{total}" if total else f" {done}" if done else ""
            left = f", {_clock(spent / done * (total - done))} left" if total and 0 < done < total else ""
            return f"{what}{count}: {_clock(spent)} so far{left}"

        def advance() -> None:
            nonlocal done
            done += 1

        with heartbeat(Lines(seconds), text):
            yield advance


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
