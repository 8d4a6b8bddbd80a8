"""State by client id, in memory, or in files beyond a size."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlight.core.checkpoint import save_tensors
from fedlight.core.codec import State
from fedlight.core.errors import require


class Shelf(MutableMapping[int, State]):
    """A mapping from client ids to their states; once these fill the given memory, the oldest ones move to temporary files.

    A state in a file is mapped into memory, and only the parts in use need be resident, so a checkpoint of all states needs no room
    for all of them. Replace states; do not change them in place.

    Args:
        in_memory_mb: MiB of tensors that stay in memory; 0 for none.

    Raises:
        ConfigurationError: if ``in_memory_mb`` is negative.
    """

    def __init__(self, in_memory_mb: float) -> None:
        require(in_memory_mb >= 0, f"Expected `client_memory_mb` >= 0 but got {in_memory_mb}")
        self._limit = in_memory_mb * 2**20
        self._memory: dict[int, State] = {}  # oldest first
        self._bytes: dict[int, int] = {}  # of the states in memory
        self._total = 0
        self._files: dict[int, Path] = {}
        self._folder: Path | None = None

    def __getitem__(self, client: int) -> State:
        if client in self._memory:
            return self._memory[client]
        state: State = torch.load(self._files[client], map_location="cpu", mmap=True, weights_only=True)
        return state

    def __setitem__(self, client: int, state: State) -> None:
        self._leave_memory(client)
        self._memory[client] = state
        self._bytes[client] = tensor_bytes(state)
        self._total += self._bytes[client]
        while self._total > self._limit:
            oldest = next(iter(self._memory))
            self._write(oldest, self._memory[oldest])
            self._leave_memory(oldest)
        if client in self._memory and client in self._files:
            self._files.pop(client).unlink()

    def __delitem__(self, client: int) -> None:
        if client not in self:
            raise KeyError(client)
        self._leave_memory(client)
        if client in self._files:
            self._files.pop(client).unlink()

    def __contains__(self, client: object) -> bool:
        return client in self._memory or client in self._files

    def __iter__(self) -> Iterator[int]:
        yield from self._memory
        yield from self._files

    def __len__(self) -> int:
        return len(self._memory) + len(self._files)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the tensors that are in memory."""
        return self._total

    def _leave_memory(self, client: int) -> None:
        if client in self._memory:
            del self._memory[client]
            self._total -= self._bytes.pop(client)

    def _write(self, client: int, state: State) -> None:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fedlight-clients-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = self._folder / f"{client}.pt"
        with path.with_suffix(".new").open("wb") as file:
            save_tensors(state, file)
        os.replace(path.with_suffix(".new"), path)  # what was read from the old file stays mapped to it
        self._files[client] = path


def tensor_bytes(kept: Any) -> int:
    """Return the bytes of all tensors in nested dicts, lists and tuples.

    >>> tensor_bytes({"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.int64), 1.0]})
    28
    """
    if isinstance(kept, Tensor):
        return kept.numel() * kept.element_size()
    parts = kept.values() if isinstance(kept, dict) else kept if isinstance(kept, (list, tuple)) else ()
    return sum(map(tensor_bytes, parts))
