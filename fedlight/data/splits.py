"""Index arithmetic: the CSR partition, the vectorized operations behind every split, and what is held out from clients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fedlight.core.errors import ConfigurationError, DataError, require
from fedlight.core.random import numpy_generator


@dataclass(frozen=True, eq=False)
class Partition:
    """Which samples belong to which client, in compressed rows: client ``i`` has ``order[offsets[i]:offsets[i + 1]]``.

    ``order``: int64 ``[samples]``, sample indices; ``offsets``: int64 ``[clients + 1]``, rising from 0.
    """

    order: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> np.ndarray:
        """Return the sample indices of a client, int64 ``[samples of client]``, a view; raises IndexError."""
        return self.order[self.rows(client)]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[client] for client in range(len(self)))

    def rows(self, client: int) -> slice:
        """Return the slice of a client's samples in ``order``; raises IndexError."""
        if not 0 <= client < len(self):
            raise IndexError(f"client: expected 0..{len(self) - 1}, got {client}.")
        return slice(int(self.offsets[client]), int(self.offsets[client + 1]))

    @property
    def sizes(self) -> np.ndarray:
        """Samples of every client, int64 ``[clients]``."""
        return np.diff(self.offsets)

    @property
    def clients(self) -> np.ndarray:
        """Client of every entry of ``order``, int64 ``[samples]``."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.sizes)

    def renumbered(self, order: np.ndarray) -> Partition:
        """Return the same partition for reordered samples; ``order``: their old indices, int64 ``[samples]``."""
        new = np.empty(len(order), dtype=np.int64)
        new[order] = np.arange(len(order))
        return Partition(new[self.order], self.offsets)

    @classmethod
    def from_assignment(cls, assignment: np.ndarray, num_clients: int) -> Partition:
        """Group samples by client; ``assignment``: client of every sample, int64 ``[samples]``, -1 for none."""
        order = np.argsort(assignment, kind="stable").astype(np.int64)
        order = order[np.count_nonzero(assignment < 0) :]
        return cls(order, _offsets(np.bincount(assignment[order], minlength=num_clients)))


def check_partition(partition: Partition, samples: int, complete: bool = True) -> None:
    """Raise DataError unless each of ``samples`` is in exactly one client (``complete`` False: in at most one)."""
    order, offsets = partition.order, partition.offsets
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(order) or np.any(np.diff(offsets) < 0):
        raise DataError(f"partition: expected offsets rising from 0 to {len(order)}, got {offsets}.")
    if len(order) and (order.min() < 0 or order.max() >= samples):
        raise DataError(f"partition: expected sample indices in 0..{samples - 1}, got {order.min()}..{order.max()}.")
    counts = np.bincount(order, minlength=samples)
    if np.any(counts > 1):
        raise DataError(f"partition: expected every sample in one client, got sample {int(np.argmax(counts > 1))} in several.")
    if complete and np.any(counts == 0):
        raise DataError(f"partition: expected every sample in one client, got sample {int(np.argmin(counts))} in none.")


def split_holdout(partition: Partition, fraction: float, rng: np.random.Generator) -> tuple[Partition, Partition]:
    """Hold out ``round(fraction * size)`` random samples of every client, never its last one: (training, held out).

    Both parts have all clients; a client of one sample, or with a share that rounds to 0, has an empty hold-out.
    """
    sizes = partition.sizes
    held = np.minimum(np.rint(fraction * sizes).astype(np.int64), np.maximum(sizes - 1, 0))
    clients = partition.clients
    shuffled = rng.permutation(len(partition.order))
    shuffled = shuffled[np.argsort(clients[shuffled], kind="stable")]  # random within a client, clients in order
    position = np.arange(len(shuffled)) - np.repeat(partition.offsets[:-1], sizes)
    out = np.zeros(len(shuffled), dtype=bool)
    out[shuffled] = position < np.repeat(held, sizes)
    return Partition(partition.order[~out], _offsets(sizes - held)), Partition(partition.order[out], _offsets(held))


def client_by_client(train: Partition, holdout: Partition) -> np.ndarray:
    """Return all samples in the order of clients, int64 ``[samples]``: training, held-out, then those without a client."""
    held = np.concatenate([train.order, holdout.order])
    placed = np.zeros(held.max() + 1, dtype=bool)
    placed[held] = True
    return np.concatenate([held, np.flatnonzero(~placed)])


def stratified_choice(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Choose ``count`` distinct samples, sorted int64, with each class in proportion (to within two samples).

    Systematic sampling: even steps through the samples, sorted by class and in random order within each.
    """
    order = shuffle_within(labels, rng)
    steps = ((np.arange(count) + 0.5) * (len(labels) / max(count, 1))).astype(np.int64)
    return np.sort(order[steps])


