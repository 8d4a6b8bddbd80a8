"""What a client keeps on its disk between messages: whole files, synced before an answer leaves."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedlight.core.checkpoint import save_tensors
from fedlight.core.codec import Key
from fedlight.core.files import replacing

State = dict[str, Any]

_own = partial(replacing, mode=0o600)
"""Writes a file for its owner alone, should it ever lie outside its folder."""


class RunFolder:
    """One run's part of a client's state folder; only its owner can read it.

    ``states/ROUND-ATTEMPT.pt`` holds the client's own state as an attempt left it. The server names the last attempt that counted, and the
    client goes on from there: after a resume from an older checkpoint too, as long as that state is still here. Of the client's state
    folder ``root``, the last ``runs`` runs are kept, and the states of the last ``attempts`` attempts.
    """

    def __init__(self, root: Path, run: str, attempts: int = 16, runs: int = 4) -> None:
        self.root = root
        self.folder = root / run
        self.attempts = attempts
        if not self.folder.is_dir():
            (self.folder / "states").mkdir(mode=0o700, parents=True)
            self.folder.chmod(0o700)
            self._forget_runs(runs)

    def read(self, name: str) -> State | None:
        """Return a file's content, None if there is no such file."""
        path = self.folder / f"{name}.pt"
        return torch.load(path, weights_only=True) if path.is_file() else None

    def write(self, name: str, state: State) -> None:
        """Replace a file's content."""
        with _own(self.folder / f"{name}.pt") as file:
            save_tensors(state, file)

    def text(self, name: str) -> str:
        """Return a text, empty if it is not here."""
        path = self.folder / f"{name}.json"
        return path.read_text() if path.is_file() else ""

    def write_bytes(self, name: str, content: bytes) -> None:
        """Replace a text, or a secret for the next message."""
        with _own(self.folder / name) as file:
            file.write(content)

    def delete(self, name: str) -> None:
        """Delete a file, if there is one."""
        (self.folder / f"{name}.pt").unlink(missing_ok=True)

    def state(self, key: Key | None) -> State | None:
        """Return the client's own state as an attempt left it, None if it is not here."""
        return None if key is None else self.read(f"states/{_name(key)}")

    def keep_state(self, key: Key, state: State, settled: Key | None) -> None:
        """Keep the client's own state after an attempt; those of old attempts go, but for the one that counted last."""
        self.write(f"states/{_name(key)}", state)
        names = sorted(path.stem for path in (self.folder / "states").glob("*.pt"))
        spared = {_name(key), *([_name(settled)] if settled is not None else [])}
        for name in names[: -self.attempts]:
            if name not in spared:
                self.delete(f"states/{name}")

    def take_secret(self, name: str) -> bytes | None:
        """Return a secret and delete it, so that it is used once: also if this process dies before it answers."""
        path = self.folder / name
        if not path.is_file():
            return None
        secret = path.read_bytes()
        with _own(path):  # empty, and synced: the old content is gone before it is used
            pass
        path.unlink()
        return secret or None

    def _forget_runs(self, count: int) -> None:
        folders = sorted((path for path in self.root.iterdir() if (path / "states").is_dir()), key=lambda path: path.stat().st_mtime)
        for old in folders[:-count]:
            shutil.rmtree(old, ignore_errors=True)


def _name(key: Key) -> str:
    return f"{key[0]:08d}-{key[1]:04d}"
