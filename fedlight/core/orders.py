"""In which order a client goes through its samples: passes, and the batches of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Draw = Callable[[int], Tensor]
"""Maps the number of batches that a client took in its visit so far to the order ``[<= n]`` of its next pass."""


@dataclass(frozen=True)
class Visit:
    """A client's part of a round, as its own loop counts it.

    ``lengths`` are the batches of every epoch: of every pass over its samples, or of the whole round where the number of steps is given.
    A client is taken to have made the same number of them in every round before.
    """

    round: int = 0
    lengths: tuple[int, ...] = (1,)

    @property
    def steps(self) -> int:
        """Local steps of a round."""
        return sum(self.lengths)


@runtime_checkable
class Ordered(Protocol):
    """Samples that say themselves in which order a client goes through them."""

    def lengths(self, batch_size: int, epochs: int | None, steps: int | None) -> tuple[int, ...]:
        """Return how many batches every epoch of a round has."""

    def orders(
        self, batch_size: int, epochs: int | None, steps: int | None, round: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, int]]:
        """Yield (order, batch size) for every pass, as ``epoch_orders`` does."""


def epoch_lengths(n: int, batch_size: int, epochs: int | None, steps: int | None, drop_last: bool = False) -> tuple[int, ...]:
    """Return the batches of every epoch of a round over ``n`` samples: a round of a number of steps is one."""
    return (steps,) if steps is not None else pass_lengths(n, batch_size, epochs, steps, drop_last)


def pass_lengths(n: int, batch_size: int, epochs: int | None, steps: int | None, drop_last: bool = False) -> tuple[int, ...]:
    """Return the batches of every pass over ``n`` samples.

    With epochs the last batch of each may be smaller, or is dropped unless it is the only one. With steps all batches are full (or the
    whole data set, if it is smaller than a batch), and a pass ends when fewer than a batch are left.
    """
    if steps is None:
        full, rest = divmod(n, batch_size)
        return (full + (1 if rest and not (drop_last and full) else 0),) * (epochs or 1)
    full = n // min(batch_size, n)
    whole, rest = divmod(steps, full)
    return (full,) * whole + ((rest,) if rest else ())


def epoch_orders(
    n: int,
    batch_size: int,
    epochs: int | None,
    steps: int | None,
    generator: torch.Generator,
    drop_last: bool = False,
    draw: Draw | None = None,
) -> Iterator[tuple[Tensor, int]]:
    """Yield (order ``[<= n]``, batch size) for every pass of ``n`` samples, shuffled unless ``draw`` says otherwise.

    The passes are those of ``pass_lengths``, for a number of epochs or of steps.
    """
    size, taken = batch_size if steps is None else min(batch_size, n), 0
    for length in pass_lengths(n, batch_size, epochs, steps, drop_last):
        order = torch.randperm(n, generator=generator) if draw is None else draw(taken)
        yield order[: length * size], size
        taken += length
