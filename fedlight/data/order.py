"""The order of a user's DataLoader, for each client: its samplers are split along with the training set."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

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
    """Return the order in which clients go through the items of a loader, and which items it reads at all, int64 ``[samples]``.

    Raises:
        ConfigurationError: for a sampler that cannot be split over clients, naming the way out.
    """
    batches = loader.batch_sampler
    if batches is None:
        raise ConfigurationError(
            f"Expected a train_dataloader() of {owner} that makes batches but it has `batch_size` None, where items are batches: give "
            "the data set single items, and the loader a `batch_size`"
        )
    if type(batches) is not BatchSampler:
        raise _unsplit(owner, "batch_sampler", batches)
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ConfigurationError(
            f"Expected a train_dataloader() of {owner} that loads as torch's DataLoader does but {type(loader).__name__} overrides "
            "`__iter__`, which clients do not call: move it into the data set or `collate_fn`"
        )
    items, sampler, drop_last = np.arange(len(cast("Sized", loader.dataset))), batches.sampler, batches.drop_last
    kind = type(sampler)
    if kind is SequentialSampler:
        return Order(shuffled=False, drop_last=drop_last), items
    if kind is RandomSampler and isinstance(sampler, RandomSampler):
        if not sampler.replacement and sampler.num_samples == len(items):
            return Order(drop_last=drop_last), items
        if sampler.replacement or sampler.num_samples < len(items):
            share = sampler.num_samples / len(items)
            return Order(weights=np.ones(len(items)), replacement=sampler.replacement, share=share, drop_last=drop_last), items
    if kind is SubsetRandomSampler and isinstance(sampler, SubsetRandomSampler):
        return Order(drop_last=drop_last), np.array(list(sampler.indices), dtype=np.int64)
    if kind is WeightedRandomSampler and isinstance(sampler, WeightedRandomSampler):
        weights = np.zeros(len(items))
        weights[: len(sampler.weights)] = sampler.weights.numpy()
        share = sampler.num_samples / len(items)
        return Order(weights=weights, replacement=sampler.replacement, share=share, drop_last=drop_last), items
    if isinstance(sampler, (list, tuple, range, np.ndarray, Tensor)):
        return Order(shuffled=False, drop_last=drop_last), np.array([int(item) for item in sampler], dtype=np.int64)
    raise _unsplit(owner, "sampler", sampler)


def _unsplit(owner: str, argument: str, sampler: Sampler[Any] | Any) -> ConfigurationError:
    return ConfigurationError(
        f"Expected a `{argument}` of {owner}'s train_dataloader() that can be split over clients but got {type(sampler).__name__}: give "
        "`shuffle`, torch's SubsetRandomSampler or WeightedRandomSampler, or a `torch.utils.data.Subset` of the items to train on. Clients "
        "and processes share the set without a sampler"
    )
