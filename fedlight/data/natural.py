"""Given clients: from the data's own client ids, or from explicit lists."""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from fedlight.core.errors import ConfigurationError, DataError, require
from fedlight.data.partition import Partitioner
from fedlight.data.sources import read_npz
from fedlight.data.splits import Partition, check_partition


class _Given(Partitioner):
    """Clients that the data has already, and that keep their samples."""

    by_label = False

    @abstractmethod
    def found(self, client_ids: np.ndarray | None) -> int:
        """Return how many there are."""

    def count_clients(self, samples: int, num_clients: int | None, client_ids: np.ndarray | None) -> int:
        """Return their number; ``num_clients`` must be None, 0 or that number."""
        found = self.found(client_ids)
        fits = num_clients in (None, 0, found)
        require(fits, f"num_clients: the data has {found} clients of its own, got {num_clients}; set num_clients to null.")
        return found

    def enforce(self, assignment: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
        """Refuse small clients."""
        sizes = np.bincount(assignment[assignment >= 0], minlength=num_clients)
        small = np.flatnonzero(sizes < self.min_samples)
        if len(small):
            raise ConfigurationError(
                f"min_samples: expected at least {self.min_samples} samples per client after hold-outs, got {len(small)} smaller "
                f"clients (client {small[0]} has {sizes[small[0]]}); hold out less, lower min_samples, or leave them out (Natural: "
                "drop_small=true)."
            )
        return assignment


class Natural(_Given):
    """The data's own clients, from the source's client ids; clients are numbered in sorted order of ids.

    Args:
        min_samples: Least number of samples per client; a smaller client is an error.
        drop_small: Leave smaller clients out instead; their samples are not used.
    """

    def __init__(self, min_samples: int = 1, drop_small: bool = False) -> None:
        super().__init__(min_samples)
        self.drop_small = drop_small

    def found(self, client_ids: np.ndarray | None) -> int:
        """Return the number of ids; raises ConfigurationError if all are dropped."""
        found = len(self._dense(client_ids)[1])
        require(found, f"min_samples: no client has {self.min_samples} samples, so drop_small leaves none; lower min_samples.")
        return found

    def assign(self, labels: np.ndarray, num_clients: int, rng: np.random.Generator, client_ids: np.ndarray | None) -> np.ndarray:
        """Return the position of every sample's id among the sorted ids, -1 if its client is dropped."""
        return self._dense(client_ids)[0]

    def _dense(self, client_ids: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if client_ids is None:
            raise ConfigurationError("partitioner: Natural needs client ids, got a source without; use WithClients or another partitioner.")
        ids, dense, counts = np.unique(client_ids, return_inverse=True, return_counts=True)
        keep = counts >= self.min_samples if self.drop_small else np.ones(len(ids), dtype=bool)
        return np.where(keep, np.cumsum(keep) - 1, -1)[dense].astype(np.int64), ids[keep]


class Explicit(_Given):
    """Clients given as lists of sample indices into the source's training set; unlisted samples are in no client.

    Held-out samples (proxy, validation) are removed from their lists. A file is ``.json`` (a list of lists, or an object
    of lists) or ``.npz`` (one index array per client, or ``order`` and ``offsets`` as in `Partition`).

    Args:
        clients: The index lists, or the path of a file with them, relative to the working directory.
        min_samples: Least number of samples per client; a smaller client is an error.
    """

    def __init__(self, clients: str | list[list[int]], min_samples: int = 1) -> None:
        super().__init__(min_samples)
        self.clients = clients
        self._read: Partition | None = None

    def found(self, client_ids: np.ndarray | None) -> int:
        """Return the number of lists."""
        return len(self._partition())

    def client_ids(self, samples: int, natural: np.ndarray | None) -> np.ndarray:
        """Return the list of each of ``samples``, -1 for none; raises DataError on duplicates and wrong indices."""
        lists = self._partition()
        check_partition(lists, samples, complete=False)
        ids = np.full(samples, -1, dtype=np.int64)
        ids[lists.order] = lists.clients
        return ids

    def assign(self, labels: np.ndarray, num_clients: int, rng: np.random.Generator, client_ids: np.ndarray | None) -> np.ndarray:
        """Return ``client_ids`` from the method `client_ids`, or those of the whole set if None."""
        return self.client_ids(len(labels), None) if client_ids is None else client_ids

    def _partition(self) -> Partition:
        if self._read is None:
            self._read = read_lists(Path(self.clients)) if isinstance(self.clients, str) else from_lists(self.clients, "clients")
        return self._read


def read_lists(path: Path) -> Partition:
    """Read the index lists of a ``.json`` or ``.npz`` file; raises DataError if it is missing or malformed."""
    if path.suffix == ".npz":
        parts = read_npz(path, required=(), optional=None)
        if set(parts) == {"order", "offsets"}:
            return Partition(_indices(parts["order"], f"{path}: order"), _indices(parts["offsets"], f"{path}: offsets"))
        return from_lists(parts, str(path))
    try:
        return from_lists(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as a .json or .npz of index lists: {error}; see Explicit for the formats.") from error


def from_lists(lists: Any, source: str) -> Partition:
    """Join index lists, a sequence or a mapping, in order; ``source`` names them in errors."""
    if not isinstance(lists, (list, tuple, dict)) or len(lists) == 0:
        raise DataError(f"{source}: expected one list of sample indices per client, got an unusable {type(lists).__name__}.")
    items = lists.items() if isinstance(lists, dict) else enumerate(lists)
    parts = [_indices(indices, f"{source}: client {key}") for key, indices in items]
    offsets = np.cumsum([0, *(len(part) for part in parts)]).astype(np.int64)
    return Partition(np.concatenate(parts), offsets)


def _indices(values: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(values) if np.size(values) else np.empty(0, dtype=np.int64)
    except ValueError as error:  # lists within the list
        raise DataError(f"{name}: expected a flat list of integers, but {error}.") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{name}: expected a flat list of integers, got {array.dtype} of shape {array.shape}.")
    return array.astype(np.int64)
