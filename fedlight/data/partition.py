"""How to split a training set over clients: with label skew, size skew, or neither; see `natural` for given clients."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np

from fedlight.core.errors import ConfigurationError, require
from fedlight.data.splits import Partition, cut, fill_small, shuffle_within


class Partitioner(ABC):
    """A scheme that gives every sample to exactly one client, and at least ``min_samples`` to each.

    A subclass defines in `assign` the client of each sample; this class checks and repairs the result.

    Args:
        min_samples: Least number of samples per client.

    Attributes:
        by_label: whether the split depends on labels: data without any is refused.
    """

    by_label: bool = True

    def __init__(self, min_samples: int = 1) -> None:
        require(min_samples >= 1, f"min_samples: expected at least 1, got {min_samples}; a client without samples cannot train.")
        self.min_samples = min_samples

    def partition(
        self, labels: np.ndarray, num_clients: int | None, rng: np.random.Generator, client_ids: np.ndarray | None = None
    ) -> Partition:
        """Split samples with ``labels`` (int ``[samples]``) and optional natural ``client_ids`` over the clients.

        Raises:
            ConfigurationError: a number of clients that does not fit the samples or the scheme.
        """
        labels = np.asarray(labels)
        clients = self.count_clients(len(labels), num_clients, client_ids)
        require(clients >= 1, f"num_clients: expected at least 1, got {clients}.")
        if clients * self.min_samples > len(labels):
            raise ConfigurationError(
                f"num_clients: more clients than samples: {clients} clients of at least {self.min_samples} samples need "
                f"{clients * self.min_samples}, got {len(labels)}; set num_clients to {len(labels) // self.min_samples} or less."
            )
        assignment = self.assign(labels, clients, rng, client_ids)
        return Partition.from_assignment(self.enforce(assignment, clients, rng), clients)

    @abstractmethod
    def assign(self, labels: np.ndarray, num_clients: int, rng: np.random.Generator, client_ids: np.ndarray | None) -> np.ndarray:
        """Return the client of every sample, int64 ``[samples]`` in ``0..num_clients - 1``."""

    def count_clients(self, samples: int, num_clients: int | None, client_ids: np.ndarray | None) -> int:
        """Return the number of clients; schemes without given clients need ``num_clients``."""
        if num_clients is None:
            raise ConfigurationError(
                f"num_clients: {type(self).__name__} needs a number, got None; only Natural and Explicit define their own clients."
            )
        return num_clients

    def client_ids(self, samples: int, natural: np.ndarray | None) -> np.ndarray | None:
        """Return the ids for partitioning a whole training set (before hold-outs), ``[samples]`` or None."""
        return natural

    def enforce(self, assignment: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
        """Give every client ``min_samples`` by moving samples from the largest clients, see `fill_small`."""
        return fill_small(assignment, num_clients, self.min_samples, rng)


_DRAWS = 10  # draws of Dirichlet before moving samples


class IID(Partitioner):
    """A uniformly random split into clients of equal size (to within one sample)."""

    by_label = False

    def assign(self, labels: np.ndarray, num_clients: int, rng: np.random.Generator, client_ids: np.ndarray | None) -> np.ndarray:
        """Deal shuffled samples to clients in turn."""
        return rng.permutation(np.arange(len(labels), dtype=np.int64) % num_clients)


class Dirichlet(Partitioner):
    """Label skew: each class is spread over the clients in proportions drawn from Dirichlet(alpha).

    The construction of Yurochkin et al. 2019 (arXiv 1905.12022); Hsu et al. 2019 (arXiv 1909.06335) draw each client's
    class mix instead. If a client has fewer than ``min_samples`` the whole draw is repeated, up to ten times; then the
    draw that lacks the fewest samples is repaired by moving random samples from the largest clients.

    Args:
        alpha: Concentration above 0: a small value gives one class per client, a large value IID.
        min_samples: Least number of samples per client.
    """

    def __init__(self, alpha: float = 0.5, min_samples: int = 1) -> None:
        super().__init__(min_samples)
        self.alpha = _positive("alpha", alpha)

    def assign(self, labels: np.ndarray, num_clients: int, rng: np.random.Generator, client_ids: np.ndarray | None) -> np.ndarray:
        """Return the first draw with enough samples for every client, else the closest of ten."""
        best, least = np.empty(0, dtype=np.int64), math.inf
        counts = np.unique(labels, return_counts=True)[1]
        for _ in range(_DRAWS):
            candidate = self._draw(labels, counts, num_clients, rng)
            lacking = int(np.maximum(self.min_samples - np.bincount(candidate, minlength=num_clients), 0).sum())
            if lacking < least:
                best, least = candidate, lacking
            if lacking == 0:
                break
        return best

    def _draw(self, labels: np.ndarray, counts: np.ndarray, num_clients: int, rng: np.random.Generator) -> np.ndarray:
        order = shuffle_within(labels, rng)
        parts = [cut(int(count), rng.dirichlet(np.full(num_clients, self.alpha))) for count in counts]
        assignment = np.empty(len(labels), dtype=np.int64)
        assignment[order] = np.concatenate(parts)
        return assignment


class Shards(Partitioner):
    """Few labels per client: samples sorted by label are cut into equal shards, each client gets some (McMahan et al. 2017).

    A shard no longer than the rarest class spans at most two labels, so a client has at most ``2 * shards_per_client``.

    Args:
        shards_per_client: Number of shards per client.
        min_samples: Least number of samples per client.
    """

    def __init__(self, shards_per_client: int = 2, min_samples: int = 1) -> None:
        super().__init__(min_samples)
        require(shards_per_client >= 1, f"shards_per_client: expected at least 1, got {shards_per_client}.")
        self.shards_per_client = shards_per_client

    def assign(self, labels: np.ndarray, num_clients: int, rng: np.random.Generator, client_ids: np.ndarray | None) -> np.ndarray:
        """Deal the shards at random; raises an error, instead of mixing labels, if shards are too short."""
        shards = num_clients * self.shards_per_client
        least = self.shards_per_client * (len(labels) // shards)
        if least < self.min_samples:
            raise ConfigurationError(
                f"num_clients: {shards} shards of {len(labels)} samples leave a client {least}, expected at least {self.min_samples}; "
                "lower num_clients, shards_per_client or min_samples."
            )
        owners = rng.permutation(shards) // self.shards_per_client
        assignment = np.empty(len(labels), dtype=np.int64)
        assignment[shuffle_within(labels, rng)] = owners[np.arange(len(labels)) * shards // len(labels)]
        return assignment


class QuantitySkew(Partitioner):
    """Clients of unequal size, sizes in proportions drawn from Dirichlet(alpha), labels mixed.

    Args:
        alpha: Concentration above 0: a small value gives a few large clients, a large value equal sizes.
        min_samples: Least number of samples per client; the largest clients fill up smaller ones.
    """

    by_label = False

    def __init__(self, alpha: float = 1.0, min_samples: int = 1) -> None:
        super().__init__(min_samples)
        self.alpha = _positive("alpha", alpha)

    def assign(self, labels: np.ndarray, num_clients: int, rng: np.random.Generator, client_ids: np.ndarray | None) -> np.ndarray:
        """Cut the shuffled samples by the drawn proportions."""
        return rng.permutation(cut(len(labels), rng.dirichlet(np.full(num_clients, self.alpha))))


def _positive(name: str, value: float) -> float:
    require(math.isfinite(value) and value > 0, f"{name}: expected a finite number above 0, got {value}.")
    return float(value)
