"""Samples of any map-style Dataset, with the interface of a tensor, and the order of its DataLoader, which is split along with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from torch.utils.data import sampler as samplers

from fedlight.core.errors import ConfigurationError
from fedlight.core.orders import epoch_lengths, epoch_orders


@dataclass(frozen=True)
class Order:
    """How a client goes through its own samples: shuffled, in their order, or drawn by weight.

    Args:
        shuffled: whether every pass is shuffled; else samples come in their order, and a round goes on where the last one ended.
        weights: weight of every item of the whole data set ``[items]``, for draws instead.
        replacement: whether an item may be drawn twice in a pass.
        share: draws in a pass, as a share of the client's samples.
        drop_last: whether a last batch that is smaller is left out.
    """

    shuffled: bool = True
    weights: np.ndarray | None = None
    replacement: bool = True
    share: float = 1.0
    drop_last: bool = False

    def lengths(self, n: int, batch_size: int, epochs: int | None, steps: int | None) -> tuple[int, ...]:
        """Return how many batches every epoch of a round over ``n`` samples has."""
        return epoch_lengths(self._drawn(n), batch_size, epochs, steps, self.drop_last)

    def orders(
        self, rows: np.ndarray, batch_size: int, epochs: int | None, steps: int | None, round: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, int]]:
        """Yield (positions in ``rows``, batch size) for every pass; ``rows`` are the client's items ``[n]``."""
        n, drawn = len(rows), self._drawn(len(rows))
        before = 0 if steps is None else round * steps * min(batch_size, n)

        def in_order(taken: int) -> Tensor:
            start = before + taken * min(batch_size, n) if steps is not None else 0
            return (start + torch.arange(n)) % n

        def weighted(taken: int) -> Tensor:
            assert self.weights is not None
            weights = torch.from_numpy(self.weights[rows])
            if not weights.any():
                raise ConfigurationError(
                    "Expected a sampler that gives every client a sample of weight above 0 but one has none: choose another `partitioner`"
                )
            count = drawn if self.replacement else min(drawn, int((weights > 0).sum()))
            return torch.multinomial(weights, count, self.replacement, generator=generator)

        draw = weighted if self.weights is not None else None if self.shuffled else in_order
        yield from epoch_orders(drawn, batch_size, epochs, steps, generator, self.drop_last, draw)

    def _drawn(self, n: int) -> int:
        return n if self.weights is None else max(1, round(self.share * n))


def order_of(loader: DataLoader[Any], owner: str) -> tuple[Order, np.ndarray]:
    """Return a loader's order, and the items that it reads, int64 ``[samples]``; raises ``ConfigurationError`` if no client can."""
    batches = loader.batch_sampler
    if batches is None:
        raise ConfigurationError(
            f"Expected a train_dataloader() of {owner} that makes batches but it has `batch_size` None, where items are batches: give "
            "the data set single items, and the loader a `batch_size`"
        )
    if type(batches) is not samplers.BatchSampler:
        raise _unsplit(owner, "batch_sampler", batches)
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ConfigurationError(
            f"Expected a train_dataloader() of {owner} that loads as torch's DataLoader does but {type(loader).__name__} overrides "
            "`__iter__`, which clients do not call: move it into the data set or `collate_fn`"
        )
    items, sampler, drop_last = np.arange(len(cast("Sized", loader.dataset))), batches.sampler, batches.drop_last
    kind = type(sampler)
    if kind is samplers.SequentialSampler:
        return Order(shuffled=False, drop_last=drop_last), items
    if kind is samplers.RandomSampler and isinstance(sampler, samplers.RandomSampler):
        if not sampler.replacement and sampler.num_samples == len(items):
            return Order(drop_last=drop_last), items
        if sampler.replacement or sampler.num_samples < len(items):
            share = sampler.num_samples / len(items)
            return Order(weights=np.ones(len(items)), replacement=sampler.replacement, share=share, drop_last=drop_last), items
    if kind is samplers.SubsetRandomSampler and isinstance(sampler, samplers.SubsetRandomSampler):
        return Order(drop_last=drop_last), np.array(list(sampler.indices), dtype=np.int64)
    if kind is samplers.WeightedRandomSampler and isinstance(sampler, samplers.WeightedRandomSampler):
        weights = np.zeros(len(items))
        weights[: len(sampler.weights)] = sampler.weights.numpy()
        share = sampler.num_samples / len(items)
        return Order(weights=weights, replacement=sampler.replacement, share=share, drop_last=drop_last), items
    if isinstance(sampler, (list, tuple, range, np.ndarray, Tensor)):
        return Order(shuffled=False, drop_last=drop_last), np.array([int(item) for item in sampler], dtype=np.int64)
    raise _unsplit(owner, "sampler", sampler)


def _unsplit(owner: str, argument: str, sampler: samplers.Sampler[Any] | Any) -> ConfigurationError:
    return ConfigurationError(
        f"Expected a `{argument}` of {owner}'s train_dataloader() that can be split over clients but got {type(sampler).__name__}: give "
        "`shuffle`, torch's SubsetRandomSampler or WeightedRandomSampler, or a `torch.utils.data.Subset` of the items to train on. Clients "
        "and processes share the set without a sampler"
    )


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
