"""The bare loop: the least PyTorch that does a workload's client steps. What fedlight is measured against."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class ClientTurn:
    """One client's part of a round: its samples ``[n]`` in the order in which they are used, and its seed of dropout."""

    rows: Tensor
    seed: int


class BareLoop:
    """FedAvg with equal weights and nothing else: flat weights, plain SGD, a running sum; no messages, losses, logs or checks.

    Who takes part and in which order samples are used is decided before the clock starts: the loop does not pay for it.

    Args:
        network: the model, taken over; its weights become views of one vector.
        x: all samples ``[samples, ...]``.
        y: their labels ``[samples]``.
        lr: client learning rate.
        batch_size: samples in a local batch.
        share: turns the mean of this process's clients into that of all processes', in place; one process needs none.
    """

    def __init__(
        self, network: nn.Module, x: Tensor, y: Tensor, lr: float, batch_size: int, share: Callable[[Tensor], None] | None = None
    ) -> None:
        self.network = network.train()
        self.x = x
        self.y = y
        self.lr = lr
        self.batch_size = batch_size
        self.share = share
        self.parameters: list[Tensor] = list(network.parameters())
        self.weights = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        pieces = self.weights.split([p.numel() for p in self.parameters])
        self.pieces = [piece.view(p.shape) for p, piece in zip(self.parameters, pieces, strict=True)]
        for parameter, piece in zip(self.parameters, self.pieces, strict=True):
            parameter.data = piece
        self.noisy = any(isinstance(layer, nn.Dropout) for layer in network.modules())

    def run(self, rounds: Sequence[Sequence[ClientTurn]]) -> None:
        """Run rounds, one sequence of clients each."""
        start, total = self.weights.clone(), torch.empty_like(self.weights)
        for cohort in rounds:
            total.zero_()
            for client in cohort:
                self.add_client(client, start, total)
            torch.div(total, len(cohort), out=start)
            if self.share is not None:
                self.share(start)
        self.weights.copy_(start)

    def add_client(self, client: ClientTurn, start: Tensor, total: Tensor) -> None:
        """Train one client from ``start`` and add its weights to ``total``, in place."""
        self.weights.copy_(start)
        if self.noisy:
            torch.default_generator.manual_seed(client.seed)
        for x, y in self._batches(client.rows):
            grads = torch.autograd.grad(cross_entropy(self.network(x), y), self.parameters)
            torch._foreach_add_(self.pieces, grads, alpha=-self.lr)  # without the autograd bookkeeping of parameters
        total.add_(self.weights)

    def _batches(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.x.index_select(0, rows), self.y.index_select(0, rows)
        return zip(x.split(self.batch_size), y.split(self.batch_size), strict=True)


class BareThreads:
    """The same in threads of one process, each with a loop (and a sum) of its own: whoever is done takes the next client.

    Dropout draws from the one generator of all threads, so runs differ in their numbers, not in their work.
    """

    def __init__(self, loops: Sequence[BareLoop]) -> None:
        self.loops = loops

    def run(self, rounds: Sequence[Sequence[ClientTurn]]) -> None:
        """Run rounds, one sequence of clients each."""
        start = self.loops[0].weights.clone()
        totals = [torch.empty_like(start) for _ in self.loops]
        for cohort in rounds:
            waiting = deque(cohort)
            work = [(loop, waiting, start, total.zero_()) for loop, total in zip(self.loops, totals, strict=True)]
            with ThreadPoolExecutor(len(work)) as threads:
                list(threads.map(_work, work))  # raises what a thread did
            start = torch.stack(totals).sum(0).div_(len(cohort))
        self.loops[0].weights.copy_(start)


def _work(task: tuple[BareLoop, deque[ClientTurn], Tensor, Tensor]) -> None:
    loop, waiting, start, total = task
    while waiting:
        try:
            client = waiting.popleft()
        except IndexError:  # another thread was quicker
            return
        loop.add_client(client, start, total)
