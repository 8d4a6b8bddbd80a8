"""Records updates for pretraining along a training trajectory of simulated clients on public proxy data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from fedlight.clients.algorithms import Algorithm
from fedlight.clients.local_model import LocalModel
from fedlight.core.bank import UpdateBank, write_bank
from fedlight.core.errors import require
from fedlight.core.orders import Visit
from fedlight.core.random import derive_seed, numpy_generator, torch_generator, untouched_generators


def draw_client(labels: np.ndarray, num_classes: int, samples: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Return up to ``samples`` distinct indices with a label mix from Dirichlet(alpha): one simulated client."""
    mix = rng.dirichlet(np.full(num_classes, alpha))
    wanted = rng.multinomial(samples, mix)
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:k] for c, k in enumerate(wanted) if k]
    indices = np.concatenate(chosen)
    return indices if len(indices) else rng.permutation(len(labels))[:samples]


def record_bank(
    model: LocalModel,
    weights: Tensor,
    buffers: Tensor,
    algorithm: Algorithm,
    proxy: tuple[Tensor, Tensor],
    num_classes: int,
    rounds: int,
    clients: int,
    samples: int,
    alpha: float,
    seed: int,
    server_lr: float = 1.0,
    first_round: int = 0,
    on_round: Callable[[int], None] | None = None,
    in_memory_mb: float = 1024.0,
    trajectories: int = 1,
    history: Tensor | None = None,
) -> UpdateBank:
    """Return the uploads ``[rounds, clients, vectors * dim + scalars]`` of a federated run on proxy data from ``weights`` ``[dim]``.

    Every round draws new simulated clients from the proxy data, trains each from the current weights and moves the weights by the mean
    update, so the bank spans a trajectory rather than one point. If there are several ``trajectories``, they share the rounds, and each
    begins at ``weights`` and at ``first_round``. A bank of more than ``in_memory_mb`` MiB is recorded to a temporary file (in the folder
    that ``TMPDIR`` names) that disappears with the bank.

    ``history`` ``[k, dim]``, the last first, are aggregates of real rounds that become rounds of the bank, before the recorded ones.
    The server does not know how the real clients differed, so their clients differ like those of a recorded round, at the scale of
    the aggregate's first vector.

    Raises:
        ConfigurationError: if the proxy data is empty or the trajectory diverges.
    """
    x, y = proxy
    require(len(y), "Expected proxy data to pretrain the codec on but it is empty: raise `data.proxy_samples` or set `data.proxy_source`")
    labels, simulated = y.cpu().numpy(), rounds
    dim = len(weights)
    past = torch.empty(0, len(weights)) if history is None else history

    def trajectory() -> Iterator[Tensor]:
        """Yield each round's updates ``[clients, dim]``, in memory that the next round reuses."""
        rng = numpy_generator(seed, first_round, "proxy clients")
        updates = torch.empty(clients, layout.dim)
        for step in range(simulated):
            if step * trajectories % simulated < trajectories:  # one more trajectory's share of the rounds begins
                number, current = first_round, weights.clone()
            for client in range(clients):
                chosen = torch.from_numpy(draw_client(labels, num_classes, samples, alpha, rng)).to(y.device)
                with untouched_generators([weights.device] if weights.is_cuda else []):
                    model.visit = Visit(number)
                    model.load(current, buffers)
                    model.seed_noise(derive_seed(seed, first_round + step, client, "proxy noise"))
                    generator = torch_generator(seed, first_round + step, client, "proxy batches")
                    updates[client] = algorithm.run(model, x[chosen], y[chosen], number, generator).upload
            mean = updates.mean(0)
            require(torch.isfinite(mean.sum()), f"Local training on proxy data diverged in round {step}: lower the client learning rate")
            current -= server_lr * algorithm.step(mean, 0.0, {}).to(current.device)  # new clients: no share, no memory
            for aggregate in past[step::simulated]:
                yield aggregate + (updates - mean) * (aggregate[:dim].norm() / mean[:dim].norm().clamp(min=1e-30))
            yield updates
            number += 1
            if on_round is not None:
                on_round(step)

    layout = model.flat.layout.stacked(algorithm.vectors, algorithm.scalars)
    recorded = trajectory()
    rounds += len(past)
    if 4 * rounds * clients * layout.dim <= in_memory_mb * 2**20:
        bank = torch.empty(rounds, clients, layout.dim)
        for row, updates in zip(bank, recorded, strict=True):
            row.copy_(updates)
        return UpdateBank(bank, layout)
    # A mapped file needs no name. If it cannot be removed yet, the system clears its temporary folder later.
    with TemporaryDirectory(prefix="fedlight-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "updates.safetensors"
        write_bank(path, layout, rounds, clients, recorded)
        return UpdateBank.load(path)
