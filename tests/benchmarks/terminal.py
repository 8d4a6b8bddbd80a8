"""A terminal that nobody looks at, so that a progress bar costs what it costs its user."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def pseudo_terminal() -> Iterator[None]:
    """Make ``sys.stderr`` a pseudo-terminal of 120 columns; a thread reads it empty."""
    master, slave = os.openpty()
    reader = threading.Thread(target=_drain, args=(master,), daemon=True)
    reader.start()
    kept, environment = sys.stderr, {name: os.environ.get(name) for name in ("TERM", "COLUMNS")}
    os.environ.update(TERM="xterm-256color", COLUMNS="120")
    try:
        with os.fdopen(slave, "w") as terminal:
            sys.stderr = terminal
            yield
    finally:
        sys.stderr = kept
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        reader.join(timeout=1)
        os.close(master)


def _drain(master: int) -> None:
    with contextlib.suppress(OSError):  # the other end was closed
        while os.read(master, 1 << 16):
            pass
