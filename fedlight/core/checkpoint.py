"""Checkpoints as files: each carries a digest of all its bytes, and is written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fedlight.core.errors import ConfigurationError, require
from fedlight.core.files import replacing

RUN = "fedlight"
"""What a checkpoint calls the state of a federated run."""

_MARK = b"sha256:"
_CHUNK = 1 << 20


def save_tensors(content: Any, file: Any) -> None:
    """Do what ``torch.save`` does, but raise the ``OSError`` of a file that cannot be written, such as one on a full disk."""
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch tells where it was in the file
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def write_checkpoint(path: Path, content: dict[str, Any], mode: int = 0o666) -> None:
    """Write tensors and plain data as ``torch.save`` does, with a digest of the file's bytes in the comment of its zip archive.

    Args:
        path: the file; what was there stays until the new one is complete and synced.
        content: what to write.
        mode: the new file's rights, less those that the process withholds from all its files.
    """
    with replacing(path, mode) as file:
        save_tensors(content, file)
        file.seek(0)
        comment = _MARK + hashlib.file_digest(file, "sha256").hexdigest().encode()
        file.seek(-2, os.SEEK_END)  # the length of the comment, 0 so far
        file.write(struct.pack("<H", len(comment)) + comment)


def read_checkpoint(path: Path, objects: bool = False) -> dict[str, Any]:
    """Return a checkpoint's content, on the CPU, if its bytes are those that were written.

    A checkpoint of plain Lightning has no digest and is read without, one of a federated run is refused without.

    Args:
        path: the file.
        objects: whether other objects than tensors and plain data may be loaded, which can run any code.

    Raises:
        ConfigurationError: if it is damaged or no checkpoint, or holds other objects.
    """
    digested = check_checkpoint(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=not objects)
    except OSError:
        raise
    except Exception as error:  # whatever the parts of a file that is none raise
        if isinstance(error, pickle.UnpicklingError) and "nsupported" in str(error):
            raise ConfigurationError(
                f"Expected {path} to hold tensors and plain data but it holds other objects, whose loading could run code: choose a "
                "checkpoint that fedlight wrote"
            ) from error
        raise ConfigurationError(_damaged(path)) from error
    if not isinstance(content, dict) or (RUN in content and not digested):
        raise ConfigurationError(_damaged(path))
    return content


def check_checkpoint(path: Path) -> bool:
    """Return whether a checkpoint carries a digest, without loading it.

    Raises:
        ConfigurationError: if its bytes do not have that digest, or it is no zip archive that takes no more memory than its file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        comment = archive_comment(file, size)
    if comment is None:
        raise ConfigurationError(_damaged(path))
    if not comment.startswith(_MARK):
        return False
    with path.open("rb") as file:
        digest, left = hashlib.sha256(), size - len(comment) - 2
        while left > 0 and (data := file.read(min(_CHUNK, left))):
            digest.update(data)
            left -= len(data)
    digest.update(bytes(2))
    require(comment == _MARK + digest.hexdigest().encode(), _damaged(path))
    return True


def archive_comment(file: BinaryIO, size: int) -> bytes | None:
    """Return the comment of a zip archive of ``size`` bytes; None if it is none, or its parts would take more memory than its bytes."""
    try:
        with zipfile.ZipFile(file) as archive:
            parts, comment = archive.infolist(), archive.comment
    except Exception:  # zipfile has no common class for what damaged bytes raise
        return None
    stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
    return comment if stored and sum(part.file_size for part in parts) <= size else None


def _damaged(path: Path) -> str:
    return f"Expected a whole checkpoint at {path} but it is damaged or none: choose another from the run's checkpoints/"
