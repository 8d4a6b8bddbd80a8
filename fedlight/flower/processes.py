"""Programs that a command starts and ends, and what ends the command itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fedlight.core.errors import ConfigurationError

PATIENCE = 10.0
"""Seconds that a program has to end before it is killed."""


class StopError(BaseException):
    """A signal that ends the command: ``status`` is its exit status, 0 after Ctrl-C and 143 after SIGTERM."""

    def __init__(self, number: int, *_: object) -> None:
        self.status = 0 if number == signal.SIGINT else 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise ``StopError`` in the block on Ctrl-C and SIGTERM. Both are ignored after it, so that everything is ended."""

    def stop(number: int, frame: object) -> None:
        raise StopError(number)

    _handle(stop)
    try:
        yield
    finally:
        _handle(signal.SIG_IGN)


def _handle(handler: signal._HANDLER) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def end(process: subprocess.Popen[bytes] | None, seconds: float = PATIENCE) -> None:
    """End a program, if it runs, with SIGTERM, and with SIGKILL after so many seconds."""
    if process is None or process.poll() is not None:
        return
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return
    process.kill()
    process.wait()


def end_session(process: subprocess.Popen[bytes], seconds: float = PATIENCE) -> None:
    """End a program that has a session of its own, and all that it started there."""
    end(process, seconds)
    limit = time.monotonic() + seconds
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < limit:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)


def answers(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether a program listens on a port."""
    with socket.socket() as made:
        made.settimeout(1)
        return made.connect_ex((host, port)) == 0


def require_free(port: int, way_out: str) -> None:
    """Raise ``ConfigurationError`` if another program listens on this port of 127.0.0.1."""
    if answers(port):
        raise ConfigurationError(f"Expected a free port but {port} of 127.0.0.1 is in use, maybe by another of these programs: {way_out}")