def shuffle_within(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return all indices sorted by group and in random order inside each group, int64 ``[samples]``."""
    shuffled = rng.permutation(len(groups))
    return shuffled[np.argsort(groups[shuffled], kind="stable")]


def cut(count: int, proportions: np.ndarray) -> np.ndarray:
    """Return a rising client id for each of ``count`` samples so that clients get samples in these proportions.

    ``proportions``: float ``[clients]`` summing to 1. Sample ``j`` sits at the quantile ``(j + 0.5) / count``.
    """
    cumulated = np.cumsum(proportions)
    cumulated /= cumulated[-1]
    return np.searchsorted(cumulated, (np.arange(count) + 0.5) / count, side="right").astype(np.int64)


def fill_small(assignment: np.ndarray, num_clients: int, min_samples: int, rng: np.random.Generator) -> np.ndarray:
    """Move as few samples as possible from the largest clients until every client has ``min_samples``.

    ``assignment``: int64 ``[samples]``, with at least ``num_clients * min_samples`` samples. The largest clients shrink
    to a common level; ``rng`` draws which of their samples move, and to which client.
    """
    sizes = np.bincount(assignment, minlength=num_clients)
    missing = np.maximum(min_samples - sizes, 0)
    if not missing.any():
        return assignment
    taken = _level(sizes, int(missing.sum()), min_samples)
    order = shuffle_within(assignment, rng)
    position = np.arange(len(order)) - np.repeat(_offsets(sizes)[:-1], sizes)
    moved = order[position < np.repeat(taken, sizes)]
    repaired = assignment.copy()
    repaired[rng.permutation(moved)] = np.repeat(np.arange(num_clients), missing)
    return repaired


def _level(sizes: np.ndarray, needed: int, floor: int) -> np.ndarray:
    """Return how many samples to take from each client, ``needed`` in all, cutting the largest to one level."""
    low, high = floor, int(sizes.max())  # invariant: cutting to `low` frees enough, to `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        if np.maximum(sizes - middle, 0).sum() >= needed:
            low = middle
        else:
            high = middle
    taken = np.maximum(sizes - low, 0)
    surplus = int(taken.sum()) - needed  # an excess below the number of clients above `low`: give one back to each of the last
    taken[np.flatnonzero(taken)[len(np.flatnonzero(taken)) - surplus :]] -= 1
    return np.asarray(taken, dtype=np.int64)


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


_LEAST_PROXY = 200  # least number of proxy samples for a fraction of a small data set


@dataclass(frozen=True)
class HoldOut:
    """How much of the training set to hold out: see the arguments of `FederatedDataModule` with the same names."""

    proxy_fraction: float = 0.05
    proxy_samples: int | None = None
    val_fraction: float = 0.0

    def __post_init__(self) -> None:
        for name in ("proxy_fraction", "val_fraction"):
            require(0 <= getattr(self, name) < 1, f"{name}: expected a share of at least 0 and below 1, got {getattr(self, name)}.")
        if self.proxy_samples is not None and self.proxy_samples < 0:
            raise ConfigurationError(f"proxy_samples: expected 0 or more, or null, got {self.proxy_samples}.")

    def split(self, labels: np.ndarray, proxy: bool, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return sorted indices (clients, proxy, val), disjoint, stratified by label; raises ConfigurationError if clients have none."""
        share = max(_LEAST_PROXY, round(self.proxy_fraction * len(labels))) if self.proxy_fraction > 0 else 0
        held = (share if self.proxy_samples is None else self.proxy_samples) if proxy else 0
        val = max(1, round(self.val_fraction * len(labels))) if self.val_fraction > 0 else 0
        if held + val >= len(labels):
            raise ConfigurationError(
                f"proxy_samples: expected samples for clients among the {len(labels)} training samples, got {held} proxy and "
                f"{val} validation samples; set a smaller proxy_samples or val_fraction."
            )
        kept = np.arange(len(labels))
        parts = []
        for name, count in (("proxy", held), ("val", val)):
            chosen = stratified_choice(labels[kept], count, numpy_generator(seed, "data", name))
            parts.append(kept[chosen])
            kept = np.delete(kept, chosen)
        return kept, parts[0], parts[1]
