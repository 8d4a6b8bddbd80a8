"""Iterables for a Trainer over tensors that are already in memory.

They are plain iterables, not DataLoaders, so that Lightning neither inserts a DistributedSampler, which repeats samples to
give processes equal numbers, nor recommends workers, which would only copy tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fedlight.core.errors import DataError

Batch = TypeVar("Batch")


class Rounds:
    """An endless count of rounds, one item (an int64 scalar tensor) per round.

    The value only counts items of this loader; a round's number is the Trainer's global step.
    """

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor(number) for number in itertools.count())


class Batches(Generic[Batch]):
    """Batches of an evaluation set, each sample exactly once over all processes.

    Process ``rank`` of ``world`` takes the ``rank``-th contiguous part and cuts it into the same number of batches as every
    other process, so hooks with collectives stay synchronized; a batch is at most one sample larger than ``batch_size``, and
    only where parts differ in size.

    Raises:
        DataError: there are fewer samples than processes.
    """

    def __init__(self, samples: int, fetch: Callable[[slice], Batch], batch_size: int) -> None:
        self.samples = samples
        self.fetch = fetch
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self._bounds()) - 1

    def __iter__(self) -> Iterator[Batch]:
        return (self.fetch(slice(start, stop)) for start, stop in itertools.pairwise(self._bounds()))

    def _bounds(self) -> list[int]:
        return batch_bounds(self.samples, self.batch_size, *rank_and_world())


def batch_bounds(samples: int, batch_size: int, rank: int, world: int) -> list[int]:
    """Return the ``batches + 1`` boundaries of a process's batches; the number of batches is equal on all processes."""
    if samples < world:
        raise DataError(f"evaluation data: expected a sample for each of {world} processes, got {samples}; evaluate on fewer devices.")
    first, last = samples * rank // world, samples * (rank + 1) // world
    batches = -(-(samples // world) // batch_size)
    return [first + (last - first) * batch // batches for batch in range(batches + 1)]


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes, (0, 1) without distributed training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
