"""Samples of any map-style Dataset, with the interface of a tensor: clients train on them if the data is not plain arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from fedlight.data.order import Order


class Collated:
    """One batch from the user's collate function; ``content`` may have any structure."""

    def __init__(self, content: Any) -> None:
        self.content = content


class Samples:
    """Some rows of a Dataset, with the operations of a tensor ``[samples, ...]`` that partitions and local training need.

    It reads items only for batches, which the collate function makes, as `Collated`.

    Args:
        dataset: a map-style dataset.
        collate: makes a batch from a list of items.
        rows: the chosen items, int64 ``[samples]``; all of them if not given.
        order: how clients go through them (shuffled if not given).
    """

    ndim = 1

    def __init__(
        self,
        dataset: Dataset[Any],
        collate: Callable[[list[Any]], Any] = default_collate,
        rows: np.ndarray | None = None,
        order: Order | None = None,
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.rows = np.arange(len(dataset)) if rows is None else rows  # type: ignore[arg-type]
        self.order = order or Order()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of samples; items have no shape."""
        return (len(self.rows),)

    def __getitem__(self, index: Any) -> Samples:
        """Return the samples at a slice, or at an array or tensor of positions."""
        chosen = index.cpu().numpy() if isinstance(index, Tensor) else index
        return Samples(self.dataset, self.collate, self.rows[chosen], self.order)

    def index_select(self, dim: int, index: Tensor) -> Samples:
        """Return the samples at these positions."""
        return self[index]

    def to(self, device: torch.device | str) -> Samples:
        """Return the samples unchanged: batches are moved when they are built."""
        return self

    def lengths(self, batch_size: int, epochs: int | None, steps: int | None) -> tuple[int, ...]:
        """Return how many batches every epoch of a client with these samples has."""
        return self.order.lengths(len(self.rows), batch_size, epochs, steps)

    def orders(
        self, batch_size: int, epochs: int | None, steps: int | None, round: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, int]]:
        """Yield (positions, batch size) for every pass of a client with these samples."""
        return self.order.orders(self.rows, batch_size, epochs, steps, round, generator)

    def split(self, size: int) -> Iterator[Collated]:
        """Yield batches of ``size`` samples, the last one smaller if necessary."""
        return (self.batch(self.rows[start : start + size]) for start in range(0, len(self.rows), size))

    def batch(self, rows: np.ndarray) -> Collated:
        """Return one batch of these items."""
        if type(self.dataset) is TensorDataset and self.collate is default_collate:  # the same, many times faster
            index = torch.from_numpy(rows)
            return Collated([tensor[index] for tensor in self.dataset.tensors])
        if many := getattr(self.dataset, "__getitems__", None):  # as torch's loader asks where a dataset has it
            return Collated(self.collate(many([int(row) for row in rows])))
        return Collated(self.collate([self.dataset[int(row)] for row in rows]))
