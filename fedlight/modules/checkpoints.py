"""What a checkpoint holds of single clients lies in a file of its own, beside it, whose name warns."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from fedlight.core.checkpoint import RUN, read_checkpoint, write_checkpoint
from fedlight.core.errors import ConfigurationError, own_error, require

CLIENTS = "fedlight_clients"
"""What a checkpoint calls the state of single clients, until it is written and once it is read."""

CLIENTS_FILE = "clients_file"
"""What the state of a run calls the name of the file with the state of clients."""

_WARNING = "clients.keep-secret"
_NAME = re.compile(rf"[^/\\]+\.[0-9a-f]{{8}}\.{re.escape(_WARNING)}")


class CheckpointFiles(CheckpointIO):
    """Writes and reads pairs of files: a checkpoint without single clients, and what it had of them.

    The second has a new name for every checkpoint that is written, which the checkpoint holds: whenever a process is killed, each
    checkpoint has its own. Older ones of the same checkpoint are deleted when the new one is complete.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write both files, synced, or after an error neither."""
        path = local_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {name: value for name, value in checkpoint.items() if name != CLIENTS}
        if CLIENTS not in checkpoint:
            write_checkpoint(path, content)
            return
        clients = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.{_WARNING}")
        try:
            write_checkpoint(clients, checkpoint[CLIENTS], mode=0o600)
            write_checkpoint(path, content | {RUN: checkpoint[RUN] | {CLIENTS_FILE: clients.name}})
        except BaseException:
            clients.unlink(missing_ok=True)
            raise
        _forget_clients(path, spare=clients)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return what a checkpoint holds, and what is in its file of clients if that is there."""
        path = local_path(path)
        content = read_checkpoint(path, objects=weights_only is False)
        run = content.get(RUN)
        name = run.get(CLIENTS_FILE) if isinstance(run, dict) else None
        if isinstance(name, str) and _NAME.fullmatch(name) and (path.parent / name).is_file():
            content[CLIENTS] = read_checkpoint(path.parent / name)
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Delete both files."""
        path = local_path(path)
        path.unlink(missing_ok=True)
        _forget_clients(path)


class CheckpointConnector(_CheckpointConnector):
    """Lightning's, which turns whatever fails where a checkpoint is followed into a ``ConfigurationError``."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        vars(self).update(vars(trainer._checkpoint_connector))

    def _restore_modules_and_callbacks(self, *arguments: Any, **options: Any) -> None:
        with _followed():
            super()._restore_modules_and_callbacks(*arguments, **options)

    def restore_training_state(self) -> None:
        """Restore optimizers, schedules and loops."""
        with _followed():
            super().restore_training_state()


@contextmanager
def _followed() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if own_error(error) is not None or isinstance(error, (OSError, MisconfigurationException)):
            raise
        raise ConfigurationError(
            f"Expected a checkpoint that this run can follow but got {type(error).__name__}: {error}: choose another from the run's "
            "checkpoints/, or start a new run"
        ) from error


def keep_clients_apart(trainer: Trainer) -> None:
    """Let a Trainer write what checkpoints hold of single clients to other files; raises ``ConfigurationError`` if a plugin writes them."""
    found = trainer.strategy.checkpoint_io
    require(
        type(found) in (TorchCheckpointIO, CheckpointFiles),
        f"Expected no checkpoint plugin in `trainer.plugins` but got {type(found).__name__}: leave it out, because a federated run writes "
        "what checkpoints hold of single clients to files of their own",
    )
    trainer.strategy.checkpoint_io = CheckpointFiles()
    trainer._checkpoint_connector = CheckpointConnector(trainer)


def _forget_clients(path: Path, spare: Path | None = None) -> None:
    """Delete the files of clients of a checkpoint, all but one."""
    own = re.compile(rf"{re.escape(path.stem)}\.[0-9a-f]{{8}}\.{re.escape(_WARNING)}")
    for other in path.parent.iterdir() if path.parent.is_dir() else ():
        if own.fullmatch(other.name) and other != spare:
            with suppress(OSError):  # the checkpoint is complete without; the next one tries again
                other.unlink()


def local_path(path: Any) -> Path:
    """Return a checkpoint's path; Lightning would load a URL, and run code that it holds."""
    require("://" not in str(path), f"Expected checkpoints to be files of this machine but got {path}: give a folder, or a file in one")
    return Path(path)
