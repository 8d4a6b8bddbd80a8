"""Files that are whole: the old content stays until the new one is complete and on the disk."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BufferedRandom]:
    """Yield a new file in the same folder, which takes the place of ``path`` when the block ends without an error.

    It is synced before it is renamed, and the folder after: whoever reads ``path`` finds the old content or the new one, also after a
    crash. After an error nothing is left behind and ``path`` is as it was. ``mode`` are its rights, less those of the process's umask.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(unfinished, "x+b", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that its owner alone can read; raises ``FileExistsError`` if it is there."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def append_synced(path: Path, line: str) -> None:
    """Append a line to a file and return when it is on the disk."""
    with path.open("ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Sync a folder's entries, where the system can."""
    with suppress(OSError):  # Windows opens no folders, and some file systems sync none
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
